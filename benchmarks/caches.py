"""Caches without a model: random keys and values, their checksums, saving them."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import xxhash
from mlx_lm.models.cache import KVCache

from promptcache.kvcache import snapshot
from promptcache.kvcache.encode import encode_rows
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore

# SmolLM2-135M's, in float32.
NUM_LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
NBYTES_PER_TOKEN = NUM_LAYERS * 2 * KV_HEADS * HEAD_DIM * 4


def random_cache(num_tokens: int, seed: int) -> list[KVCache]:
    """Return a cache of SmolLM2's shape that holds random keys and values."""
    mx.random.seed(seed)
    shape = (1, KV_HEADS, num_tokens, HEAD_DIM)
    cache = [KVCache() for _ in range(NUM_LAYERS)]
    for part in cache:
        part.update_and_fetch(mx.random.normal(shape), mx.random.normal(shape))
    mx.eval([part.state for part in cache])
    return cache


def fresh_cache() -> list[KVCache]:
    """Return an empty cache of SmolLM2's shape."""
    return [KVCache() for _ in range(NUM_LAYERS)]


def evaluate(cache: Sequence[Any]) -> None:
    """Compute all keys and values of a cache."""
    mx.eval([[part.keys, part.values] for part in cache if part.keys is not None])


def shrink(cache: Sequence[Any], num_tokens: int) -> None:
    """Leave a cache the rows that it has after reading these tokens and no others.

    mlx-lm saves all rows, also those that it has only made room for.
    """
    for part in cache:
        part.trim(part.offset - num_tokens)
        capacity = -(-num_tokens // part.step) * part.step
        part.keys = mx.contiguous(part.keys[..., :capacity, :])
        part.values = mx.contiguous(part.values[..., :capacity, :])
    evaluate(cache)


def checksum(cache: Sequence[Any], num_tokens: int) -> str:
    """Return a hash over the first rows of a cache, layer by layer."""
    hash_ = xxhash.xxh3_128()
    for part in cache if num_tokens else ():
        for array in (part.keys, part.values):
            hash_.update(memoryview(mx.contiguous(array[..., :num_tokens, :])))
    return hash_.hexdigest()


def save_cache(
    store: PrefixStore,
    fingerprint: Fingerprint,
    token_ids: Sequence[int],
    cache: Sequence[Any],
    *,
    cut_at: Collection[int] = (),
) -> None:
    """Save what a cache holds of these tokens, in segments that end at `cut_at`."""
    taken = snapshot.capture(cache, 0, len(token_ids))

    def encode(start: int, end: int) -> Any:
        return encode_rows(cache, [taken], token_ids, start, end)

    store.segments.save(token_ids, fingerprint, encode, cut_at=cut_at)


def blobs_of(store: Path) -> list[Path]:
    """Return the blobs of a store."""
    return sorted(store.glob("blobs/*/*.safetensors"))


def nbytes_of(files: Sequence[Path]) -> int:
    """Return the size of files."""
    return sum(file.stat().st_size for file in files)
