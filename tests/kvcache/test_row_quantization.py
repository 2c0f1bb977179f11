"""Rows in fewer bits come back nearly as they were, and nothing else is changed."""

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ArraysCache,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from promptcache import DamagedBlobError
from promptcache.kvcache import restore, snapshot
from promptcache.kvcache.encode import encode_checkpoint, encode_rows
from promptcache.kvcache.layout import describe, is_quantized
from promptcache.kvcache.row_quantization import QuantizedFormat
from promptcache.segments.types import EncodedSegment
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.published import TOKEN_IDS, Published, load, publish

# How many steps there are from the least value of a group to the largest.
STEPS_BY_BITS = {8: 255, 4: 15}
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def random_rows(
    num_rows: int, width: int = 64, dtype: mx.Dtype = mx.float32, seed: int = 1
) -> mx.array:
    """Return rows of two heads, some of whose columns stand out as those of keys do."""
    key = mx.random.key(seed)
    rows = mx.random.normal((1, 2, num_rows, width), key=key)
    return (rows + 8 * mx.random.normal((1, 2, 1, width), key=key)).astype(dtype)


def filled(
    layer: Any, num_rows: int = 40, width: int = 64, dtype: mx.Dtype = mx.float32
) -> Any:
    keys, values = (random_rows(num_rows, width, dtype, seed) for seed in (1, 2))
    layer.update_and_fetch(keys, values)
    return layer


def encode(cache: Sequence[Any], start: int, end: int, bits: int = 8) -> EncodedSegment:
    captures = [snapshot.capture(cache, 0, cache[0].offset)]
    return encode_rows(cache, captures, TOKEN_IDS, start, end, store_bits=bits)


def restored(
    blobs: BlobFolder, cache: Sequence[Any], fresh: list[Any], bits: int = 8
) -> list[Any]:
    end = cache[0].offset
    published = publish(blobs, encode(cache, 0, end, bits), 0, end)
    return restore.restore(fresh, [load(published)], end)


def row_nbytes(segment: EncodedSegment) -> int:
    return sum(t.data.nbytes for t in segment.tensors if t.name != "token_ids")


