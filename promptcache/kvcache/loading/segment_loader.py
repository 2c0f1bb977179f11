"""Reading: a segment's blob into memory, checked against what was written.

It lets mlx read the blob, or a destination, where rows are to lie in place. What
becomes of them is the codec's business.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.kvcache.layout import (
    TOKEN_IDS,
    Layout,
    decode_layout,
    name_in_blob,
)
from promptcache.kvcache.loading.row_buffers import RowBuffers, TensorRead
from promptcache.kvcache.row_quantization import PIECES, QuantizedFormat, unpacked_rows
from promptcache.segments.blob_format import BlobHeader, combined_checksum, digest
from promptcache.segments.types import SegmentSlice, TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx

# Smaller tensors are read together.
READ_NBYTES = 4 * 1024**2


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
    destination: RowBuffers | None = None
    taken: Collection[str] = ()

    def array(self, tensor: str) -> "mx.array":
        """Return a tensor's rows, wherever they were read to. Raises KeyError."""
        if self.destination is None or tensor not in self.taken:
            return self.arrays[tensor]
        array = self.destination.array(tensor)
        assert array is not None
        return array[..., self.start : self.stop, :]

    def rows(self, name: str, start: int, stop: int) -> list["mx.array"]:
        """Return what it has of the rows `[start, stop)` of a part, tensor by tensor.

        Raises:
            DamagedBlobError: It has none of this part.
        """
        first, last = max(start, self.start), min(stop, self.stop)
        rows_read = slice(first - self.start, last - self.start)
        part = self.layout[name]
        try:
            return [
                self._rows_of(
                    name_in_blob(name, tensor), part.at_rest.get(tensor), rows_read
                )
                for tensor in part.tensor_names
            ]
        except KeyError as error:
            raise DamagedBlobError(f"blob has no {error}") from error

    def _rows_of(
        self, tensor: str, at_rest: QuantizedFormat | None, wanted: slice
    ) -> "mx.array":
        if at_rest is None:
            return self.array(tensor)[..., wanted, :]
        pieces = {p: self.arrays[f"{tensor}.{p}"][..., wanted, :] for p in PIECES}
        return unpacked_rows(pieces, at_rest)


def load(
    path: Path,
    header: BlobHeader,
    part: SegmentSlice,
    token_ids: bytes,
    destination: RowBuffers | None = None,
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
    return SegmentLoad(path, header, part, token_ids, destination).finish()


class SegmentLoad:
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
        destination: RowBuffers | None = None,
    ) -> None:
        self._header = header
        self._part = part
        self._token_ids = token_ids
        self._destination = destination
        self._layout = decode_layout(header.layout)
        specs = header.tensors
        self._taken = set() if destination is None else destination.prepare(specs)
        self._arrays: dict[str, mx.array] = {}
        self._blob_ids = b""
        self._begun: list[tuple[TensorRead, Future[list[bytes]] | None]] = []
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
        return self._destination is not None and self._destination.reads_every_tensor

    def _jobs(self) -> Iterator[TensorRead]:
        """Yield what is to be read at once."""
        offset = self._header.data_start
        for specs in _groups(self._header.tensors, self._taken):
            place = (self._file.fileno(), offset, specs)
            job = TensorRead(*place, self._part.start, self._part.stop)
            yield job
            offset += job.nbytes

    def _begin(self, job: TensorRead) -> "Future[list[bytes]] | None":
        """Begin to read, unless that has been done already."""
        [spec, *_] = job.specs
        if spec.name == TOKEN_IDS:
            self._blob_ids = os.pread(job.descriptor, spec.nbytes, job.offset)
        elif self._takes_all or spec.name in self._taken:
            assert self._destination is not None
            return self._destination.read(job)
        return None

    def _settle(
        self, job: TensorRead, reading: "Future[list[bytes]] | None"
    ) -> list[bytes]:
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
        if combined_checksum(digests) != self._header.data_checksum:
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

    names = {spec.name for spec in header.tensors} - {*taken, TOKEN_IDS}
    if not names:
        return {}
    loaded: dict[str, mx.array] = mx.load(str(path))
    arrays = {name: loaded[name] for name in names}
    mx.eval(arrays)
    return arrays


def with_rows(segments: Sequence[LoadedSegment]) -> list[LoadedSegment]:
    """Return the segments but for a checkpoint."""
    return [segment for segment in segments if segment.start < segment.stop]
