"""Encoding: a token range of a cache to tensors, as plain bytes.

A segment holds rows of a token range, a checkpoint the whole state of some parts at one
position; how each cache class is kept is said in `classes`. Values are kept as they lie
in memory, without padding.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from promptcache.errors import StoreError
from promptcache.kvcache.classes import (
    parts_of,
    rows_of,
)
from promptcache.kvcache.layout import (
    TOKEN_IDS,
    Layout,
    PartLayout,
    encode_layout,
    name_in_blob,
    without_state,
)
from promptcache.kvcache.row_quantization import (
    is_finite,
    quantize_rows,
    quantized_format,
)
from promptcache.kvcache.snapshot import Snapshot
from promptcache.segments.dtypes import DTYPE_NAMES
from promptcache.segments.types import EncodedSegment, ResumeRules, Tensor

if TYPE_CHECKING:
    import mlx.core as mx


def encode_rows(
    cache: Sequence[Any],
    snapshots: Sequence[Snapshot],
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
        snapshots: What was captured of it, up to `end` at least. Pieces of one segment
            are quantized all or none.
        token_ids: The tokens the cache has read, from the first.
        start: First row to take.
        end: The row after the last.
        store_bits: In how many bits to keep rows of floats, None for as they are.

    Raises:
        StoreError: Rows that the cache has lost were not captured.
    """
    import mlx.core as mx

    last = next((c for c in snapshots if c.end >= end), None)
    if last is None:
        raise _evicted_meanwhile()
    layout: dict[str, PartLayout] = {}
    arrays = {TOKEN_IDS: mx.array(token_ids[start:end], dtype=mx.uint32)}
    for name, part in parts_of(cache):
        layout[name] = kept = without_state(last.layout[name])
        names = [name_in_blob(name, tensor) for tensor in kept.tensor_names]
        if all(tensor in last.rows for tensor in names):
            rows = _captured(snapshots, names, start, end) if names else []
        else:
            rows = rows_of(part, start, end)
        arrays |= dict(zip(names, rows, strict=True))
    if store_bits is not None:
        layout, arrays = _packed(layout, arrays, store_bits)
    resumption = ResumeRules(needs_checkpoint=last.needs_checkpoint)
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
    formats = {place: quantized_format(arrays[place], bits) for place in places}
    packable = {place: kept for place, kept in formats.items() if kept is not None}
    pieces = {
        place: quantize_rows(arrays[place], kept) for place, kept in packable.items()
    }
    usable = {p: is_finite(arrays[p], packed) for p, packed in pieces.items()}
    mx.eval(pieces, usable)
    parts, kept_arrays = dict(layout), dict(arrays)
    for place in (place for place in packable if usable[place].item()):
        name, tensor = places[place]
        at_rest = {**parts[name].at_rest, tensor: packable[place]}
        parts[name] = replace(parts[name], at_rest=at_rest)
        del kept_arrays[place]
        kept_arrays |= {f"{place}.{p}": array for p, array in pieces[place].items()}
    return parts, kept_arrays


def _evicted_meanwhile() -> StoreError:
    return StoreError("its parent segment was evicted meanwhile")


def _captured(
    snapshots: Sequence[Snapshot], tensors: Sequence[str], start: int, end: int
) -> list["mx.array"]:
    """Return the rows `[start, end)` of a part from the pieces they were read in."""
    import mlx.core as mx

    pieces = [c for c in snapshots if c.start < end and c.end > start]
    joined = all(a.end == b.start for a, b in itertools.pairwise(pieces))
    if not joined or pieces[0].start > start or pieces[-1].end < end:
        raise _evicted_meanwhile()

    def rows(piece: Snapshot, tensor: str) -> "mx.array":
        first, last = max(start, piece.start), min(end, piece.end)
        array = piece.rows[tensor]
        return array[..., first - piece.start : last - piece.start, :]

    return [
        mx.concatenate([rows(piece, tensor) for piece in pieces], axis=-2)
        for tensor in tensors
    ]


def encode_checkpoint(taken: Snapshot) -> EncodedSegment:
    """Return the states of a snapshot as plain bytes."""
    import mlx.core as mx

    arrays = {TOKEN_IDS: mx.zeros((0,), dtype=mx.uint32), **taken.states}
    return _encoded(taken.layout, arrays, ResumeRules(needs_checkpoint=True))


def _encoded(
    layout: Layout, arrays: Mapping[str, "mx.array"], resumption: ResumeRules
) -> EncodedSegment:
    import mlx.core as mx

    contiguous = {name: mx.contiguous(array) for name, array in arrays.items()}
    mx.eval(contiguous)
    tensors = [_tensor(name, array) for name, array in contiguous.items()]
    return EncodedSegment(encode_layout(layout), tensors, resumption)


def _tensor(name: str, array: "mx.array") -> Tensor:
    dtype = DTYPE_NAMES[str(array.dtype).removeprefix("mlx.core.")]
    return Tensor(name, dtype, tuple(array.shape), memoryview(array))