def assert_near(found: mx.array, expected: mx.array, bits: int) -> None:
    """Check that no value is off by more than a rounding of its group."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    exact = expected.astype(mx.float32)
    group_size = 64 if exact.shape[-1] % 64 == 0 else 32
    groups = exact.reshape(*exact.shape[:-1], -1, group_size)
    spread = groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)
    # Half a step, and as much again for scales of float16 and for bfloat16 itself.
    bound = spread / STEPS_BY_BITS[bits] + mx.abs(groups) / 256
    error = mx.abs(found.astype(mx.float32) - exact).reshape(groups.shape)
    assert mx.all(error <= bound).item()
    assert mx.any(error > 0).item()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_rows_come_back_within_a_rounding(
    blobs: BlobFolder, width: int, dtype: mx.Dtype, bits: int
) -> None:
    cache = [filled(KVCache(), width=width, dtype=dtype)]

    (layer,) = restored(blobs, cache, [KVCache()], bits)

    assert type(layer) is KVCache
    assert layer.offset == 40
    assert_near(layer.keys[..., :40, :], cache[0].keys[..., :40, :], bits)
    assert_near(layer.values[..., :40, :], cache[0].values[..., :40, :], bits)


@pytest.mark.parametrize(
    "make_layer",
    [
        KVCache,
        ConcatenateKVCache,
        lambda: RotatingKVCache(60),
        lambda: ChunkedKVCache(60),
    ],
    ids=["KVCache", "ConcatenateKVCache", "RotatingKVCache", "ChunkedKVCache"],
)
def test_every_class_that_keeps_rows_is_stored_in_fewer_bits(
    blobs: BlobFolder, make_layer: Any
) -> None:
    cache = [filled(make_layer())]

    (layer,) = restored(blobs, cache, [make_layer()])

    assert type(layer) is type(cache[0])
    assert_near(layer.keys[..., :40, :], cache[0].keys[..., :40, :], 8)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "most"), [(8, 0.54), (4, 0.29)])
def test_bits_are_those_on_disk(
    blobs: BlobFolder, bits: int, most: float, dtype: mx.Dtype
) -> None:
    cache = [filled(KVCache(), num_rows=90, dtype=dtype)]
    exact = encode_rows(cache, [snapshot.capture(cache, 0, 90)], TOKEN_IDS, 0, 90)

    small = encode(cache, 0, 90, bits)

    assert row_nbytes(exact) == 2 * 2 * 90 * 64 * 2
    assert row_nbytes(small) <= most * row_nbytes(exact)
    size = publish(blobs, small, 0, 90).path.stat().st_size
    assert size <= {8: 0.6, 4: 0.35}[bits] * row_nbytes(exact)


def test_scales_are_of_float16_for_bfloat16_too() -> None:
    segment = encode([filled(KVCache(), dtype=mx.bfloat16)], 0, 40)

    dtypes = {tensor.name: tensor.dtype for tensor in segment.tensors}
    assert dtypes == {
        "token_ids": "U32",
        **{
            f"layers.0.{tensor}.{piece}": dtype
            for tensor in ("keys", "values")
            for piece, dtype in (
                ("weight", "U32"),
                ("scales", "F16"),
                ("biases", "F16"),
            )
        },
    }


def test_segments_can_be_cut_at_any_token(blobs: BlobFolder) -> None:
    cache = [filled(KVCache(), num_rows=90)]
    whole = publish(blobs, encode(cache, 0, 90), 0, 90)
    expected = restore.restore([KVCache()], [load(whole)], 90)[0]
    parts = [
        publish(blobs, encode(cache, start, end), start, end)
        for start, end in ((0, 33), (33, 90))
    ]

    for stop in (1, 32, 33, 34, 77, 90):
        wanted = [part for part in parts if part.start < stop]
        segments = [load(part, min(part.end, stop)) for part in wanted]
        (layer,) = restore.restore([KVCache()], segments, 90)
        assert layer.offset == stop
        # Rows are quantized one by one, so that the cuts leave no trace.
        assert mx.array_equal(layer.keys[..., :stop, :], expected.keys[..., :stop, :])


def test_window_is_filled_with_the_rows_before_a_position(blobs: BlobFolder) -> None:
    cache = [filled(RotatingKVCache(20))]
    keys = random_rows(40)
    published = publish(blobs, encode(cache, 0, 40), 0, 40)

    (layer,) = restore.restore([RotatingKVCache(20)], [load(published, 33)], 40)

    assert layer.offset == 33
    assert_near(layer.keys, keys[..., 13:33, :], 8)


@pytest.mark.parametrize("width", [16, 40, 72])
def test_rows_of_an_odd_width_stay_as_they_are(blobs: BlobFolder, width: int) -> None:
    cache = [filled(KVCache(), width=width)]
    segment = encode(cache, 0, 40)

    (layer,) = restored(blobs, cache, [KVCache()])

    assert mx.array_equal(layer.keys[..., :40, :], cache[0].keys[..., :40, :])
    assert "layers.0.keys" in {tensor.name for tensor in segment.tensors}


def test_each_tensor_is_stored_by_its_own_width(blobs: BlobFolder) -> None:
    """Keys and values of some models differ in width, down to none at all."""
    layer = KVCache()
    keys = random_rows(40, 64)
    layer.update_and_fetch(keys, mx.zeros((1, 2, 40, 0)))

    (found,) = restored(blobs, [layer], [KVCache()])

    assert_near(found.keys[..., :40, :], keys, 8)
    assert found.values.shape[-1] == 0


def test_integers_stay_as_they_are(blobs: BlobFolder) -> None:
    layer = KVCache()
    keys = mx.arange(2 * 40 * 64).reshape(1, 2, 40, 64)
    layer.update_and_fetch(keys, -keys)

    (found,) = restored(blobs, [layer], [KVCache()])

    assert mx.array_equal(found.keys[..., :40, :], keys)
    assert found.keys.dtype == keys.dtype


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e6])
def test_values_that_scales_cannot_tell_stay_as_they_are(
    blobs: BlobFolder, value: float
) -> None:
    layer = KVCache()
    keys, values = random_rows(40), random_rows(40, seed=2)
    keys[0, 0, 7, 3] = value
    layer.update_and_fetch(keys, values)

    (found,) = restored(blobs, [layer], [KVCache()])

    assert mx.array_equal(found.keys[..., :40, :], keys, equal_nan=True)
    assert_near(found.values[..., :40, :], values, 8)


def test_quantized_parts_and_states_stay_as_they_are(blobs: BlobFolder) -> None:
    quantized, state = filled(QuantizedKVCache(32, 8)), ArraysCache(1)
    state[0] = random_rows(4)
    cache = [quantized, state]
    taken = snapshot.capture(cache, 0, 40)
    rows = encode_rows(cache, [taken], TOKEN_IDS, 0, 40, store_bits=4)
    parts = [
        publish(blobs, rows, 0, 40),
        publish(blobs, encode_checkpoint(taken), 40, 40),
    ]

    fresh = [QuantizedKVCache(32, 8), ArraysCache(1)]
    layer, other = restore.restore(fresh, [load(part) for part in parts], 40)

    for found, expected in zip(layer.keys, quantized.keys, strict=True):
        assert mx.array_equal(found[..., :40, :], expected[..., :40, :])
    assert mx.array_equal(other[0], state[0])


def test_restored_rows_have_room_for_the_rest(blobs: BlobFolder) -> None:
    published = publish(blobs, encode([filled(KVCache())], 0, 40), 0, 40)

    (layer,) = restore.restore([KVCache()], [load(published)], 700)

    assert layer.keys.shape[-2] == 768


def test_layout_is_told_in_words() -> None:
    cache = [filled(KVCache()), filled(KVCache()), filled(KVCache(), width=40)]

    layout = encode(cache, 0, 40, 4).layout

    assert describe(layout) == "2 × KVCache (stored in 4 bits), 1 × KVCache"
    # They are as they were computed once they are in memory.
    assert not is_quantized(layout)


# Damage


def with_formats(segment: EncodedSegment, formats: Any) -> EncodedSegment:
    layout = json.loads(segment.layout)
    layout["0"][5] = formats
    return segment._replace(layout=json.dumps(layout))


def published_with(blobs: BlobFolder, formats: Any) -> Published:
    segment = encode([filled(KVCache())], 0, 40)
    return publish(blobs, with_formats(segment, formats), 0, 40)


@pytest.mark.parametrize(
    "kept",
    [
        [77, 64, "float32"],
        [0, 64, "float32"],
        [-8, 64, "float32"],
        ["8", 64, "float32"],
        [8, 0, "float32"],
        [8, 63, "float32"],
        [8, 1 << 40, "float32"],
        [8, None, "float32"],
        [8, 64, "float77"],
        [8, 64, "array"],
        [8, 64, "__class__"],
        [8, 64, None],
        [8, 64, ["float32"]],
        [8, 64],
        [8, 64, "float32", 1],
        [],
        None,
        8,
        "abc",
        {},
    ],
    ids=str,
)
def test_format_that_is_never_written_is_damage(blobs: BlobFolder, kept: Any) -> None:
    published = published_with(blobs, {"keys": kept, "values": [8, 64, "float32"]})

    with pytest.raises(DamagedBlobError, match="layout cannot be read"):
        load(published)


@pytest.mark.parametrize("formats", [None, [], 5, "keys", [["keys", 8]]], ids=str)
def test_formats_of_no_tensors_are_damage(blobs: BlobFolder, formats: Any) -> None:
    with pytest.raises(DamagedBlobError, match="layout cannot be read"):
        load(published_with(blobs, formats))


@pytest.mark.parametrize(
    "kept", [[4, 64, "float32"], [8, 32, "float32"], [4, 32, "float16"]], ids=str
)
def test_format_that_is_not_that_of_the_tensors_is_damage(
    blobs: BlobFolder, kept: list[Any]
) -> None:
    published = published_with(blobs, {"keys": kept, "values": kept})

    with pytest.raises(DamagedBlobError):
        restore.restore([KVCache()], [load(published)], 40)


@pytest.mark.parametrize("formats", [{}, {"keys": [8, 64, "float32"]}], ids=str)
def test_tensors_that_the_layout_does_not_tell_are_damage(
    blobs: BlobFolder, formats: dict[str, Any]
) -> None:
    published = published_with(blobs, formats)

    with pytest.raises(DamagedBlobError, match="blob has no"):
        restore.restore([KVCache()], [load(published)], 40)


@pytest.mark.parametrize("missing", ["weight", "scales", "biases"])
def test_missing_piece_is_damage(blobs: BlobFolder, missing: str) -> None:
    segment = encode([filled(KVCache())], 0, 40)
    tensors = [t for t in segment.tensors if t.name != f"layers.0.keys.{missing}"]
    published = publish(blobs, segment._replace(tensors=tensors), 0, 40)

    with pytest.raises(DamagedBlobError, match="blob has no"):
        restore.restore([KVCache()], [load(published)], 40)


def test_format_is_what_a_blob_says() -> None:
    assert QuantizedFormat.of([8, 64, "float32"]) == QuantizedFormat(8, 64, "float32")
