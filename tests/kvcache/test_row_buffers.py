"""Rows are read to where they are used, and are those that were written."""

import os

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.kvcache import encode, restore, snapshot
from promptcache.kvcache.classes import parts_of
from promptcache.kvcache.loading import segment_loader
from promptcache.kvcache.loading.row_buffers import RowBuffers
from promptcache.segments.chain import pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import SegmentInfo, SegmentSlice
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.blobs import write_blob

TOKEN_IDS = list(range(300))
ROOM = 500
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def filled(num_tokens: int, dtype: mx.Dtype = mx.float32) -> list[KVCache]:
    """Return a cache of three layers with random rows."""
    cache = [KVCache() for _ in range(3)]
    for layer in cache:
        keys, values = mx.random.normal((2, 1, 2, num_tokens, 8)).astype(dtype)
        layer.update_and_fetch(keys, values)
    return cache


def save(blobs: BlobFolder, cache: list[KVCache], start: int, end: int) -> str:
    captures = [snapshot.capture(cache, 0, cache[0].offset)]
    segment = encode.encode_rows(cache, captures, TOKEN_IDS, start, end)
    fingerprint = Fingerprint("0" * 32, "tiny")
    key = f"{start:016x}{end:016x}"
    write_blob(
        blobs, SegmentInfo(key, "0" * 32, fingerprint, start, end, True, 1.0), segment
    )
    return key


def load(
    blobs: BlobFolder, key: str, part: tuple[int, int, int], destination: RowBuffers
) -> segment_loader.LoadedSegment:
    start, stop, end = part
    ids = pack(TOKEN_IDS[start:stop])
    taken = SegmentSlice(key, start, stop, end)
    return segment_loader.load(
        blobs.path(key), blobs.read_header(key), taken, ids, destination
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stops", [(100, 250), (100, 300), (70, 300), (1, 101)])
def test_rows_of_segments_come_back_to_the_bit(
    blobs: BlobFolder, dtype: mx.Dtype, stops: tuple[int, int]
) -> None:
    live = filled(300, dtype)
    first, last = stops
    keys = save(blobs, live, 0, 100), save(blobs, live, first, 300)
    fresh = [KVCache() for _ in range(3)]

    with RowBuffers(dict(parts_of(fresh)), ROOM) as destination:
        segments = [
            load(blobs, keys[0], (0, first, 100), destination),
            load(blobs, keys[1], (first, last, 300), destination),
        ]
        restored = restore.restore(fresh, segments, ROOM)

    for layer, other in zip(live, restored, strict=True):
        assert other.offset == last
        assert other.keys.shape == (1, 2, ROOM, 8)
        for name in ("keys", "values"):
            rows, found = (
                getattr(each, name)[..., :last, :] for each in (layer, other)
            )
            assert found.dtype == dtype
            assert mx.array_equal(rows, found)


def address(array: mx.array) -> int:
    return int(np.asarray(array).ctypes.data)


def test_cache_goes_on_in_the_memory_that_was_read_to(blobs: BlobFolder) -> None:
    key = save(blobs, filled(300), 0, 300)
    fresh = [KVCache() for _ in range(3)]
    with RowBuffers(dict(parts_of(fresh)), ROOM) as destination:
        loaded = load(blobs, key, (0, 300, 300), destination)
        restored = restore.restore(fresh, [loaded], ROOM)
    del loaded
    before = [address(layer.keys) for layer in restored]

    for layer in restored:
        layer.update_and_fetch(mx.ones((1, 2, 1, 8)), mx.ones((1, 2, 1, 8)))
        mx.eval(layer.keys, layer.values)

    assert [address(layer.keys) for layer in restored] == before


def test_parts_of_another_kind_are_read_as_before(blobs: BlobFolder) -> None:
    cache = [KVCache(), RotatingKVCache(512)]
    for layer in cache:
        layer.update_and_fetch(*mx.random.normal((2, 1, 2, 40, 8)))
    captures = [snapshot.capture(cache, 0, 40)]
    segment = encode.encode_rows(cache, captures, TOKEN_IDS, 0, 40)
    info = SegmentInfo(
        "ab" * 16, "0" * 32, Fingerprint("0" * 32, "t"), 0, 40, True, 1.0
    )
    write_blob(blobs, info, segment)
    fresh = [KVCache(), RotatingKVCache(512)]

    with RowBuffers(dict(parts_of(fresh)), ROOM) as destination:
        loaded = load(blobs, info.key, (0, 40, 40), destination)
        restored = restore.restore(fresh, [loaded], ROOM)

    assert loaded.taken == {"layers.0.keys", "layers.0.values"}
    for layer, other in zip(cache, restored, strict=True):
        assert mx.array_equal(layer.keys[..., :40, :], other.keys[..., :40, :])


def test_changed_byte_is_seen(blobs: BlobFolder) -> None:
    key = save(blobs, filled(300), 0, 300)
    content = bytearray(blobs.path(key).read_bytes())
    content[-5] ^= 1
    blobs.path(key).write_bytes(content)

    with (
        RowBuffers({"0": KVCache(), "1": KVCache(), "2": KVCache()}, ROOM) as place,
        pytest.raises(DamagedBlobError, match="checksum"),
    ):
        load(blobs, key, (0, 20, 300), place)


def test_blob_that_ends_early_is_damaged(blobs: BlobFolder) -> None:
    key = save(blobs, filled(300), 0, 300)
    header = blobs.read_header(key)
    os.truncate(blobs.path(key), header.data_start + 4000)
    part = SegmentSlice(key, 0, 300, 300)

    with (
        RowBuffers({"0": KVCache(), "1": KVCache(), "2": KVCache()}, ROOM) as place,
        pytest.raises((DamagedBlobError, StoreError)),
    ):
        segment_loader.load(blobs.path(key), header, part, pack(TOKEN_IDS), place)


def test_rows_of_another_shape_are_not_taken(blobs: BlobFolder) -> None:
    small, large = [KVCache()], [KVCache()]
    small[0].update_and_fetch(*mx.random.normal((2, 1, 2, 40, 8)))
    large[0].update_and_fetch(*mx.random.normal((2, 1, 2, 40, 16)))
    keys = save(blobs, small, 0, 20), save(blobs, large, 20, 40)

    with RowBuffers({"0": KVCache()}, ROOM) as destination:
        one = load(blobs, keys[0], (0, 20, 20), destination)
        other = load(blobs, keys[1], (20, 40, 40), destination)

    assert one.taken == {"layers.0.keys", "layers.0.values"}
    assert other.taken == set()
