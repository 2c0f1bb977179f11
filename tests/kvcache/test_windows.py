"""Layers with windows are restored at any position, and go on like cold ones."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache

from promptcache import DamagedBlobError, StoreError
from promptcache.kvcache import restore
from promptcache.kvcache.encode import encode_rows
from promptcache.kvcache.loading import segment_loader
from promptcache.segments.types import AT_ANY_TOKEN
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.layers import DTYPES, assert_goes_on_alike, read, read_pieces, rows
from tests.helpers.published import TOKEN_IDS, Published, load, publish


def cut_at(
    published: Sequence[Published], position: int
) -> list[segment_loader.LoadedSegment]:
    """Load the segments before a position, the last one up to it."""
    return [
        load(part, min(part.end, position))
        for part in published
        if part.start < position
    ]


WINDOWS = [
    pytest.param(RotatingKVCache, id="RotatingKVCache"),
    pytest.param(ChunkedKVCache, id="ChunkedKVCache"),
]


@pytest.mark.parametrize("make_layer", WINDOWS)
@pytest.mark.parametrize("rest", [[1, 1], [5], [1, 4, 1], [20]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_window_goes_on_like_a_cold_one_from_every_position(
    blobs: BlobFolder, make_layer: Any, rest: list[int], dtype: mx.Dtype
) -> None:
    cache = [make_layer(8)]
    captures = read_pieces(cache, [5, 1, 7, 1, 12, 4], dtype)
    published = [
        publish(blobs, encode_rows(cache, captures, TOKEN_IDS, *c), *c)
        for c in [(0, 7), (7, 16), (16, 17), (17, 30)]
    ]

    for position in range(1, 31):
        restored = restore.restore([make_layer(8)], cut_at(published, position), 40)

        cold = make_layer(8)
        read(cold, 0, position, dtype)
        assert_goes_on_alike(restored[0], cold, position, rest, dtype)


@settings(deadline=None, max_examples=40)
@given(
    make_layer=st.sampled_from([RotatingKVCache, ChunkedKVCache]),
    window=st.integers(1, 12),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rest=st.lists(st.integers(1, 5), max_size=3),
    data=st.data(),
)
def test_window_read_in_any_pieces_goes_on_like_a_cold_one(
    make_layer: Any,
    window: int,
    pieces: list[int],
    rest: list[int],
    data: st.DataObject,
) -> None:
    num_tokens = sum(pieces)
    cut = data.draw(st.integers(1, num_tokens))
    position = data.draw(st.integers(1, num_tokens))
    cache = [make_layer(window)]
    captures = read_pieces(cache, pieces)
    # The cache reads on before anything is saved.
    read(cache[0], num_tokens, num_tokens + 20)

    segments = []
    for start, end in [(0, cut), (cut, num_tokens)]:
        if start < min(end, position):
            segment = encode_rows(cache, captures, TOKEN_IDS, start, end)
            with tempfile.TemporaryDirectory() as folder:
                blobs = BlobFolder(Path(folder) / "blobs")
                blobs.files.create()
                published = publish(blobs, segment, start, end)
                segments.append(load(published, min(end, position)))

    restored = restore.restore([make_layer(window)], segments, num_tokens)
    cold = make_layer(window)
    read(cold, 0, position)
    assert_goes_on_alike(restored[0], cold, position, rest, mx.float32)


def test_window_needs_no_more_segments_than_it_looks_back(blobs: BlobFolder) -> None:
    cache = [KVCache(), RotatingKVCache(8)]
    captures = read_pieces(cache, [10, 10, 10])
    published = [
        publish(blobs, encode_rows(cache, captures, TOKEN_IDS, *c), *c)
        for c in [(0, 10), (10, 20), (20, 30)]
    ]
    segments = [load(part) for part in published]
    without = {n: a for n, a in segments[0].arrays.items() if "layers.1" not in n}

    restored = restore.restore(
        [KVCache(), RotatingKVCache(8)],
        [segments[0]._replace(arrays=without), *segments[1:]],
        30,
    )

    assert restored[0].offset == restored[1].offset == 30
    assert mx.array_equal(restored[1].keys, rows(8, first=22))


def test_blob_holds_the_rows_of_a_window_once(blobs: BlobFolder) -> None:
    cache = [RotatingKVCache(8)]
    captures = read_pieces(cache, [20, 5])

    segment = encode_rows(cache, captures, TOKEN_IDS, 3, 22)

    arrays = mx.load(str(publish(blobs, segment, 3, 22).path))
    assert isinstance(arrays, dict)
    assert mx.array_equal(arrays["layers.0.keys"], rows(19, first=3))
    assert mx.array_equal(arrays["layers.0.values"], -rows(19, first=3))
    assert segment.resumption == AT_ANY_TOKEN


@pytest.mark.parametrize("lost", [[0], [1], [0, 1], [2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("make_layer", WINDOWS)
def test_rows_of_a_window_that_were_not_captured_are_a_store_error(
    make_layer: Any, lost: list[int]
) -> None:
    cache = [make_layer(8)]
    captures = read_pieces(cache, [10, 10, 10])
    kept = [capture for i, capture in enumerate(captures) if i not in lost]

    with pytest.raises(StoreError, match="was evicted meanwhile"):
        encode_rows(cache, kept, TOKEN_IDS, 5, 30)


def test_rows_that_the_cache_has_still_need_no_capture_of_their_own() -> None:
    cache = [KVCache()]
    captures = read_pieces(cache, [10, 10, 10])

    segment = encode_rows(cache, captures[2:], TOKEN_IDS, 5, 30)

    keys = next(t for t in segment.tensors if t.name == "layers.0.keys")
    assert bytes(keys.data) == bytes(memoryview(mx.contiguous(rows(25, first=5))))


def test_window_without_the_rows_it_looks_back_to_is_damage(blobs: BlobFolder) -> None:
    cache = [RotatingKVCache(8)]
    captures = read_pieces(cache, [10, 3])
    segment = encode_rows(cache, captures, TOKEN_IDS, 10, 13)
    loaded = load(publish(blobs, segment, 10, 13))

    with pytest.raises(DamagedBlobError, match="lacks rows of a window"):
        restore.restore([RotatingKVCache(8)], [loaded], 13)
