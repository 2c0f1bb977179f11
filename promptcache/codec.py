"""The codec: cache objects to tensors of a token range, and back.

It shapes layers and never touches the disk, except that it lets mlx read a blob.
Every layer is kept as *delta* rows along the token axis, which can be cut at any
token. Rows are kept as they lie in memory, without padding.
"""

import json
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from promptcache.errors import DamagedBlobError, StoreError, UnsupportedCacheError
from promptcache.types import BlobHeader, EncodedSegment, SegmentSlice, Tensor

if TYPE_CHECKING:
    import mlx.core as mx

# Cache class to the names of its tensors; all are delta rows on axis -2.
PLAIN_TENSORS = ("keys", "values")
QUANTIZED_TENSORS = tuple(
    f"{name}.{part}"
    for name in PLAIN_TENSORS
    for part in ("weight", "scales", "biases")
)
TENSORS_BY_CLASS = {
    "KVCache": PLAIN_TENSORS,
    "ConcatenateKVCache": PLAIN_TENSORS,
    "QuantizedKVCache": QUANTIZED_TENSORS,
}

DTYPE_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """How one layer is kept.

    Attributes:
        class_name: Its cache class, a key of `TENSORS_BY_CLASS`.
        group_size: Of a quantized layer, else None.
        bits: Of a quantized layer, else None.
    """

    class_name: str
    group_size: int | None = None
    bits: int | None = None


class LoadedSegment(NamedTuple):
    """The rows of one segment in memory: a layout and its tensors for each layer."""

    layers: list[LayerLayout]
    rows: list[list["mx.array"]]


def check_supported(cache: Sequence[Any]) -> None:
    """Raise UnsupportedCacheError if a layer's class cannot be stored."""
    for layer in cache:
        if type(layer).__name__ not in TENSORS_BY_CLASS:
            raise UnsupportedCacheError(
                f"prefixes of this model cannot be stored: its cache class "
                f"{type(layer).__name__} is not supported"
            )


def layout_of(cache: Sequence[Any]) -> list[LayerLayout]:
    """Return how the layers of a cache are kept. Raises UnsupportedCacheError."""
    check_supported(cache)
    return [
        LayerLayout(
            type(layer).__name__,
            getattr(layer, "group_size", None),
            getattr(layer, "bits", None),
        )
        for layer in cache
    ]


def is_quantized(layout: str) -> bool:
    """Return whether some layer of a blob's layout is quantized."""
    return any(layer.bits for layer in _decode_layout(layout))


def describe(layout: str) -> str:
    """Return a blob's layout for people: `30 × KVCache`."""
    layers = _decode_layout(layout)
    kinds = dict.fromkeys(layers)
    return ", ".join(f"{layers.count(kind)} × {_kind_name(kind)}" for kind in kinds)


def _kind_name(layer: LayerLayout) -> str:
    return f"{layer.class_name} ({layer.bits} bits)" if layer.bits else layer.class_name


def encode(
    cache: Sequence[Any], token_ids: Sequence[int], start: int, end: int
) -> EncodedSegment:
    """Return the rows `[start, end)` of every layer as plain bytes.

    The cache is not modified. The rows are evaluated on the calling thread, which
    must own the stream they were computed on.

    Args:
        cache: One mlx-lm cache object a layer; keys and values have shape
            `(1, kv_heads, capacity, head_dim)`.
        token_ids: The tokens the cache has read, from the first.
        start: First row to take.
        end: The row after the last.

    Raises:
        UnsupportedCacheError: A layer's class cannot be stored.
    """
    import mlx.core as mx

    layout = layout_of(cache)
    tensors = {"token_ids": mx.array(token_ids[start:end], dtype=mx.uint32)}
    for i, layer in enumerate(cache):
        assert layer.offset >= end, f"layer {i} holds [0, {layer.offset}), not {end}"
        names = TENSORS_BY_CLASS[type(layer).__name__]
        for name, array in zip(names, _arrays(layer), strict=True):
            rows = mx.contiguous(array[..., start:end, :])
            tensors[f"layers.{i}.{name}"] = rows
    mx.eval(tensors)
    return EncodedSegment(
        _encode_layout(layout), [_tensor(name, a) for name, a in tensors.items()]
    )


def _arrays(layer: Any) -> list["mx.array"]:
    """Return a layer's arrays in the order of its tensors' names."""
    if type(layer).__name__ == "QuantizedKVCache":
        return [*layer.keys, *layer.values]
    return [layer.keys, layer.values]


def _tensor(name: str, array: "mx.array") -> Tensor:
    dtype = DTYPE_NAMES[str(array.dtype).removeprefix("mlx.core.")]
    data = memoryview(array)
    return Tensor(name, dtype, tuple(array.shape), data)


def _encode_layout(layers: list[LayerLayout]) -> str:
    return json.dumps([[la.class_name, la.group_size, la.bits] for la in layers])


