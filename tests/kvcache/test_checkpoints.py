"""States come back from checkpoints to the bit, beside the rows."""

import json
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
)

from promptcache import DamagedBlobError
from promptcache.kvcache import restore, snapshot
from promptcache.kvcache.encode import encode_checkpoint, encode_rows
from promptcache.segments import dtypes
from promptcache.segments.types import ResumeRules
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.layers import (
    assert_goes_on_alike,
    assert_same_rows,
    read,
    read_pieces,
)
from tests.helpers.published import TOKEN_IDS, load, publish


class OwnCache:
    """A cache class as a model may have one, with rows that it compresses."""

    def __init__(self) -> None:
        self.offset = 0
        self.rows: mx.array | None = None
        self.pending: tuple[Any, ...] = ()

    def empty(self) -> bool:
        return self.rows is None


def mixed_cache() -> list[Any]:
    """Return a fresh cache with parts of every kind."""
    return [
        KVCache(),
        CacheList(ArraysCache(3), CacheList(KVCache(), RotatingKVCache(8))),
        RotatingKVCache(8, keep=4),
        OwnCache(),
        KVCache(),
    ]


def read_mixed(*pieces: int) -> tuple[list[Any], list[snapshot.Snapshot]]:
    """Return such a cache that has read pieces, the last part unused."""
    cache = mixed_cache()
    arrays, inner = cache[1].caches
    arrays[0], arrays[2] = mx.arange(5), mx.full((1, 2, 3), 0.1, mx.bfloat16)
    cache[3].offset = sum(pieces) // 4
    cache[3].rows = mx.arange(6).reshape(2, 3)
    cache[3].pending = (mx.zeros((0, 4)), None)
    captures, start = [], 0
    for num_tokens in pieces:
        end = start + num_tokens
        for layer in (cache[0], *inner.caches, cache[2]):
            read(layer, start, end)
        captures.append(snapshot.capture(cache, start, end))
        start = end
    return cache, captures


@pytest.mark.parametrize(
    "pieces",
    [[5], [8], [9], [30], [4, 1], [7, 1], [8, 1], [20, 1, 1, 1], [1] * 13, [9, 1, 3]],
    ids=str,
)
def test_cache_of_every_treatment_comes_back_from_rows_and_a_checkpoint(
    blobs: BlobFolder, pieces: list[int]
) -> None:
    cache, captures = read_mixed(*pieces)
    num_tokens = sum(pieces)
    plan = [(0, 3), (3, num_tokens)]
    parts = [
        publish(blobs, encode_rows(cache, captures, TOKEN_IDS, *c), *c) for c in plan
    ]
    checkpoint = encode_checkpoint(captures[-1])
    parts.append(publish(blobs, checkpoint, num_tokens, num_tokens))

    restored = restore.restore(mixed_cache(), [load(part) for part in parts], 40)

    arrays, inner = restored[1].caches
    assert_same_rows(restored[0], cache[0])
    assert_same_rows(inner.caches[0], cache[1].caches[1].caches[0])
    assert_goes_on_alike(
        inner.caches[1], cache[1].caches[1].caches[1], num_tokens, [1, 3], mx.float32
    )
    assert_goes_on_alike(restored[2], cache[2], num_tokens, [1, 1, 3], mx.float32)
    assert arrays[1] is None
    assert arrays[0].tolist() == [0, 1, 2, 3, 4]
    assert mx.array_equal(arrays[2], cache[1].caches[0][2])
    assert arrays[2].dtype == mx.bfloat16
    assert restored[3].offset == num_tokens // 4
    assert restored[3].rows.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [v if v is None else v.shape for v in restored[3].pending] == [(0, 4), None]
    assert restored[4].empty()


