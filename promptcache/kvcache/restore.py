"""Restoring: loaded segments to a cache; the inverse of `encode`."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.kvcache.classes import (
    KINDS,
    QUANTIZED,
    LayerKind,
    arrays_of,
    filled_in_place,
    filled_rows,
    filled_window,
    parts_of,
    quantized_rows,
    tensor_names,
    window_size,
    with_parts,
)
from promptcache.kvcache.layout import PartLayout, name_in_blob
from promptcache.kvcache.loading.segment_loader import LoadedSegment, with_rows
from promptcache.kvcache.state import put_state

if TYPE_CHECKING:
    import mlx.core as mx


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
            _RESTORE[segments[-1].layout[name].kind](name, part, segments, room)
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
    has_rows = type(part).__name__ in KINDS and hasattr(part, "values")
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
    _check_class(part, kept, QUANTIZED if kept.bits else type(part).__name__)
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
    reached = [s for s in with_rows(segments) if s.stop > first]
    for segment in reached:
        _check_class(part, segment.layout[name], type(part).__name__)
    columns = zip(*(s.rows(name, first, position) for s in reached), strict=True)
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
    LayerKind, Callable[[str, Any, Sequence[LoadedSegment], int], Any]
] = {
    LayerKind.ROWS: _restore_rows,
    LayerKind.WINDOW: _restore_window,
    LayerKind.CHECKPOINT: _restore_checkpoint,
    LayerKind.EMPTY: _restore_empty,
}


def _check_class(part: Any, kept: PartLayout, class_name: str) -> None:
    if kept.class_name != class_name:
        raise DamagedBlobError(
            f"blob holds a {kept.class_name!r} in place of a {type(part).__name__}"
        )
