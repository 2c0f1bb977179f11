"""Capturing: note what a cache loses when it reads on, while it still has it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from promptcache.kvcache.classes import (
    LayerKind,
    kind_of,
    parts_of,
    rows_of,
    turned_by,
    window_rows,
    window_size,
)
from promptcache.kvcache.layout import Layout, PartLayout, layout_of, name_in_blob
from promptcache.kvcache.loading.segment_loader import LoadedSegment, with_rows
from promptcache.kvcache.state import take_state

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a cache loses when it reads on: windows' rows, and states.

    Attributes:
        start: First token of the piece that was just read.
        end: The token after its last.
        layout: How each part is kept.
        rows: Rows of windows, and of all parts that are about to be quantized, by
            tensor name.
        states: Arrays of states, by tensor name.
    """

    start: int
    end: int
    layout: Layout
    rows: Mapping[str, "mx.array"]
    states: Mapping[str, "mx.array"]

    @property
    def needs_checkpoint(self) -> bool:
        """Return whether rows alone do not restore this cache."""
        return any(p.kind is LayerKind.CHECKPOINT for p in self.layout.values())

    @property
    def state_nbytes(self) -> int:
        """Return the size of its states."""
        return sum(int(array.nbytes) for array in self.states.values())


def capture(
    cache: Sequence[Any], start: int, end: int, *, every_row: bool = False
) -> Snapshot:
    """Note what is lost of a cache that has just read the tokens `[start, end)`.

    Nothing is computed or copied.

    Args:
        cache: One mlx-lm cache object a layer.
        start: Where the piece begins.
        end: Where it ends.
        every_row: Whether to note rows of all parts, because they may be quantized.

    Raises:
        UnsupportedCacheError: A part's state is of something that cannot be stored.
    """
    layout: dict[str, PartLayout] = {}
    rows: dict[str, mx.array] = {}
    states: dict[str, mx.array] = {}
    for name, part in parts_of(cache):
        kind = kind_of(part, end)
        state: Any = None
        if kind is LayerKind.CHECKPOINT:
            state, arrays = take_state(part, name_in_blob(name, "state"))
            states |= arrays
        elif kind is LayerKind.WINDOW:
            state = turned_by(part) if part.offset > window_size(part) else 0
        layout[name] = layout_of(part, kind, state)
        names = [name_in_blob(name, tensor) for tensor in layout[name].tensor_names]
        if kind is LayerKind.WINDOW:
            rows |= zip(names, window_rows(part, start, end), strict=True)
        elif kind is LayerKind.ROWS and every_row:
            rows |= zip(names, rows_of(part, start, end), strict=True)
    return Snapshot(start, end, layout, rows, states)


def snapshot_restored(
    cache: Sequence[Any], segments: Sequence[LoadedSegment], end: int
) -> Snapshot:
    """Note all of a cache that was filled with segments, to save it elsewhere.

    Windows do not hold all of their rows any more, but the segments do.
    """
    import mlx.core as mx

    snapshot = capture(cache, end, end)
    rows: dict[str, mx.array] = {}
    for name, part in snapshot.layout.items():
        if part.kind is LayerKind.WINDOW:
            pieces = [s.rows(name, 0, end) for s in with_rows(segments)]
            names = [name_in_blob(name, tensor) for tensor in part.tensor_names]
            columns = [mx.concatenate(c, axis=-2) for c in zip(*pieces, strict=True)]
            rows |= dict(zip(names, columns, strict=True))
    return replace(snapshot, start=0, rows=rows)


def copied(taken: Snapshot) -> Snapshot:
    """Return a capture with copies of its rows and without states.

    It keeps no memory of the cache alive, which goes on being written to.
    """
    import mlx.core as mx

    rows = {name: mx.contiguous(array) for name, array in taken.rows.items()}
    mx.eval(rows)
    return replace(taken, rows=rows, states={})
