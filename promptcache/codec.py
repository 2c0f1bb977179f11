"""The codec: cache objects to tensors of a token range, and back.

It never touches the disk, except that it lets mlx read a blob. A segment holds rows
of a token range, a checkpoint the whole state of some parts at one position; how each
cache class is kept is said in `treatment`. Values are kept as they lie in memory,
without padding.
"""

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from promptcache.at_rest import (
    PIECES,
    RowFormat,
    can_be_restored,
    packed_rows,
    row_format,
    unpacked_rows,
)
from promptcache.checksum import combined, digest
from promptcache.destination import Destination, Job
from promptcache.errors import DamagedBlobError, StoreError
from promptcache.state import put_state, take_state
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
    treatment_of,
    turned_by,
    window_rows,
    window_size,
    with_parts,
)
from promptcache.types import (
    BlobHeader,
    EncodedSegment,
    Resumption,
    SegmentSlice,
    Tensor,
    TensorSpec,
)

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
TOKEN_IDS = "token_ids"
LOGITS = "logits"
# Smaller tensors are read together.
READ_NBYTES = 4 * 1024**2


@dataclass(frozen=True, slots=True)
class PartLayout:
    """How one part of a cache is kept.

    Attributes:
        class_name: Its cache class.
        treatment: How it is treated.
        group_size: Of a quantized part, else None.
        bits: Of a quantized part, else None.
        state: In a checkpoint, the part's state as JSON, or by how many rows a window
            is out of temporal order.
        at_rest: How those of its tensors are kept that are stored in fewer bits.
    """

    class_name: str
    treatment: Treatment
    group_size: int | None = None
    bits: int | None = None
    state: Any = None
    at_rest: Mapping[str, RowFormat] = field(default_factory=dict)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of the tensors that hold its rows."""
        has_rows = self.treatment in (Treatment.ROWS, Treatment.WINDOW)
        return tensor_names(self.class_name) if has_rows else ()


Layout = Mapping[str, PartLayout]


@dataclass(frozen=True, slots=True)
class Capture:
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
        return any(p.treatment is Treatment.CHECKPOINT for p in self.layout.values())


class LoadedSegment(NamedTuple):
    """A segment in memory: the range of its rows, its layout and its tensors.

    Attributes:
        start: Its first row.
        stop: The row after the last one that is wanted.
        layout: How each part is kept.
        arrays: Its tensors, but for those that were read to where they are used.
        destination: What took these.
        taken: Their names.
    """

    start: int
    stop: int
    layout: Layout
    arrays: Mapping[str, "mx.array"]
    destination: Destination | None = None
    taken: Collection[str] = ()

    def array(self, tensor: str) -> "mx.array":
        """Return a tensor's rows, wherever they were read to. Raises KeyError."""
        if self.destination is None or tensor not in self.taken:
            return self.arrays[tensor]
        array = self.destination.array(tensor)
        assert array is not None
        return array[..., self.start : self.stop, :]

    @property
    def logits(self) -> "mx.array | None":
        """Return the logits of the next token, shape `(1, vocabulary)`, or None."""
        return self.arrays.get(LOGITS)

    def rows(self, name: str, start: int, stop: int) -> list["mx.array"]:
        """Return what it has of the rows `[start, stop)` of a part, tensor by tensor.

        Raises:
            DamagedBlobError: It has none of this part.
        """
        first, last = max(start, self.start), min(stop, self.stop)
        wanted = slice(first - self.start, last - self.start)
        part = self.layout[name]
        try:
            return [
                self._rows_of(_name(name, tensor), part.at_rest.get(tensor), wanted)
                for tensor in part.tensor_names
            ]
        except KeyError as error:
            raise DamagedBlobError(f"blob has no {error}") from error

    def _rows_of(
        self, tensor: str, at_rest: RowFormat | None, wanted: slice
    ) -> "mx.array":
        if at_rest is None:
            return self.array(tensor)[..., wanted, :]
        pieces = {p: self.arrays[f"{tensor}.{p}"][..., wanted, :] for p in PIECES}
        return unpacked_rows(pieces, at_rest)


def capture(
    cache: Sequence[Any], start: int, end: int, *, every_row: bool = False
) -> Capture:
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
        treatment = treatment_of(part, end)
        state: Any = None
        if treatment is Treatment.CHECKPOINT:
            state, arrays = take_state(part, _name(name, "state"))
            states |= arrays
        elif treatment is Treatment.WINDOW:
            state = turned_by(part) if part.offset > window_size(part) else 0
        layout[name] = _part_layout(part, treatment, state)
        names = [_name(name, tensor) for tensor in layout[name].tensor_names]
        if treatment is Treatment.WINDOW:
            rows |= zip(names, window_rows(part, start, end), strict=True)
        elif treatment is Treatment.ROWS and every_row:
            rows |= zip(names, rows_of(part, start, end), strict=True)
    return Capture(start, end, layout, rows, states)


