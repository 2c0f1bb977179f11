"""Destinations: arrays with room for a prompt, which blobs' rows are read into.

Rows that are read to where they are used are in memory once, and copied by nobody.
That takes half of the time of reading them and joining them after: the pages of new
memory cost more than the bytes (Linux, 4 KB pages).
"""

import itertools
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from promptcache.kvcache.classes import PLAIN_TENSORS, is_plain
from promptcache.segments.blob_format import digest
from promptcache.segments.dtypes import FLOAT_DTYPES
from promptcache.segments.types import TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx

# Reads at a time; more do not help from two cores on.
NUM_READERS = 2
# Less is read by the thread that wants it.
MIN_NBYTES = 3 * 1024**2
# How many buffers a read takes at once; POSIX promises 16, Linux and macOS take 1024.
MAX_BUFFERS = 512
# How many arrays to zero ahead of the reads: enough to keep two threads busy, and few
# enough to be in the processor's cache still when they are read to.
ZEROED_AHEAD = 4
Buffers = Sequence[memoryview]


class TensorRead(NamedTuple):
    """Some tensors of a blob that follow each other.

    Attributes:
        descriptor: The blob's file.
        offset: Where the first one begins in it.
        specs: The tensors.
        start: Their first row.
        stop: The row after the last one to keep.
    """

    descriptor: int
    offset: int
    specs: Sequence[TensorSpec]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Return how many bytes they take in the file."""
        return sum(spec.nbytes for spec in self.specs)

    def read(self, buffers: Sequence[Buffers]) -> list[bytes]:
        """Read each tensor into its buffers; return the digest of each.

        Raises OSError and EOFError.
        """
        _read(self.descriptor, self.offset, [*itertools.chain.from_iterable(buffers)])
        return [digest(some) for some in buffers]


class Settled(NamedTuple):
    """What became of a job.

    Attributes:
        digests: Of each tensor's bytes.
        others: The tensors that have no array in the destination, by name.
    """

    digests: list[bytes]
    others: "Mapping[str, mx.array]"


class RowBuffers:
    """Keys and values of the plain parts of a cache, for all segments of a match.

    This one is for MLX's CPU backend, where an array's memory can be written to.

    Attributes:
        reads_every_tensor: Whether it reads other tensors, too.

    Invariants:
        An array is written to before anything is computed from it.
    """

    reads_every_tensor = False
    num_readers = NUM_READERS

    def __init__(self, cache_parts: Mapping[str, Any], room: int) -> None:
        """Take the parts of a fresh cache by name, and for how many tokens to allocate.

        Nothing is allocated yet.
        """
        self._room = room
        self._tensors = {
            f"layers.{name}.{tensor}"
            for name, part in cache_parts.items()
            if is_plain(part)
            for tensor in PLAIN_TENSORS
        }
        self._arrays: dict[str, mx.array] = {}
        self._kinds: dict[str, tuple[object, ...]] = {}
        self._memory: dict[str, memoryview] = {}
        # Arrays in the order in which they are going to be read to.
        self._ahead: deque[mx.array] = deque()
        self._pool = ThreadPoolExecutor(self.num_readers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown()
        self._arrays.clear()
        self._memory.clear()

    def array(self, name: str) -> "mx.array | None":
        """Return the array of a tensor, shape `(1, kv_heads, room, head_dim)`."""
        return self._arrays.get(name)

    def prepare(self, specs: Sequence[TensorSpec]) -> set[str]:
        """Make the arrays that are missing; return the names of what goes into them."""
        new = [s for s in specs if s.name not in self._arrays and self._is_plain(s)]
        zeros = self._zeros(new)
        self._arrays |= dict(zip((spec.name for spec in new), zeros, strict=True))
        self._kinds |= {spec.name: _kind(spec) for spec in new}
        self._ahead.extend(zeros)
        return {spec.name for spec in specs if self._fits(spec)}

    def prefault(self) -> None:
        """Begin to zero all arrays that are prepared."""
        import mlx.core as mx

        mx.async_eval(*self._ahead)

    def _is_plain(self, spec: TensorSpec) -> bool:
        is_known = spec.name in self._tensors and spec.dtype in FLOAT_DTYPES
        # Some models have keys or values of no width.
        return is_known and len(spec.shape) == 4 and spec.nbytes > 0

    def _zeros(self, specs: Sequence[TensorSpec]) -> "list[mx.array]":
        """Return zeros with room, to be computed by two threads of MLX's."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        streams = (mx.default_stream(mx.cpu), generation_stream)
        arrays = []
        for i, spec in enumerate(specs):
            shape = [*spec.shape[:2], max(self._room, spec.shape[2]), spec.shape[3]]
            dtype = getattr(mx, FLOAT_DTYPES[spec.dtype])
            arrays.append(mx.zeros(shape, dtype, stream=streams[i % 2]))
        return arrays

    def _fits(self, spec: TensorSpec) -> bool:
        """Return whether rows of this shape and dtype go into the array."""
        return _kind(spec) == self._kinds.get(spec.name)

    def read(self, job: TensorRead) -> "Future[list[bytes]]":
        """Begin to read. The future has the digests, or raises OSError and EOFError."""
        buffers = [self._buffers(spec, job) for spec in job.specs]
        if job.nbytes >= MIN_NBYTES:
            return self._pool.submit(job.read, buffers)
        # Threads would take longer to take turns than this takes.
        reading: Future[list[bytes]] = Future()
        try:
            reading.set_result(job.read(buffers))
        except (OSError, EOFError) as error:
            reading.set_exception(error)
        return reading

    def settle(self, job: TensorRead, reading: "Future[list[bytes]]") -> Settled:
        """Wait until a job is done. Raises what it raised.

        Jobs are settled in the order in which they were begun.
        """
        return Settled(reading.result(), {})

    def finish(self) -> None:
        """Wait until all that was settled is where it belongs."""

    def give_up(self) -> None:
        """Let no job wait any more for one that is not going to be settled."""

    def _buffers(self, spec: TensorSpec, job: TensorRead) -> Buffers:
        """Return where the bytes of a tensor go, head by head."""
        _, heads, num_rows, _ = spec.shape
        memory = self._memory_of(spec.name)
        row_nbytes = spec.nbytes // (heads * num_rows)
        first, last = job.start * row_nbytes, job.stop * row_nbytes
        begins = range(0, len(memory), len(memory) // heads)
        rows = [memory[begin + first : begin + last] for begin in begins]
        rest = num_rows * row_nbytes - (last - first)
        if not rest:
            return rows
        # Not wanted, but needed to check what is.
        unwanted = memoryview(bytearray(rest * heads))
        rests = [unwanted[i * rest : (i + 1) * rest] for i in range(heads)]
        return [*itertools.chain.from_iterable(zip(rows, rests, strict=True))]

    def _memory_of(self, name: str) -> memoryview:
        """Return the memory of an array, which is allocated if it is not yet."""
        import mlx.core as mx

        if name not in self._memory:
            array = self._arrays[name]
            mx.async_eval(*itertools.islice(self._ahead, ZEROED_AHEAD))
            self._ahead.popleft()
            mx.eval(array)
            self._memory[name] = memoryview(array).cast("B")
        return self._memory[name]


def _kind(spec: TensorSpec) -> tuple[object, ...]:
    """Return what two tensors of rows have in common that go into one array."""
    return spec.dtype, len(spec.shape), spec.shape[:2], spec.shape[3:]


def _read(descriptor: int, offset: int, buffers: Buffers) -> None:
    left = buffers
    while left:
        num_read = os.preadv(descriptor, left[:MAX_BUFFERS], offset)
        if not num_read:
            raise EOFError("blob is truncated")
        offset += num_read
        if num_read == sum(map(len, left)):
            return
        left = [*_after(left, num_read)]


def _after(buffers: Buffers, num_read: int) -> Iterator[memoryview]:
    """Yield what is left of buffers after so many bytes."""
    for buffer in buffers:
        if num_read < len(buffer):
            yield buffer[num_read:]
        num_read = max(num_read - len(buffer), 0)
