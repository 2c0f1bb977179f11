"""Decoding: the rest of a prompt, then token by token from a filled cache."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream

from promptcache.errors import UsageError
from promptcache.prefill import KVSettings, quantize

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

# How often to give unused memory back, as in mlx-lm's generate_step.
CLEAR_CACHE_TOKENS = 256


class Step(NamedTuple):
    """One generated token; `logprobs` has shape `(vocabulary,)`."""

    token: int
    logprobs: mx.array
    from_draft: bool = False


def decode(
    model: Any,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    num_read: int,
    max_tokens: int,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor] = (),
    kv: KVSettings,
) -> Iterator[Step]:
    """Read `token_ids[num_read:]` at once and generate after them.

    Like mlx-lm's `generate_step` it begins a token before it hands out the one
    before, but for the first, which nothing may delay.

    Args:
        model: An mlx-lm model.
        cache: Its cache, holding `num_read` tokens; it is modified.
        token_ids: The whole prompt, which the processors see.
        num_read: How many of its tokens the cache holds.
        max_tokens: Most tokens to generate, -1 for no limit.
        sampler: From log-probabilities, shape `(1, vocabulary)`, to a token.
        logits_processors: Called with all tokens so far and the logits.
        kv: When to quantize keys and values.
    """
    seen = mx.array(list(token_ids)) if logits_processors else None
    num_processed = num_read

    def step(tokens: mx.array, *, first: bool = False) -> tuple[mx.array, mx.array]:
        nonlocal seen, num_processed
        num_processed += tokens.size
        with mx.stream(generation_stream):
            logits = model(tokens[None], cache=cache)[:, -1, :]
            if seen is not None:
                seen = seen if first else mx.concatenate([seen, tokens])
                for processor in logits_processors:
                    logits = processor(seen, logits)
            quantize(cache, num_processed, kv)
            logprobs = logits - mx.logsumexp(logits, keepdims=True)
            token = _sampled(sampler, logprobs)
            mx.async_eval(token, logprobs)
            return token, logprobs.squeeze(0)

    token, logprobs = step(mx.array(list(token_ids[num_read:])), first=True)
    yield Step(token.item(), logprobs)
    num_tokens = 1
    upcoming = step(token) if num_tokens != max_tokens else None
    while upcoming is not None:
        token, logprobs = upcoming
        num_tokens += 1
        upcoming = step(token) if num_tokens != max_tokens else None
        yield Step(token.item(), logprobs)
        if num_tokens % CLEAR_CACHE_TOKENS == 0:
            mx.clear_cache()


def _sampled(sampler: Sampler, logprobs: mx.array) -> mx.array:
    try:
        return sampler(logprobs)
    except ValueError as error:
        # mlx-lm's samplers check their arguments when they run.
        raise UsageError(f"cannot sample: {error}".rstrip(".")) from error
