"""What the codec hands over comes back to the bit, and nothing else does."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import load as load_model

from promptcache import DamagedBlobError, StoreError
from promptcache.kvcache import restore, snapshot
from promptcache.kvcache.encode import encode_checkpoint, encode_rows
from promptcache.kvcache.layout import describe
from promptcache.kvcache.loading import segment_loader
from promptcache.segments import dtypes
from promptcache.segments.types import (
    AT_ANY_TOKEN,
    EncodedSegment,
    ResumeRules,
)
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers import tiny
from tests.helpers.published import TOKEN_IDS, Published, load, publish

NUM_HEADS = 2
HEAD_DIM = 64
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


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


# Round trip


@pytest.mark.parametrize(("make_layer", "dtype"), LAYERS)
def test_layer_comes_back_to_the_bit(
    blobs: BlobFolder, make_layer: Any, dtype: mx.Dtype
) -> None:
    cache = [filled(make_layer(), 70, dtype)]
    segment = encode(cache, 0, 70)

    fresh = [ConcatenateKVCache() if "Concat" in str(make_layer) else KVCache()]
    fresh[:] = restore.restore(fresh, [load(publish(blobs, segment, 0, 70))], 80)

    assert_same_rows(fresh[0], cache[0])


@pytest.mark.parametrize(("make_layer", "dtype"), LAYERS)
def test_layer_comes_back_from_several_segments_the_last_in_part(
    blobs: BlobFolder, make_layer: Any, dtype: mx.Dtype
) -> None:
    cache = [filled(make_layer(), 90, dtype), filled(make_layer(), 90, dtype)]
    plan = [(0, 1), (1, 40), (40, 90)]
    published = [publish(blobs, encode(cache, *c), *c) for c in plan]

    is_concatenate = isinstance(cache[0], ConcatenateKVCache)
    fresh = [ConcatenateKVCache() if is_concatenate else KVCache() for _ in cache]
    parts = [load(published[0]), load(published[1]), load(published[2], stop=63)]
    fresh[:] = restore.restore(fresh, parts, 63)

    for layer in cache:
        layer.trim(90 - 63)
    assert_same_rows(fresh[0], cache[0])
    assert_same_rows(fresh[1], cache[1])


def test_parameters_of_quantization_come_back(blobs: BlobFolder) -> None:
    cache = [filled(QuantizedKVCache(32, 4), 10)]
    published = publish(blobs, encode(cache, 0, 10), 0, 10)

    fresh = [KVCache()]
    fresh[:] = restore.restore(fresh, [load(published)], 10)

    assert (fresh[0].group_size, fresh[0].bits) == (32, 4)


def test_bfloat16_stays_two_bytes() -> None:
    segment = encode([filled(KVCache(), 10, mx.bfloat16)], 0, 10)

    keys = next(t for t in segment.tensors if t.name == "layers.0.keys")
    assert keys.dtype == "BF16"
    assert keys.data.nbytes == 10 * NUM_HEADS * HEAD_DIM * 2


def test_blob_holds_exactly_the_rows_of_its_range(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 100)], 30, 47)

    published = publish(blobs, segment, 30, 47)

    arrays = mx.load(str(published.path))
    assert isinstance(arrays, dict)
    assert arrays["token_ids"].tolist() == TOKEN_IDS[30:47]
    assert mx.array_equal(arrays["layers.0.keys"], rows(17, first=30))
    assert mx.array_equal(arrays["layers.0.values"], -rows(17, first=30))


def test_encoding_leaves_the_cache_as_it_is() -> None:
    layer = filled(KVCache(), 50)
    before, offset, capacity = mx.array(layer.keys), layer.offset, layer.keys.shape

    encode([layer], 10, 40)

    assert layer.offset == offset
    assert layer.keys.shape == capacity
    assert mx.array_equal(layer.keys, before)


def test_float_segment_followed_by_a_quantized_one_becomes_quantized(
    blobs: BlobFolder,
) -> None:
    plain = filled(KVCache(), 90)
    quantized = filled(KVCache(), 90).to_quantized(group_size=32, bits=8)
    first = publish(blobs, encode([plain], 0, 50), 0, 50)
    second = publish(blobs, encode([quantized], 50, 90), 50, 90)

    fresh = [KVCache()]
    fresh[:] = restore.restore(fresh, [load(first), load(second)], 90)

    assert_same_rows(fresh[0], quantized)


# What must not reach the disk


@pytest.mark.parametrize("make_layer", [KVCache, ConcatenateKVCache])
def test_trimmed_rows_and_padding_never_reach_the_bytes(make_layer: Any) -> None:
    layer = make_layer()
    secret = mx.full((1, NUM_HEADS, 20, HEAD_DIM), 12345.0)
    layer.update_and_fetch(rows(30), rows(30))
    layer.update_and_fetch(secret, secret)
    layer.trim(20)

    segment = encode([layer], 0, 30)

    written = b"".join(bytes(tensor.data) for tensor in segment.tensors)
    assert bytes(memoryview(mx.array([12345.0]))) not in written
    assert len(written) == 30 * 4 + 2 * 30 * NUM_HEADS * HEAD_DIM * 4


def test_a_range_that_the_cache_does_not_hold_cannot_be_encoded() -> None:
    cache = [filled(KVCache(), 31)]
    captures = [snapshot.capture(cache, 0, 31)]
    cache[0].trim(1)

    with pytest.raises(AssertionError, match=r"\[0, 30\)"):
        encode_rows(cache, captures, TOKEN_IDS, 0, 31)


# Classes


def forged(segment: EncodedSegment, *part: Any) -> EncodedSegment:
    """Return a segment whose only part claims to be another one."""
    return segment._replace(layout=json.dumps({"0": part}))


@pytest.mark.parametrize("name", ["RotatingKVCache", "os.system", "", "kvcache", None])
def test_class_of_a_blob_that_is_not_the_model_s_is_damage(
    blobs: BlobFolder, name: str | None
) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    loaded = load(publish(blobs, forged(segment, name, "rows", None, None), 0, 10))

    with pytest.raises(DamagedBlobError, match=f"holds a {name!r} in place of a KVCac"):
        restore.restore([KVCache()], [loaded], 10)


def test_layout_is_told_in_words() -> None:
    cache = [KVCache(), KVCache(), QuantizedKVCache(32, 8)]
    for layer in cache:
        filled(layer, 4)

    layout = encode(cache, 0, 4).layout

    assert describe(layout) == "2 × KVCache, 1 × QuantizedKVCache (8 bits)"


# Windows


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


def cut_at(
    published: Sequence[Published], position: int
) -> list[segment_loader.LoadedSegment]:
    """Load the segments before a position, the last one up to it."""
    return [
        load(part, min(part.end, position))
        for part in published
        if part.start < position
    ]


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


# Checkpoints


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


# Layouts that do not fit

UNREADABLE = [
    "",
    "{garbage",
    "[]",
    "5",
    "null",
    '{"0": 5}',
    '{"0": null}',
    '{"0": []}',
    '{"0": ["KVCache"]}',
    '{"0": ["KVCache", "os.system", null, null, null]}',
    '{"0": ["KVCache", "rows", null, null, null, null]}',
]


@pytest.mark.parametrize("layout", UNREADABLE)
def test_layout_that_cannot_be_read_is_damage(blobs: BlobFolder, layout: str) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    published = publish(blobs, segment._replace(layout=layout), 0, 4)

    with pytest.raises(DamagedBlobError, match="layout cannot be read"):
        load(published)


MISFITS: dict[str, tuple[Any, ...]] = {
    "a quantized part without its tensors": ("QuantizedKVCache", "rows", 32, 8),
    "a window of rows": ("RotatingKVCache", "window", None, None),
    "rows of a window": ("KVCache", "window", None, None),
    "a state": ("KVCache", "checkpoint", None, None, None),
    "the state of another class": (
        "KVCache",
        "checkpoint",
        None,
        None,
        {"object": "ArraysCache", "attributes": {}},
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_layout_that_does_not_fit_the_cache_is_damage(
    blobs: BlobFolder, name: str
) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    published = publish(blobs, forged(segment, *MISFITS[name]), 0, 10)

    with pytest.raises(DamagedBlobError):
        restore.restore([KVCache()], [load(published)], 10)


@pytest.mark.parametrize(
    ("group_size", "bits"), [(None, 8), (32, None), (None, None)], ids=str
)
def test_quantized_part_without_its_parameters_is_damage(
    blobs: BlobFolder, group_size: int | None, bits: int | None
) -> None:
    segment = encode([filled(QuantizedKVCache(32, 8), 10)], 0, 10)
    part = ("QuantizedKVCache", "rows", group_size, bits)
    published = publish(blobs, forged(segment, *part), 0, 10)

    with pytest.raises(DamagedBlobError):
        restore.restore([KVCache()], [load(published)], 10)


@pytest.mark.parametrize("names", [["1"], ["0", "1"], ["0.0"], []], ids=str)
def test_layout_of_other_parts_is_damage(blobs: BlobFolder, names: list[str]) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    layout = json.dumps({name: ["KVCache", "rows", None, None] for name in names})
    published = publish(blobs, segment._replace(layout=layout), 0, 10)

    with pytest.raises(DamagedBlobError, match="number of layers"):
        restore.restore([KVCache()], [load(published)], 10)


# Damage


def flip_byte(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_other_tokens_are_damage(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    published = publish(blobs, segment, 0, 10)

    others = [*TOKEN_IDS[:9], 7]

    with pytest.raises(DamagedBlobError, match="other tokens"):
        load(published, token_ids=others)


def test_other_tokens_behind_the_slice_do_not_matter(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 10)], 0, 10)
    published = publish(blobs, segment, 0, 10)

    loaded = load(published, stop=9, token_ids=[*TOKEN_IDS[:9], 7])

    assert [rows.shape[-2] for rows in loaded.rows("0", 0, 10)] == [9, 9]


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_of_the_data_is_damage(blobs: BlobFolder, where: str) -> None:
    segment = encode([filled(KVCache(), 64)], 0, 64)
    published = publish(blobs, segment, 0, 64)
    start, size = published.header.data_start, published.path.stat().st_size
    position = {"first": start, "middle": (start + size) // 2, "last": size - 1}

    flip_byte(published.path, position[where])

    with pytest.raises(DamagedBlobError, match="checksum"):
        load(published)


def test_damage_behind_the_slice_is_damage_too(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 64)], 0, 64)
    published = publish(blobs, segment, 0, 64)

    flip_byte(published.path, published.path.stat().st_size - 1)

    with pytest.raises(DamagedBlobError):
        load(published, stop=3)


def test_truncated_blob_is_a_store_error(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 64)], 0, 64)
    published = publish(blobs, segment, 0, 64)

    os.truncate(published.path, published.path.stat().st_size - 1)

    with pytest.raises(StoreError, match="cannot be read"):
        load(published)


def test_missing_blob_is_a_store_error(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    published = publish(blobs, segment, 0, 4)

    published.path.unlink()

    with pytest.raises(StoreError, match="cannot be read"):
        load(published)


def test_another_number_of_layers_is_damage(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    loaded = load(publish(blobs, segment, 0, 4))

    with pytest.raises(DamagedBlobError, match="number of layers"):
        restore.restore([KVCache(), KVCache()], [loaded], 4)


def test_checksum_of_the_header_decides_what_is_compared(blobs: BlobFolder) -> None:
    segment = encode([filled(KVCache(), 4)], 0, 4)
    published = publish(blobs, segment, 0, 4)
    other = published._replace(header=replace(published.header, data_checksum="0" * 32))

    with pytest.raises(DamagedBlobError, match="checksum"):
        load(other)


# Room


@pytest.mark.parametrize("room", [71, 256, 257, 600])
@pytest.mark.parametrize("bits", [None, 8])
def test_suffix_up_to_the_room_needs_no_allocation(
    blobs: BlobFolder, room: int, bits: int | None
) -> None:
    layer = KVCache() if bits is None else QuantizedKVCache(32, bits)
    segment = encode([filled(layer, 70)], 0, 70)
    fresh: list[Any] = [KVCache()]
    fresh[:] = restore.restore(fresh, [load(publish(blobs, segment, 0, 70))], room)
    before = capacity(fresh[0])

    suffix = rows(room - 70)
    fresh[0].update_and_fetch(suffix, suffix)

    assert fresh[0].offset == room
    assert capacity(fresh[0]) == before
    assert before < room + 256


def capacity(layer: Any) -> int:
    keys = layer.keys[0] if isinstance(layer, QuantizedKVCache) else layer.keys
    return int(keys.shape[-2])


# A real model


VARIANTS = {
    "llama": tiny.LLAMA,
    "qwen3": {**tiny.LLAMA, "model_type": "qwen3"},
}


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_restored_cache_gives_the_logits_of_the_live_one_to_the_bit(
    tmp_path: Path, blobs: BlobFolder, dtype: str, variant: str, bits: int | None
) -> None:
    model = load_model(str(tiny.save_model(tmp_path / "model", VARIANTS[variant])))[0]
    model.set_dtype(getattr(mx, dtype))
    token_ids = [(7 * i + i * i) % 256 for i in range(100)]
    live = make_prompt_cache(model)
    model(mx.array(token_ids[:60])[None], cache=live)
    if bits:
        live[:] = [layer.to_quantized(32, bits) for layer in live]
    model(mx.array(token_ids[60:90])[None], cache=live)
    plan = [(0, 33), (33, 90)]

    restored = make_prompt_cache(model)
    parts = [publish(blobs, encode(live, *c, token_ids), *c) for c in plan]
    restored[:] = restore.restore(
        restored, [load(p, token_ids=token_ids) for p in parts], 100
    )

    suffix = mx.array(token_ids[90:])[None]
    expected = model(suffix, cache=live)
    assert mx.array_equal(model(suffix, cache=restored), expected)
    next_token = mx.array([[5]])
    expected = model(next_token, cache=live)
    assert mx.array_equal(model(next_token, cache=restored), expected)
