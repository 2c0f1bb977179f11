"""Sampling: from logits to a token, as mlx-lm does it and its arguments say."""

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from promptcache.errors import UsageError

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def sampler_of(
    temp: float | None, top_p: float | None, min_p: float | None, top_k: int | None
) -> Sampler:
    """Return mlx-lm's sampler, greedy without a temperature."""
    sampler: Sampler = make_sampler(
        temp or 0.0, top_p or 0.0, min_p or 0.0, top_k=top_k or 0
    )
    return sampler


def penalties_of(penalty: float | None, context_size: int) -> list[LogitsProcessor]:
    """Return mlx-lm's penalty for repeated tokens, if there is one."""
    try:
        processors: list[LogitsProcessor] = make_logits_processors(
            repetition_penalty=penalty, repetition_context_size=context_size
        )
    except ValueError as error:
        raise UsageError(f"cannot penalize: {error}".rstrip(".")) from error
    return processors


def sampled(sampler: Sampler, logprobs: mx.array) -> mx.array:
    """Return a token. Raises UsageError if mlx-lm refuses the sampler's arguments."""
    try:
        return sampler(logprobs)
    except ValueError as error:
        # mlx-lm's samplers check their arguments when they run.
        raise UsageError(f"cannot sample: {error}".rstrip(".")) from error
