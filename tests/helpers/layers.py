"""Layers of caches that hold random rows, encoded and compared."""

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
)

from promptcache.kvcache import snapshot
from promptcache.kvcache.encode import encode_rows
from promptcache.segments.types import EncodedSegment
from tests.helpers.published import TOKEN_IDS

NUM_HEADS = 2
HEAD_DIM = 64
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
LAYERS = [
    *(pytest.param(KVCache, d, id=f"KVCache-{d}") for d in DTYPES),
    *(pytest.param(ConcatenateKVCache, d, id=f"Concatenate-{d}") for d in DTYPES),
    *(
        pytest.param(
            lambda bits=bits: QuantizedKVCache(32, bits), d, id=f"Quantized{bits}-{d}"
        )
        for bits in (4, 8)
        for d in DTYPES
    ),
]


def rows(num_rows: int, dtype: mx.Dtype = mx.float32, first: int = 0) -> mx.array:
    """Return keys whose values tell head, row and column."""
    start, count = first * HEAD_DIM, num_rows * HEAD_DIM
    head = mx.arange(start, start + count).reshape(1, 1, num_rows, HEAD_DIM)
    heads = mx.concatenate([head, head + 0.5], axis=1)
    # Small enough to be exact in float16 too.
    return (heads % 1021).astype(dtype)


def filled(layer: Any, num_rows: int, dtype: mx.Dtype = mx.float32) -> Any:
    """Fill a layer with rows, in two steps as decoding does."""
    keys, values = rows(num_rows, dtype), -rows(num_rows, dtype)
    half = num_rows // 2
    layer.update_and_fetch(keys[..., :half, :], values[..., :half, :])
    layer.update_and_fetch(keys[..., half:, :], values[..., half:, :])
    return layer


def live_rows(layer: Any) -> list[mx.array]:
    """Return a layer's rows without padding: keys' arrays, then values'."""
    if isinstance(layer, QuantizedKVCache):
        return [a[..., : layer.offset, :] for a in [*layer.keys, *layer.values]]
    return [a[..., : layer.offset, :] for a in (layer.keys, layer.values)]


def assert_same_rows(layer: Any, other: Any) -> None:
    assert type(layer) is type(other)
    assert layer.offset == other.offset
    pairs = zip(live_rows(layer), live_rows(other), strict=True)
    assert all(a.dtype == b.dtype and mx.array_equal(a, b) for a, b in pairs)


def encode(
    cache: Sequence[Any], start: int, end: int, token_ids: Sequence[int] = TOKEN_IDS
) -> EncodedSegment:
    """Return rows of a cache that has just read all it holds."""
    captures = [snapshot.capture(cache, 0, cache[0].offset)]
    return encode_rows(cache, captures, token_ids, start, end)


def forged(segment: EncodedSegment, *part: Any) -> EncodedSegment:
    """Return a segment whose only part claims to be another one."""
    return segment._replace(layout=json.dumps({"0": part}))


def read(layer: Any, start: int, end: int, dtype: mx.Dtype = mx.float32) -> Any:
    """Let a layer read tokens at once, as a model does; return what it attends to."""
    if isinstance(layer, ChunkedKVCache):
        layer.maybe_trim_front()
    keys = rows(end - start, dtype, first=start)
    return layer.update_and_fetch(keys, -keys)


def read_pieces(
    cache: Sequence[Any], pieces: Sequence[int], dtype: mx.Dtype = mx.float32
) -> list[snapshot.Snapshot]:
    """Let a cache read pieces of so many tokens; return what was captured of each."""
    captures, start = [], 0
    for num_tokens in pieces:
        for layer in cache:
            read(layer, start, start + num_tokens, dtype)
        captures.append(snapshot.capture(cache, start, start + num_tokens))
        start += num_tokens
    return captures


def assert_goes_on_alike(
    layer: Any, other: Any, position: int, pieces: Sequence[int], dtype: mx.Dtype
) -> None:
    """Check that two layers attend to the same rows from here on."""
    for num_tokens in pieces:
        end = position + num_tokens
        found = read(layer, position, end, dtype)
        wanted = read(other, position, end, dtype)
        for left, right in zip(found, wanted, strict=True):
            assert left.dtype == right.dtype
            assert mx.array_equal(left, right), f"after [{position}, {end})"
        position = end