def capture_restored(
    cache: Sequence[Any], segments: Sequence[LoadedSegment], end: int
) -> Capture:
    """Note all of a cache that was filled with segments, to save it elsewhere.

    Windows do not hold all of their rows any more, but the segments do.
    """
    import mlx.core as mx

    taken = capture(cache, end, end)
    rows: dict[str, mx.array] = {}
    for name, part in taken.layout.items():
        if part.treatment is Treatment.WINDOW:
            found = [s.rows(name, 0, end) for s in _with_rows(segments)]
            names = [_name(name, tensor) for tensor in part.tensor_names]
            columns = [mx.concatenate(c, axis=-2) for c in zip(*found, strict=True)]
            rows |= dict(zip(names, columns, strict=True))
    return replace(taken, start=0, rows=rows)


def detached(taken: Capture) -> Capture:
    """Return a capture with copies of its rows and without states.

    It keeps no memory of the cache alive, which goes on being written to.
    """
    import mlx.core as mx

    rows = {name: mx.contiguous(array) for name, array in taken.rows.items()}
    mx.eval(rows)
    return replace(taken, rows=rows, states={})


def _part_layout(part: Any, treatment: Treatment, state: Any = None) -> PartLayout:
    return PartLayout(
        type(part).__name__,
        treatment,
        getattr(part, "group_size", None),
        getattr(part, "bits", None),
        state,
    )


def _name(part: str, tensor: str) -> str:
    return f"layers.{part}.{tensor}"


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
        layout[name] = kept = _without_state(last.layout[name])
        names = [_name(name, tensor) for tensor in kept.tensor_names]
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
        _name(name, tensor): (name, tensor)
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


def _without_state(part: PartLayout) -> PartLayout:
    return PartLayout(part.class_name, part.treatment, part.group_size, part.bits)


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
    return EncodedSegment(_encode_layout(layout), tensors, resumption)


def _tensor(name: str, array: "mx.array") -> Tensor:
    dtype = DTYPE_NAMES[str(array.dtype).removeprefix("mlx.core.")]
    return Tensor(name, dtype, tuple(array.shape), memoryview(array))


def _encode_layout(layout: Layout) -> str:
    return json.dumps(
        {
            name: [
                *(p.class_name, p.treatment, p.group_size, p.bits, p.state),
                *([p.at_rest] if p.at_rest else []),
            ]
            for name, p in layout.items()
        }
    )


@functools.lru_cache(maxsize=8)
def _decode_layout(layout: str) -> Layout:
    """Return a blob's layout; a class name in it is compared, never called."""
    try:
        return {
            name: _decode_part(class_name, treatment, *rest)
            for name, (class_name, treatment, *rest) in json.loads(layout).items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedBlobError(f"layout cannot be read ({error})") from error


def _decode_part(
    class_name: str,
    treatment: str,
    group_size: int | None = None,
    bits: int | None = None,
    state: Any = None,
    at_rest: Mapping[str, Any] = MappingProxyType({}),
) -> PartLayout:
    formats = {tensor: RowFormat.of(f) for tensor, f in at_rest.items()}
    return PartLayout(
        class_name, Treatment(treatment), group_size, bits, state, formats
    )


def is_quantized(layout: str) -> bool:
    """Return whether some part of a blob's layout is quantized in the cache."""
    return any(part.bits for part in _decode_layout(layout).values())


def describe(layout: str) -> str:
    """Return a blob's layout for people: `30 × KVCache`."""
    kinds = Counter(_kind_name(part) for part in _decode_layout(layout).values())
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())


def _kind_name(part: PartLayout) -> str:
    if part.bits:
        return f"{part.class_name} ({part.bits} bits)"
    if part.at_rest:
        bits = next(iter(part.at_rest.values())).bits
        return f"{part.class_name} (stored in {bits} bits)"
    return part.class_name


def load(
    path: Path,
    header: BlobHeader,
    part: SegmentSlice,
    token_ids: bytes,
    destination: Destination | None = None,
) -> LoadedSegment:
    """Read a segment's rows `[part.start, part.stop)`, or a checkpoint, into memory.

    Args:
        path: The blob.
        header: Its verified header.
        part: Which rows to take.
        token_ids: What these rows must be of, packed.
        destination: What takes rows where they are going to be used.

    Raises:
        DamagedBlobError: The blob does not hold what was written, or is of other
            tokens.
        StoreError: It cannot be read now, or does not fit into memory.
    """
    return Reading(path, header, part, token_ids, destination).finish()


