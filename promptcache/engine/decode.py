"""Decoding: token by token, sampled as mlx-lm does it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream

from promptcache.engine.sampling import LogitsProcessor, Sampler, sampled
from promptcache.kvcache.kv_quantization import KVSettings, quantize

# How often to give unused memory back, as in mlx-lm's generate_step.
CLEAR_CACHE_TOKENS = 256


class Step(NamedTuple):
    """One generated token.

    Attributes:
        token: Its id.
        logprobs: Log-probabilities, shape `(vocabulary,)`.
        from_draft: Whether a draft model proposed it.
        num_read: How many tokens of the answer the cache has read, if that is known.
    """

    token: int
    logprobs: mx.array
    from_draft: bool = False
    num_read: int | None = None


def decode(
    model: Any,
    cache: list[Any],
    token_ids: Sequence[int],
    logits: mx.array,
    *,
    max_tokens: int,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor] = (),
    kv: KVSettings,
) -> Iterator[Step]:
    """Generate after a prompt.

    Like mlx-lm's `generate_step` it begins a token before it hands out the one
    before, but for the first, which nothing may delay.

    Args:
        model: An mlx-lm model.
        cache: Its cache, holding the prompt; it is modified.
        token_ids: The whole prompt, which the processors see.
        logits: The logits after the prompt, shape `(1, vocabulary)`.
        max_tokens: Most tokens to generate, -1 for no limit.
        sampler: From log-probabilities, shape `(1, vocabulary)`, to a token.
        logits_processors: Called with all tokens so far and the logits.
        kv: When to quantize keys and values.
    """
    seen = mx.array(list(token_ids)) if logits_processors else None

    def sample(logits: mx.array) -> tuple[mx.array, mx.array]:
        with mx.stream(generation_stream):
            for processor in logits_processors:
                logits = processor(seen, logits)
            logprobs = logits - mx.logsumexp(logits, keepdims=True)
            token = sampled(sampler, logprobs)
            mx.async_eval(token, logprobs)
            return token, logprobs.squeeze(0)

    def step(token: mx.array, num_tokens: int) -> tuple[mx.array, mx.array]:
        nonlocal seen
        with mx.stream(generation_stream):
            logits = model(token[None], cache=cache)[:, -1, :]
            if seen is not None:
                seen = mx.concatenate([seen, token])
            quantize(cache, len(token_ids) + num_tokens, kv)
            return sample(logits)

    token, logprobs = sample(logits)
    yield Step(token.item(), logprobs, num_read=0)
    num_tokens = 1
    upcoming = step(token, num_tokens) if num_tokens != max_tokens else None
    while upcoming is not None:
        token, logprobs = upcoming
        num_tokens += 1
        upcoming = step(token, num_tokens) if num_tokens != max_tokens else None
        num_read = num_tokens - (upcoming is None)
        yield Step(token.item(), logprobs, num_read=num_read)
        if num_tokens % CLEAR_CACHE_TOKENS == 0:
            mx.clear_cache()
