"""The codec: cache objects to tensors of a token range, and back.

It never touches the disk: what blobs hold is read by `reading`. A segment holds rows
of a token range, a checkpoint the whole state of some parts at one position; how each
cache class is kept is said in `treatment`. Values are kept as they lie in memory,
without padding.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from promptcache.at_rest import can_be_restored, packed_rows, row_format
from promptcache.capturing import Capture
from promptcache.errors import DamagedBlobError, StoreError
from promptcache.layout import (
    LOGITS,
    TOKEN_IDS,
    Layout,
    PartLayout,
    encode_layout,
    name_in_blob,
    without_state,
)
from promptcache.reading import LoadedSegment, with_rows
from promptcache.state import put_state
from promptcache.treatment import (
    TREATMENTS,
    Treatment,
    arrays_of,
    filled_in_place,
    filled_rows,
    filled_window,
    parts_of,
    quantized_rows,
    rows_of,
    tensor_names,
    window_size,
    with_parts,
)
from promptcache.types import EncodedSegment, Resumption, Tensor

if TYPE_CHECKING:
    import mlx.core as mx

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


def encode_rows(
    cache: Sequence[Any],
    captures: Sequence[Capture],
    token_ids: Sequence[int],
    start: int,
    end: int,
    *,
    store_bits: int | None = None,
) -> EncodedSegment:
    """Return the rows `[start, end)` of every part that has rows, as plain bytes.

    The cache is not modified. The rows are evaluated on the calling thread, which
    must own the stream they were computed on.

    Args:
        cache: One mlx-lm cache object a layer; keys and values have shape
            `(1, kv_heads, capacity, head_dim)`. It may have read on since.
        captures: What was captured of it, up to `end` at least. Pieces of one segment
            are quantized all or none.
        token_ids: The tokens the cache has read, from the first.
        start: First row to take.
        end: The row after the last.
        store_bits: In how many bits to keep rows of floats, None for as they are.

    Raises:
        StoreError: Rows that the cache has lost were not captured.
    """
    import mlx.core as mx

    last = next((c for c in captures if c.end >= end), None)
    if last is None:
        raise _evicted_meanwhile()
    layout: dict[str, PartLayout] = {}
    arrays = {TOKEN_IDS: mx.array(token_ids[start:end], dtype=mx.uint32)}
    for name, part in parts_of(cache):
        layout[name] = kept = without_state(last.layout[name])
        names = [name_in_blob(name, tensor) for tensor in kept.tensor_names]
        if all(tensor in last.rows for tensor in names):
            rows = _captured(captures, names, start, end) if names else []
        else:
            rows = rows_of(part, start, end)
        arrays |= dict(zip(names, rows, strict=True))
    if store_bits is not None:
        layout, arrays = _packed(layout, arrays, store_bits)
    resumption = Resumption(needs_checkpoint=last.needs_checkpoint)
    return _encoded(layout, arrays, resumption)


def _packed(
    layout: Layout, arrays: Mapping[str, "mx.array"], bits: int
) -> tuple[dict[str, PartLayout], dict[str, "mx.array"]]:
    """Return layout and tensors with all rows in fewer bits that can be."""
    import mlx.core as mx

    places = {
        name_in_blob(name, tensor): (name, tensor)
        for name, part in layout.items()
        for tensor in part.tensor_names
        if not part.bits
    }
    formats = {place: row_format(arrays[place], bits) for place in places}
    known = {place: kept for place, kept in formats.items() if kept is not None}
    pieces = {place: packed_rows(arrays[place], kept) for place, kept in known.items()}
    usable = {p: can_be_restored(arrays[p], packed) for p, packed in pieces.items()}
    mx.eval(pieces, usable)
    parts, kept_arrays = dict(layout), dict(arrays)
    for place in (place for place in known if usable[place].item()):
        name, tensor = places[place]
        at_rest = {**parts[name].at_rest, tensor: known[place]}
        parts[name] = replace(parts[name], at_rest=at_rest)
        del kept_arrays[place]
        kept_arrays |= {f"{place}.{p}": array for p, array in pieces[place].items()}
    return parts, kept_arrays


def _evicted_meanwhile() -> StoreError:
    return StoreError("what it hangs on has been evicted meanwhile")


def _captured(
    captures: Sequence[Capture], tensors: Sequence[str], start: int, end: int
) -> list["mx.array"]:
    """Return the rows `[start, end)` of a part from the pieces they were read in."""
    import mlx.core as mx

    pieces = [c for c in captures if c.start < end and c.end > start]
    joined = all(a.end == b.start for a, b in itertools.pairwise(pieces))
    if not joined or pieces[0].start > start or pieces[-1].end < end:
        raise _evicted_meanwhile()

    def rows(piece: Capture, tensor: str) -> "mx.array":
        first, last = max(start, piece.start), min(end, piece.end)
        array = piece.rows[tensor]
        return array[..., first - piece.start : last - piece.start, :]

    return [
        mx.concatenate([rows(piece, tensor) for piece in pieces], axis=-2)
        for tensor in tensors
    ]


def encode_checkpoint(
    taken: Capture, logits: "mx.array | None" = None
) -> EncodedSegment:
    """Return the states of a capture as plain bytes.

    Args:
        taken: The capture.
        logits: The logits of the next token, shape `(1, vocabulary)`, if known.
    """
    import mlx.core as mx

    arrays = {TOKEN_IDS: mx.zeros((0,), dtype=mx.uint32), **taken.states}
    if logits is not None:
        arrays[LOGITS] = logits
    resumption = Resumption(needs_checkpoint=True, has_logits=logits is not None)
    return _encoded(taken.layout, arrays, resumption)


def _encoded(
    layout: Layout, arrays: Mapping[str, "mx.array"], resumption: Resumption
) -> EncodedSegment:
    import mlx.core as mx

    contiguous = {name: mx.contiguous(array) for name, array in arrays.items()}
    mx.eval(contiguous)
    tensors = [_tensor(name, array) for name, array in contiguous.items()]
    return EncodedSegment(encode_layout(layout), tensors, resumption)


def _tensor(name: str, array: "mx.array") -> Tensor:
    dtype = DTYPE_NAMES[str(array.dtype).removeprefix("mlx.core.")]
    return Tensor(name, dtype, tuple(array.shape), memoryview(array))


def restore(
    cache: Sequence[Any], segments: Sequence[LoadedSegment], room: int
) -> list[Any]:
    """Return a cache filled with consecutive segments from token 0.

    Where only some of the segments are quantized, the part becomes quantized as a
    whole: quantization is by row, so that it does not matter when it happened.

    Args:
        cache: What `make_prompt_cache` returned; it is not modified.
        segments: The segments, from the root; a checkpoint is the last.
        room: For how many tokens in all to allocate, so that the suffix and the
            first decode steps need not copy everything again.

    Raises:
        DamagedBlobError: The segments are of another layout.
        StoreError: The cache does not fit into memory.
    """
    import mlx.core as mx

    parts = dict(parts_of(cache))
    if any(segment.layout.keys() != parts.keys() for segment in segments):
        raise DamagedBlobError("blob has another number of layers")
    try:
        restored = [
            _RESTORE[segments[-1].layout[name].treatment](name, part, segments, room)
            for name, part in parts.items()
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedBlobError(f"blob does not fit the cache ({error!r})") from error
    try:
        mx.eval([_row_arrays(part) for part in restored])
    except (RuntimeError, MemoryError) as error:
        raise StoreError(f"cached rows do not fit into memory ({error})") from error
    return with_parts(cache, iter(restored))


def _row_arrays(part: Any) -> list[Any]:
    """Return the arrays that were joined; those of a state were read as they are."""
    has_rows = type(part).__name__ in TREATMENTS and hasattr(part, "values")
    return [] if not has_rows or part.keys is None else arrays_of(part)


def _restore_rows(
    name: str, part: Any, segments: Sequence[LoadedSegment], room: int
) -> Any:
    from mlx_lm.models.cache import QuantizedKVCache

    position = segments[-1].stop
    if in_place := _in_place(name, part, segments):
        return filled_in_place(part, in_place, position)
    parts = [(s.layout[name], s.rows(name, 0, position)) for s in with_rows(segments)]
    if not all(rows for _, rows in parts):
        raise DamagedBlobError("blob lacks rows of a part")
    kept = next((layout for layout, _ in parts if layout.bits), parts[0][0])
    _check_class(part, kept, "QuantizedKVCache" if kept.bits else type(part).__name__)
    rows = [found for _, found in parts]
    if kept.group_size and kept.bits:
        group_size, bits = kept.group_size, kept.bits
        part = QuantizedKVCache(group_size, bits)
        rows = [
            found if layout.bits else quantized_rows(found, group_size, bits)
            for layout, found in parts
        ]
    return filled_rows(part, list(zip(*rows, strict=True)), position, room)


def _in_place(
    name: str, part: Any, segments: Sequence[LoadedSegment]
) -> list["mx.array"]:
    """Return a part's arrays if all its rows were read to where they are used."""
    destination = segments[0].destination
    if destination is None:
        return []
    tensors = [
        name_in_blob(name, tensor) for tensor in tensor_names(type(part).__name__)
    ]
    for segment in with_rows(segments):
        if segment.layout[name].class_name != type(part).__name__:
            return []
        if not set(tensors) <= set(segment.taken):
            return []
    arrays = (destination.array(tensor) for tensor in tensors)
    return [array for array in arrays if array is not None]