class Reading:
    """A segment that is being read into memory; see `load`.

    Others can be begun before it is finished. Where one fails, the others have to be
    given up before their destination is used for something else.
    """

    def __init__(
        self,
        path: Path,
        header: BlobHeader,
        part: SegmentSlice,
        token_ids: bytes,
        destination: Destination | None = None,
    ) -> None:
        """Begin to read. Raises what `load` raises."""
        self._header = header
        self._part = part
        self._token_ids = token_ids
        self._destination = destination
        self._layout = _decode_layout(header.layout)
        specs = header.tensors
        self._taken = set() if destination is None else destination.prepare(specs)
        self._arrays: dict[str, mx.array] = {}
        self._blob_ids = b""
        self._begun: list[tuple[Job, Future[list[bytes]] | None]] = []
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise StoreError(f"blob cannot be read ({error})") from error
        try:
            if not self._takes_all:
                self._arrays = _load_arrays(path, header, self._taken)
            for job in self._jobs():
                self._begun.append((job, self._begin(job)))
        except (OSError, RuntimeError, MemoryError) as error:
            self.give_up()
            raise StoreError(f"blob cannot be read ({error})") from error

    @property
    def _takes_all(self) -> bool:
        return self._destination is not None and self._destination.takes_all

    def _jobs(self) -> Iterator[Job]:
        """Yield what is to be read at once."""
        offset = self._header.data_start
        for specs in _groups(self._header.tensors, self._taken):
            place = (self._file.fileno(), offset, specs)
            job = Job(*place, self._part.start, self._part.stop)
            yield job
            offset += job.nbytes

    def _begin(self, job: Job) -> "Future[list[bytes]] | None":
        """Begin to read, unless that has been done already."""
        [spec, *_] = job.specs
        if spec.name == TOKEN_IDS:
            self._blob_ids = os.pread(job.descriptor, spec.nbytes, job.offset)
        elif self._takes_all or spec.name in self._taken:
            assert self._destination is not None
            return self._destination.read(job)
        return None

    def _settle(self, job: Job, reading: "Future[list[bytes]] | None") -> list[bytes]:
        """Wait until a job is done; return the digests of its tensors."""
        [spec, *_] = job.specs
        if reading is not None and self._destination is not None:
            digests, others = self._destination.settle(job, reading)
            self._arrays |= others
            return digests
        if spec.name == TOKEN_IDS:
            return [digest([self._blob_ids])]
        return [digest([memoryview(self._arrays[spec.name])])]

    def finish(self) -> LoadedSegment:
        """Wait until it is read, and check it. Raises what `load` raises."""
        digests: list[bytes] = []
        try:
            for job, reading in self._begun:
                digests += self._settle(job, reading)
        except BaseException as error:
            self.give_up()
            if isinstance(error, EOFError):
                raise DamagedBlobError(str(error)) from error
            if isinstance(error, (OSError, RuntimeError, MemoryError)):
                raise StoreError(f"blob cannot be read ({error})") from error
            raise
        self._file.close()
        if combined(digests) != self._header.data_checksum:
            raise DamagedBlobError("checksum of the data does not match")
        part = self._part
        if not self._blob_ids.startswith(self._token_ids):
            raise DamagedBlobError("blob is of other tokens")
        return LoadedSegment(
            part.start,
            part.stop,
            self._layout,
            self._arrays,
            self._destination,
            self._taken,
        )

    def give_up(self) -> None:
        """Wait until nothing of it is written to memory any more."""
        if self._destination is not None:
            self._destination.give_up()
        wait([reading for _, reading in self._begun if reading is not None])
        self._file.close()


def _groups(
    specs: Sequence[TensorSpec], taken: Collection[str]
) -> Iterator[list[TensorSpec]]:
    """Yield tensors that follow each other and are to be read at once."""
    group: list[TensorSpec] = []
    nbytes = 0
    for spec in specs:
        is_alone = spec.name not in taken
        if group and (is_alone or nbytes >= READ_NBYTES):
            yield group
            group, nbytes = [], 0
        group.append(spec)
        # Nothing joins one that is read in another way.
        nbytes += READ_NBYTES if is_alone else spec.nbytes
    if group:
        yield group


def _load_arrays(
    path: Path, header: BlobHeader, taken: Collection[str]
) -> dict[str, "mx.array"]:
    """Return the tensors of a blob but for its ids and what a destination takes."""
    import mlx.core as mx

    wanted = {spec.name for spec in header.tensors} - {*taken, TOKEN_IDS}
    if not wanted:
        return {}
    loaded: dict[str, mx.array] = mx.load(str(path))
    arrays = {name: loaded[name] for name in wanted}
    mx.eval(arrays)
    return arrays


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
    parts = [(s.layout[name], s.rows(name, 0, position)) for s in _with_rows(segments)]
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
    tensors = [_name(name, tensor) for tensor in tensor_names(type(part).__name__)]
    for segment in _with_rows(segments):
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
    found = [s for s in _with_rows(segments) if s.stop > first]
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


def _with_rows(segments: Sequence[LoadedSegment]) -> list[LoadedSegment]:
    return [segment for segment in segments if segment.start < segment.stop]


def _check_class(part: Any, kept: PartLayout, class_name: str) -> None:
    if kept.class_name != class_name:
        raise DamagedBlobError(
            f"blob holds a {kept.class_name!r} in place of a {type(part).__name__}"
        )
