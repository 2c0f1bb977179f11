"""Speculative decoding: a draft proposes tokens, the main model checks them."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import speculative_generate_step

from promptcache.engine.decode import Step
from promptcache.engine.sampling import LogitsProcessor, Sampler
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.draft import DraftPair


def speculate(
    model: DraftPair,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    num_draft_tokens: int,
    max_tokens: int,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor] = (),
    kv: KVSettings,
) -> Iterator[Step]:
    """Generate after a prompt, of which the cache holds all but the last token.

    Args:
        model: The main model with its draft.
        cache: Their cache; it is modified.
        token_ids: The whole prompt, which the processors see.
        num_draft_tokens: How many tokens the draft proposes at once.
        max_tokens: Most tokens to generate, -1 for no limit.
        sampler: From log-probabilities, shape `(1, vocabulary)`, to a token.
        logits_processors: Called with all tokens so far and the logits.
        kv: When to quantize keys and values.
    """
    read = mx.array(list(token_ids[:-1]), dtype=mx.uint32)
    steps = speculative_generate_step(
        mx.array(list(token_ids[-1:]), dtype=mx.uint32),
        model,
        model.draft,
        num_draft_tokens=num_draft_tokens,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=[_seeing(read, p) for p in logits_processors] or None,
        prompt_cache=cache,
        kv_bits=kv.bits,
        kv_group_size=kv.group_size,
        quantized_kv_start=kv.start,
    )
    return (Step(int(token), *rest) for token, *rest in steps)


def _seeing(read: mx.array, processor: LogitsProcessor) -> LogitsProcessor:
    """Return a processor that sees what was read before, which mlx-lm hides from it."""
    return lambda tokens, logits: processor(mx.concatenate([read, tokens]), logits)