def test_rows_and_a_checkpoint_have_no_tensor_in_common() -> None:
    cache, [taken] = read_mixed(30)

    segment = encode_rows(cache, [taken], TOKEN_IDS, 0, 30)
    checkpoint = encode_checkpoint(taken)

    names = {tensor.name for tensor in segment.tensors} - {"token_ids"}
    of_rows = {f"layers.{part}" for part in ("0", "1.1.0", "1.1.1")}
    of_states = {f"layers.{part}.state" for part in ("1.0", "2", "3")}
    assert names == {f"{p}.{t}" for p in of_rows for t in ("keys", "values")}
    for tensor in checkpoint.tensors:
        in_state = any(tensor.name.startswith(f"{part}.") for part in of_states)
        assert in_state or tensor == checkpoint.tensors[0]
    assert checkpoint.tensors[0].shape == (0,)
    assert json.loads(segment.layout)["2"][-1] is None


# mlx reads no float64 from a file.
@pytest.mark.parametrize("name", sorted(dtypes.DTYPE_NAMES.keys() - {"float64"}))
def test_state_of_every_dtype_comes_back_to_the_bit(
    blobs: BlobFolder, name: str
) -> None:
    dtype = mx.bool_ if name == "bool" else getattr(mx, name)
    cache = [ArraysCache(2)]
    cache[0][0] = mx.array([0, 1, 2, 100], dtype=dtype)
    cache[0][1] = mx.zeros((2, 0, 3), dtype=dtype)
    taken = snapshot.capture(cache, 0, 4)
    rows_ = publish(blobs, encode_rows(cache, [taken], TOKEN_IDS, 0, 4), 0, 4)
    state = publish(blobs, encode_checkpoint(taken), 4, 4)

    restored = restore.restore([ArraysCache(2)], [load(rows_), load(state)], 4)

    for i in range(2):
        assert restored[0][i].dtype == dtype
        assert restored[0][i].shape == cache[0][i].shape
        assert mx.array_equal(restored[0][i], cache[0][i])


def test_capture_keeps_its_state_when_the_cache_reads_on(blobs: BlobFolder) -> None:
    cache = [RotatingKVCache(8, keep=4)]
    captures = read_pieces(cache, [10, 1])
    wanted = RotatingKVCache(8, keep=4)
    read(wanted, 0, 10)
    read(wanted, 10, 11)
    for position in range(11, 20):
        read(cache[0], position, position + 1)

    parts = [
        publish(blobs, encode_rows(cache, captures, TOKEN_IDS, 0, 11), 0, 11),
        publish(blobs, encode_checkpoint(captures[1]), 11, 11),
    ]
    restored = restore.restore(
        [RotatingKVCache(8, keep=4)], [load(part) for part in parts], 11
    )

    assert_goes_on_alike(restored[0], wanted, 11, [1, 1, 4], mx.float32)


@pytest.mark.parametrize(
    ("cache", "needs_checkpoint"),
    [
        ([KVCache()], False),
        ([RotatingKVCache(8), ChunkedKVCache(8)], False),
        ([KVCache(), RotatingKVCache(8, keep=4)], True),
    ],
)
def test_rows_tell_whether_they_are_enough(
    cache: list[Any], needs_checkpoint: bool
) -> None:
    captures = read_pieces(cache, [10])

    segment = encode_rows(cache, captures, TOKEN_IDS, 0, 10)

    assert segment.resumption == ResumeRules(needs_checkpoint=needs_checkpoint)
    assert captures[0].needs_checkpoint is needs_checkpoint


def test_rows_without_the_state_they_need_are_damage(blobs: BlobFolder) -> None:
    cache, [taken] = read_mixed(9)
    segment = encode_rows(cache, [taken], TOKEN_IDS, 0, 9)
    loaded = load(publish(blobs, segment, 0, 9))

    with pytest.raises(DamagedBlobError, match="lacks the state"):
        restore.restore(mixed_cache(), [loaded], 9)


def test_checkpoint_of_other_attributes_is_damage(blobs: BlobFolder) -> None:
    cache, [taken] = read_mixed(9)
    segment = encode_rows(cache, [taken], TOKEN_IDS, 0, 9)
    checkpoint = encode_checkpoint(taken)
    forged = checkpoint._replace(layout=checkpoint.layout.replace("pending", "evil"))
    parts = [publish(blobs, segment, 0, 9), publish(blobs, forged, 9, 9)]

    with pytest.raises(DamagedBlobError, match="attributes that the class does not"):
        restore.restore(mixed_cache(), [load(part) for part in parts], 9)
