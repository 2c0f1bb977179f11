"""Tiny models and caches for the memory tier."""

import random
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from promptcache.kvcache.classes import parts_of
from tests.architectures import architectures

MODEL = architectures.build("llama")
PLENTY = 10**9


def ids(length: int, seed: int) -> list[int]:
    """Return random token ids."""
    return random.Random(seed).choices(range(100), k=length)


def read(token_ids: list[int], cache: list[Any] | None = None) -> Any:
    """Let the model read what a cache lacks of a prompt; return cache and logits."""
    cache = cache or make_prompt_cache(MODEL)
    start = max(part.offset for _, part in parts_of(cache))
    logits = MODEL(mx.array(token_ids[start:])[None], cache=cache)[:, -1, :]
    mx.eval(logits, [layer.state for layer in cache])
    return cache, logits


def rows(cache: list[Any]) -> list[mx.array]:
    return [
        array[..., : part.offset, :]
        for _, part in parts_of(cache)
        for array in (part.keys, part.values)
    ]
