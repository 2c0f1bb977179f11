"""What the codec hands over comes back to the bit, and nothing else does."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import (
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import load as load_model

from promptcache import DamagedBlobError
from promptcache.kvcache import restore, snapshot
from promptcache.kvcache.encode import encode_rows
from promptcache.kvcache.layout import describe
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers import tiny
from tests.helpers.layers import (
    HEAD_DIM,
    LAYERS,
    NUM_HEADS,
    assert_same_rows,
    encode,
    filled,
    forged,
    rows,
)
from tests.helpers.published import TOKEN_IDS, load, publish


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
