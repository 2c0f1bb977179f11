"""What the codec hands over comes back to the bit, and nothing else does."""

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import pytest
import tiny
from mlx_lm.models.cache import (
    ArraysCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import load as load_model

from promptcache import DamagedBlobError, StoreError, UnsupportedCacheError, codec
from promptcache.blobs import BlobFolder
from promptcache.chain import pack
from promptcache.types import (
    BlobHeader,
    EncodedSegment,
    Fingerprint,
    SegmentInfo,
    SegmentSlice,
)

NUM_HEADS = 2
HEAD_DIM = 64
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
TOKEN_IDS = list(range(1000, 1100))


class Published(NamedTuple):
    """A blob on disk."""

    path: Path
    header: BlobHeader
    start: int
    end: int


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


def publish(
    blobs: BlobFolder, segment: EncodedSegment, start: int, end: int
) -> Published:
    info = SegmentInfo(
        key=f"{start:016x}{end:016x}",
        parent_key=None,
        fingerprint=Fingerprint("0" * 32, "tiny"),
        start=start,
        end=end,
        is_prefix=True,
        created_at=1.0,
    )
    blobs.publish(info, segment)
    return Published(blobs.path(info.key), blobs.read_header(info.key), start, end)


def load(
    published: Published, stop: int | None = None, token_ids: Sequence[int] = TOKEN_IDS
) -> codec.LoadedSegment:
    stop = published.end if stop is None else stop
    key = published.header.info.key
    part = SegmentSlice(key, published.start, stop, published.end)
    expected = pack(token_ids[published.start : stop])
    return codec.load(published.path, published.header, part, expected)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobFolder:
    folder = BlobFolder(tmp_path / "blobs")
    folder.create()
    return folder


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
    segment = codec.encode(cache, TOKEN_IDS, 0, 70)

    fresh = [ConcatenateKVCache() if "Concat" in str(make_layer) else KVCache()]
    fresh[:] = codec.restore(fresh, [load(publish(blobs, segment, 0, 70))], 80)

    assert_same_rows(fresh[0], cache[0])


@pytest.mark.parametrize(("make_layer", "dtype"), LAYERS)
def test_layer_comes_back_from_several_segments_the_last_in_part(
    blobs: BlobFolder, make_layer: Any, dtype: mx.Dtype
) -> None:
    cache = [filled(make_layer(), 90, dtype), filled(make_layer(), 90, dtype)]
    cuts = [(0, 1), (1, 40), (40, 90)]
    published = [publish(blobs, codec.encode(cache, TOKEN_IDS, *c), *c) for c in cuts]

    is_concatenate = isinstance(cache[0], ConcatenateKVCache)
    fresh = [ConcatenateKVCache() if is_concatenate else KVCache() for _ in cache]
    parts = [load(published[0]), load(published[1]), load(published[2], stop=63)]
    fresh[:] = codec.restore(fresh, parts, 63)

    for layer in cache:
        layer.trim(90 - 63)
    assert_same_rows(fresh[0], cache[0])
    assert_same_rows(fresh[1], cache[1])


def test_parameters_of_quantization_come_back(blobs: BlobFolder) -> None:
    cache = [filled(QuantizedKVCache(32, 4), 10)]
    published = publish(blobs, codec.encode(cache, TOKEN_IDS, 0, 10), 0, 10)

    fresh = [KVCache()]
    fresh[:] = codec.restore(fresh, [load(published)], 10)

    assert (fresh[0].group_size, fresh[0].bits) == (32, 4)


def test_bfloat16_stays_two_bytes() -> None:
    segment = codec.encode([filled(KVCache(), 10, mx.bfloat16)], TOKEN_IDS, 0, 10)

    keys = next(t for t in segment.tensors if t.name == "layers.0.keys")
    assert keys.dtype == "BF16"
    assert keys.data.nbytes == 10 * NUM_HEADS * HEAD_DIM * 2


def test_blob_holds_exactly_the_rows_of_its_range(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 100)], TOKEN_IDS, 30, 47)

    published = publish(blobs, segment, 30, 47)

    arrays = mx.load(str(published.path))
    assert isinstance(arrays, dict)
    assert arrays["token_ids"].tolist() == TOKEN_IDS[30:47]
    assert mx.array_equal(arrays["layers.0.keys"], rows(17, first=30))
    assert mx.array_equal(arrays["layers.0.values"], -rows(17, first=30))


def test_encoding_leaves_the_cache_as_it_is() -> None:
    layer = filled(KVCache(), 50)
    before, offset, capacity = mx.array(layer.keys), layer.offset, layer.keys.shape

    codec.encode([layer], TOKEN_IDS, 10, 40)

    assert layer.offset == offset
    assert layer.keys.shape == capacity
    assert mx.array_equal(layer.keys, before)


def test_float_segment_followed_by_a_quantized_one_becomes_quantized(
    blobs: BlobFolder,
) -> None:
    plain = filled(KVCache(), 90)
    quantized = filled(KVCache(), 90).to_quantized(group_size=32, bits=8)
    first = publish(blobs, codec.encode([plain], TOKEN_IDS, 0, 50), 0, 50)
    second = publish(blobs, codec.encode([quantized], TOKEN_IDS, 50, 90), 50, 90)

    fresh = [KVCache()]
    fresh[:] = codec.restore(fresh, [load(first), load(second)], 90)

    assert_same_rows(fresh[0], quantized)


# What must not reach the disk