def _decode_layout(layout: str) -> list[LayerLayout]:
    """Return a blob's layout; a class name in it is looked up, never called."""
    layers = [LayerLayout(*fields) for fields in json.loads(layout)]
    for layer in layers:
        if layer.class_name not in TENSORS_BY_CLASS:
            raise DamagedBlobError(f"blob names an unknown class {layer.class_name!r}")
    return layers


def load(
    path: Path, header: BlobHeader, part: SegmentSlice, token_ids: bytes
) -> LoadedSegment:
    """Read a segment's rows `[part.start, part.stop)` into memory.

    Args:
        path: The blob.
        header: Its verified header.
        part: Which rows to take.
        token_ids: What these rows must be of, packed.

    Raises:
        DamagedBlobError: The blob does not hold what was written, or is of other
            tokens.
        StoreError: It cannot be read now, or does not fit into memory.
    """
    import mlx.core as mx

    try:
        arrays = mx.load(str(path))
        mx.eval(arrays)
    except (RuntimeError, MemoryError) as error:
        raise StoreError(f"blob cannot be read ({error})") from error
    checksum = xxhash.xxh3_128()
    for spec in header.tensors:
        checksum.update(memoryview(arrays[spec.name]))
    if checksum.hexdigest() != header.data_checksum:
        raise DamagedBlobError("checksum of the data does not match")
    num_rows = part.stop - part.start
    if bytes(memoryview(arrays["token_ids"][:num_rows])) != token_ids:
        raise DamagedBlobError("blob is of other tokens")
    layers = _decode_layout(header.layout)
    rows = [
        [
            arrays[f"layers.{i}.{name}"][..., :num_rows, :]
            for name in TENSORS_BY_CLASS[layer.class_name]
        ]
        for i, layer in enumerate(layers)
    ]
    return LoadedSegment(layers, rows)


def restore(
    cache: Sequence[Any], segments: Sequence[LoadedSegment], room: int
) -> list[Any]:
    """Return a cache filled with the rows of consecutive segments from token 0.

    Where only some of the segments are quantized, the layer becomes quantized as a
    whole: quantization is by row, so that it does not matter when it happened.

    Args:
        cache: What `make_prompt_cache` returned; it is not modified.
        segments: The rows, from the root.
        room: For how many tokens in all to allocate, so that the suffix and the
            first decode steps need not copy everything again.

    Raises:
        DamagedBlobError: The segments are of another layout.
        StoreError: The cache does not fit into memory.
    """
    import mlx.core as mx

    if any(len(segment.layers) != len(cache) for segment in segments):
        raise DamagedBlobError("blob has another number of layers")
    restored = [
        _restored(copy(layer), [(s.layers[i], s.rows[i]) for s in segments], room)
        for i, layer in enumerate(cache)
    ]
    try:
        mx.eval([_arrays(layer) for layer in restored])
    except (RuntimeError, MemoryError) as error:
        raise StoreError(f"cached rows do not fit into memory ({error})") from error
    return restored


def _restored(
    layer: Any, parts: list[tuple[LayerLayout, list["mx.array"]]], room: int
) -> Any:
    """Return an empty layer filled, or a quantized one in its place."""
    from mlx_lm.models.cache import QuantizedKVCache

    quantized = next((la for la, _ in parts if la.bits), None)
    offset = sum(rows[0].shape[-2] for _, rows in parts)
    if quantized is None:
        columns = zip(*(rows for _, rows in parts), strict=True)
        layer.keys, layer.values = (_padded(c, layer, room) for c in columns)
        layer.offset = offset
        return layer
    assert quantized.group_size and quantized.bits
    restored = QuantizedKVCache(quantized.group_size, quantized.bits)
    rows_by_part = [_quantized(quantized, la, rows) for la, rows in parts]
    columns = zip(*rows_by_part, strict=True)
    arrays = [_padded(column, restored, room) for column in columns]
    restored.keys, restored.values = arrays[:3], arrays[3:]
    restored.offset = offset
    return restored


def _quantized(
    target: LayerLayout, layer: LayerLayout, rows: list["mx.array"]
) -> list["mx.array"]:
    """Return a layer's rows in the quantization of another."""
    import mlx.core as mx

    if layer.bits:
        return rows
    assert target.group_size and target.bits
    return [
        part
        for array in rows
        for part in mx.quantize(array, group_size=target.group_size, bits=target.bits)
    ]


def _padded(rows: Sequence["mx.array"], layer: Any, room: int) -> "mx.array":
    """Join rows and pad them to a multiple of the class's step that has `room`."""
    import mlx.core as mx

    num_rows = sum(array.shape[-2] for array in rows)
    # ConcatenateKVCache has no step: it holds exactly its rows.
    step = getattr(layer, "step", None)
    if step is None:
        return mx.concatenate(list(rows), axis=-2)
    capacity = math.ceil(max(room, num_rows) / step) * step
    shape = (*rows[0].shape[:-2], capacity - num_rows, rows[0].shape[-1])
    return mx.concatenate([*rows, mx.zeros(shape, rows[0].dtype)], axis=-2)