def _restore_window(
    name: str, part: Any, segments: Sequence[LoadedSegment], _: int
) -> Any:
    import mlx.core as mx

    position = segments[-1].stop
    first = max(position - window_size(part), 0)
    found = [s for s in with_rows(segments) if s.stop > first]
    for segment in found:
        _check_class(part, segment.layout[name], type(part).__name__)
    columns = zip(*(s.rows(name, first, position) for s in found), strict=True)
    joined = [mx.contiguous(mx.concatenate(column, axis=-2)) for column in columns]
    if not joined or joined[0].shape[-2] != position - first:
        raise DamagedBlobError("blob lacks rows of a window")
    return filled_window(part, joined, position, segments[-1].layout[name].state or 0)


def _restore_checkpoint(
    name: str, part: Any, segments: Sequence[LoadedSegment], _: int
) -> Any:
    checkpoint = segments[-1]
    return put_state(part, checkpoint.layout[name].state, checkpoint.arrays)


def _restore_empty(
    name: str, part: Any, segments: Sequence[LoadedSegment], _: int
) -> Any:
    return part


_RESTORE: Mapping[
    Treatment, Callable[[str, Any, Sequence[LoadedSegment], int], Any]
] = {
    Treatment.ROWS: _restore_rows,
    Treatment.WINDOW: _restore_window,
    Treatment.CHECKPOINT: _restore_checkpoint,
    Treatment.EMPTY: _restore_empty,
}


def _check_class(part: Any, kept: PartLayout, class_name: str) -> None:
    if kept.class_name != class_name:
        raise DamagedBlobError(
            f"blob holds a {kept.class_name!r} in place of a {type(part).__name__}"
        )