@pytest.mark.parametrize("make_layer", [KVCache, ConcatenateKVCache])
def test_trimmed_rows_and_padding_never_reach_the_bytes(make_layer: Any) -> None:
    layer = make_layer()
    secret = mx.full((1, NUM_HEADS, 20, HEAD_DIM), 12345.0)
    layer.update_and_fetch(rows(30), rows(30))
    layer.update_and_fetch(secret, secret)
    layer.trim(20)

    segment = codec.encode([layer], TOKEN_IDS, 0, 30)

    written = b"".join(bytes(tensor.data) for tensor in segment.tensors)
    assert bytes(memoryview(mx.array([12345.0]))) not in written
    assert len(written) == 30 * 4 + 2 * 30 * NUM_HEADS * HEAD_DIM * 4


def test_a_range_that_the_cache_does_not_hold_cannot_be_encoded() -> None:
    with pytest.raises(AssertionError, match=r"\[0, 30\)"):
        codec.encode([filled(KVCache(), 30)], TOKEN_IDS, 0, 31)


# Classes


@pytest.mark.parametrize(
    "layer", [RotatingKVCache(max_size=32), ArraysCache(2)], ids=lambda v: str(type(v))
)
def test_unknown_class_is_refused_by_name(layer: Any) -> None:
    with pytest.raises(UnsupportedCacheError, match=type(layer).__name__):
        codec.check_supported([KVCache(), layer])

    with pytest.raises(UnsupportedCacheError, match=type(layer).__name__):
        codec.encode([KVCache(), layer], TOKEN_IDS, 0, 0)


@pytest.mark.parametrize("name", ["RotatingKVCache", "os.system", "", "kvcache"])
def test_class_name_of_a_blob_that_is_not_allowed_is_damage(
    blobs: BlobFolder, name: str
) -> None:
    segment = codec.encode([filled(KVCache(), 10)], TOKEN_IDS, 0, 10)
    forged = segment._replace(layout=json.dumps([[name, None, None]]))
    published = publish(blobs, forged, 0, 10)

    with pytest.raises(DamagedBlobError, match="class"):
        load(published)


def test_layout_is_told_in_words() -> None:
    cache = [KVCache(), KVCache(), QuantizedKVCache(32, 8)]
    for layer in cache:
        filled(layer, 4)

    layout = codec.encode(cache, TOKEN_IDS, 0, 4).layout

    assert codec.describe(layout) == "2 × KVCache, 1 × QuantizedKVCache (8 bits)"


# Damage


def flip_byte(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def test_other_tokens_are_damage(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 10)], TOKEN_IDS, 0, 10)
    published = publish(blobs, segment, 0, 10)

    others = [*TOKEN_IDS[:9], 7]

    with pytest.raises(DamagedBlobError, match="other tokens"):
        load(published, token_ids=others)


def test_other_tokens_behind_the_slice_do_not_matter(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 10)], TOKEN_IDS, 0, 10)
    published = publish(blobs, segment, 0, 10)

    loaded = load(published, stop=9, token_ids=[*TOKEN_IDS[:9], 7])

    assert loaded.rows[0][0].shape[-2] == 9


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_of_the_data_is_damage(blobs: BlobFolder, where: str) -> None:
    segment = codec.encode([filled(KVCache(), 64)], TOKEN_IDS, 0, 64)
    published = publish(blobs, segment, 0, 64)
    start, size = published.header.data_start, published.path.stat().st_size
    position = {"first": start, "middle": (start + size) // 2, "last": size - 1}

    flip_byte(published.path, position[where])

    with pytest.raises(DamagedBlobError, match="checksum"):
        load(published)


def test_damage_behind_the_slice_is_damage_too(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 64)], TOKEN_IDS, 0, 64)
    published = publish(blobs, segment, 0, 64)

    flip_byte(published.path, published.path.stat().st_size - 1)

    with pytest.raises(DamagedBlobError):
        load(published, stop=3)


def test_truncated_blob_is_a_store_error(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 64)], TOKEN_IDS, 0, 64)
    published = publish(blobs, segment, 0, 64)

    os.truncate(published.path, published.path.stat().st_size - 1)

    with pytest.raises(StoreError, match="cannot be read"):
        load(published)


def test_missing_blob_is_a_store_error(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 4)], TOKEN_IDS, 0, 4)
    published = publish(blobs, segment, 0, 4)

    published.path.unlink()

    with pytest.raises(StoreError, match="cannot be read"):
        load(published)


def test_another_number_of_layers_is_damage(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 4)], TOKEN_IDS, 0, 4)
    loaded = load(publish(blobs, segment, 0, 4))

    with pytest.raises(DamagedBlobError, match="number of layers"):
        codec.restore([KVCache(), KVCache()], [loaded], 4)


def test_checksum_of_the_header_decides_what_is_compared(blobs: BlobFolder) -> None:
    segment = codec.encode([filled(KVCache(), 4)], TOKEN_IDS, 0, 4)
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
    segment = codec.encode([filled(layer, 70)], TOKEN_IDS, 0, 70)
    fresh: list[Any] = [KVCache()]
    fresh[:] = codec.restore(fresh, [load(publish(blobs, segment, 0, 70))], room)
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
    cuts = [(0, 33), (33, 90)]

    restored = make_prompt_cache(model)
    parts = [publish(blobs, codec.encode(live, token_ids, *c), *c) for c in cuts]
    restored[:] = codec.restore(
        restored, [load(p, token_ids=token_ids) for p in parts], 100
    )

    suffix = mx.array(token_ids[90:])[None]
    expected = model(suffix, cache=live)
    assert mx.array_equal(model(suffix, cache=restored), expected)
    next_token = mx.array([[5]])
    expected = model(next_token, cache=live)
    assert mx.array_equal(model(next_token, cache=restored), expected)
