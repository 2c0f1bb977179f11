"""Sampling: how the tokens of an answer are chosen, as mlx-lm does it."""

from collections.abc import Callable
from typing import TypedDict

import mlx.core as mx
from mlx_lm.sample_utils import (
    greedy_sampler,
    make_logits_processors,
    make_sampler,
)

from promptcache.errors import UsageError

Sampler = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
greedy: Sampler = greedy_sampler


class SamplingOptions(TypedDict, total=False):
    """How to choose the tokens of an answer.

    Attributes:
        temp: Sampling temperature, 0 or None (default) for greedy; this and the next
            three as in `mlx_lm.sample_utils.make_sampler`.
        top_p: Sample from the likeliest tokens of this probability in all.
        min_p: Sample from tokens this likely, as a share of the likeliest.
        top_k: Sample from this number of the likeliest tokens.
        repetition_penalty: Penalty for repeated tokens of the whole prompt and the
            answer; see `mlx_lm.sample_utils.make_logits_processors`.
        repetition_context_size: How many tokens back it looks, 20 by default.
        seed: Seed for the sampling.
        sampler: A sampler in place of the one that `temp` and so on make.
        logits_processors: Called with the token ids of the whole prompt and the
            answer, shape `(tokens,)`, and the logits, shape `(1, vocabulary)`.
    """

    temp: float | None
    top_p: float | None
    min_p: float | None
    top_k: int | None
    repetition_penalty: float | None
    repetition_context_size: int
    seed: int | None
    sampler: Sampler | None
    logits_processors: list[LogitsProcessor] | None


def sampling_of(options: SamplingOptions) -> tuple[Sampler, list[LogitsProcessor]]:
    """Return what chooses the tokens. Raises UsageError for senseless options."""
    sampler = options.get("sampler") or _sampler_of(
        options.get("temp"),
        options.get("top_p"),
        options.get("min_p"),
        options.get("top_k"),
    )
    seed = options.get("seed")
    if seed is not None:
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed must be in [0, 2**64), not {seed}")
        sampler = seeded(sampler, seed)
    penalties = _penalties_of(
        options.get("repetition_penalty"), options.get("repetition_context_size", 20)
    )
    return sampler, [*penalties, *(options.get("logits_processors") or [])]


def seeded(sampler: Sampler, seed: int) -> Sampler:
    """Return a sampler with random numbers of its own, which start at a seed.

    They are those that follow `mx.random.seed(seed)`, whatever else is sampled in
    between. MLX's generator can be set to a number only, which is its whole state: a
    key of two words.
    """
    if sampler is greedy:
        return sampler
    state: int = seed

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal state
        others = _random_state()
        mx.random.seed(state)
        try:
            return sampler(logprobs)
        finally:
            state = _random_state()
            mx.random.seed(others)

    return sample


def _random_state() -> int:
    high, low = mx.random.state[0].tolist()
    return int(high << 32 | low)


def _sampler_of(
    temp: float | None, top_p: float | None, min_p: float | None, top_k: int | None
) -> Sampler:
    """Return mlx-lm's sampler, greedy without a temperature."""
    sampler: Sampler = make_sampler(
        temp or 0.0, top_p or 0.0, min_p or 0.0, top_k=top_k or 0
    )
    return sampler


def _penalties_of(penalty: float | None, context_size: int) -> list[LogitsProcessor]:
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
