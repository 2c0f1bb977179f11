"""Uploading: rows to where the GPU uses them, at the speed of the bus.

MLX's CUDA backend computes in memory of the device, which the host cannot write to, and
copies from ordinary host memory at a sixth of what the bus can do. So blobs are read
into slots: a ring of host memory that stays where it is, and that the GPU reads from.
Readers are threads that know nothing of MLX; the calling thread copies what they have
read, and the slots are used again.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from promptcache.kvcache.loading.row_buffers import RowBuffers, Settled, TensorRead
from promptcache.segments.dtypes import MLX_DTYPES
from promptcache.segments.types import TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx

# From eight readers on, memory is what they wait for (16 cores, one H200).
MAX_READERS = 8
STAGING_NBYTES = 64 * 1024**2
# Of slots in the ring.
ALIGNMENT = 256
# Of CUDA's driver: see `cuMemAdvise`.
PREFERRED_LOCATION, ACCESSED_BY = 3, 5
HOST, FIRST_GPU = -1, 0
# The ring is the process's, and so is the turn to use it.
_loading = threading.Lock()


def make_buffers(cache_parts: Mapping[str, Any], room: int) -> RowBuffers | None:
    """Return what reads rows into a fresh cache's parts on this backend, if any does.

    Args:
        cache_parts: The parts by name.
        room: For how many tokens to allocate.
    """
    import mlx.core as mx

    if mx.default_device() == mx.Device(mx.cpu):
        return RowBuffers(cache_parts, room)
    if mx.cuda.is_available():
        return CudaRowBuffers(cache_parts, room)
    return None


class StagingRing:
    """Host memory that the GPU reads over the bus."""

    def __init__(self) -> None:
        import mlx.core as mx

        self._array = mx.zeros((STAGING_NBYTES,), mx.uint8, stream=mx.cpu)
        mx.eval(self._array)
        self._memory = memoryview(self._array)
        _keep_on_host(self._memory)

    def memory(self, begin: int, end: int) -> memoryview:
        """Return some of its bytes, to write to."""
        return self._memory[begin:end]

    def array(self, begin: int, end: int) -> "mx.array":
        """Return some of its bytes, where they are."""
        return self._array[begin:end]


def _keep_on_host(memory: memoryview) -> None:
    """Let the GPU read managed memory where it is; else its pages move to and fro.

    That is four times as fast; without it, all works the same.
    """
    with contextlib.suppress(OSError, AttributeError):
        cuda = ctypes.CDLL("libcuda.so.1")
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for advice, device in ((PREFERRED_LOCATION, HOST), (ACCESSED_BY, FIRST_GPU)):
            place = (ctypes.c_uint64(address), ctypes.c_size_t(len(memory)))
            cuda.cuMemAdvise(*place, advice, device)


@functools.cache
def _ring() -> StagingRing:
    # For the life of the process: of memory that is given back MLX would make arrays,
    # and the advice would keep these on the host.
    return StagingRing()


def _tensor(slot: "StagingSlot", offset: int, spec: TensorSpec) -> "mx.array":
    """Return a tensor that begins so far behind a slot's begin, where it is."""
    import mlx.core as mx
    import numpy as np

    dtype = getattr(mx, MLX_DTYPES[spec.dtype])
    if not spec.nbytes:
        return mx.zeros(spec.shape, dtype)
    if slot.end:
        begin = slot.begin + offset
        raw = _ring().array(begin, begin + spec.nbytes)
    else:
        raw = mx.array(np.frombuffer(slot.memory[offset:][: spec.nbytes], np.uint8))
    return raw.view(dtype).reshape(spec.shape)


def _copied(array: "mx.array") -> "mx.array":
    """Return an array with all of another one's bits, in memory of its own."""
    import mlx.core as mx

    if not array.size:
        return array
    raw = array.reshape(-1).view(mx.uint8)
    return (raw | 0).view(array.dtype).reshape(array.shape)


class StagingSlot(NamedTuple):
    """A piece of the ring for one job, or other memory where the ring is too small.

    Attributes:
        number: Which job it is for.
        begin: Where it begins in the ring.
        end: Where it ends.
        memory: What to read to.
        after: The last job whose slot it takes; that has to be settled before.
    """

    number: int
    begin: int
    end: int
    memory: memoryview
    after: int


class CudaRowBuffers(RowBuffers):
    """A destination in the memory of a CUDA device.

    Invariants:
        A slot is written to only when all that is computed from it has been.
    """

    reads_every_tensor = True
    num_readers = min(MAX_READERS, os.cpu_count() or 1)

    def __init__(self, cache_parts: Mapping[str, Any], room: int) -> None:
        """Take the parts of a fresh cache by name, and for how many tokens to allocate.

        Nothing is allocated yet.
        """
        # Rows never fill an array: what is assigned to all of one is not copied, and
        # would stay in its slot.
        super().__init__(cache_parts, room + 1)
        self._slots: deque[StagingSlot] = deque()
        self._begin = 0
        self._num_begun = 0
        self._num_settled = 0
        self._is_settled = threading.Condition()
        # What has been assigned and not computed yet, and of how many bytes it is.
        self._assigned: list[mx.array] = []
        self._num_assigned = 0

    def __enter__(self) -> Self:
        """Wait until no other thread loads."""
        _loading.acquire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.give_up()
            super().__exit__(*exc_info)
        finally:
            _loading.release()

    def _zeros(self, specs: Sequence[TensorSpec]) -> "list[mx.array]":
        import mlx.core as mx

        def zeros(spec: TensorSpec) -> mx.array:
            room = max(self._room, spec.shape[2] + 1)
            shape = (*spec.shape[:2], room, spec.shape[3])
            return mx.zeros(shape, getattr(mx, MLX_DTYPES[spec.dtype]))

        return [zeros(spec) for spec in specs]

    def read(self, job: TensorRead) -> "Future[list[bytes]]":
        """Begin to read into the next slot, once that is free."""
        slot = self._next_slot(job.nbytes)
        self._slots.append(slot)
        return self._pool.submit(self._read, job, slot)

    def _next_slot(self, nbytes: int) -> StagingSlot:
        number = self._num_begun
        self._num_begun += 1
        if nbytes > STAGING_NBYTES // 2:
            return StagingSlot(number, 0, 0, memoryview(bytearray(nbytes)), -1)
        if self._begin + nbytes > STAGING_NBYTES:
            self._begin = 0
        begin, end = self._begin, self._begin + nbytes
        self._begin = -(-end // ALIGNMENT) * ALIGNMENT
        before = [s for s in self._slots if s.begin < end and s.end > begin]
        after = max((slot.number for slot in before), default=-1)
        return StagingSlot(number, begin, end, _ring().memory(begin, end), after)

    def _read(self, job: TensorRead, slot: StagingSlot) -> list[bytes]:
        with self._is_settled:
            self._is_settled.wait_for(lambda: self._num_settled > slot.after)
        ends = itertools.accumulate(spec.nbytes for spec in job.specs)
        return job.read(
            [
                [slot.memory[end - spec.nbytes : end]]
                for spec, end in zip(job.specs, ends, strict=True)
            ]
        )

    def settle(self, job: TensorRead, reading: "Future[list[bytes]]") -> Settled:
        """Wait until a job is done, and copy what it read."""
        if not reading.done():
            # It may wait for a slot that is not free until this is done.
            self._compute()
        digests = reading.result()
        slot = self._slots.popleft()
        others = {}
        offset = 0
        for spec in job.specs:
            tensor = _tensor(slot, offset, spec)
            if self._fits(spec):
                rows = tensor[..., : job.stop - job.start, :]
                self._arrays[spec.name][..., job.start : job.stop, :] = rows
                self._assigned.append(self._arrays[spec.name])
            else:
                # All bits stay, and it gets memory of its own.
                others[spec.name] = _copied(tensor)
                self._assigned.append(others[spec.name])
            offset += spec.nbytes
        self._num_assigned += offset
        if self._num_assigned > STAGING_NBYTES // 4:
            self._compute()
        return Settled(digests, others)

    def _compute(self) -> None:
        """Let the GPU copy what was assigned, and give the slots back."""
        import mlx.core as mx

        mx.eval(self._assigned)
        self._assigned.clear()
        self._num_assigned = 0
        free = self._slots[0].number if self._slots else self._num_begun
        self._settle_to(free)

    def _settle_to(self, number: int) -> None:
        with self._is_settled:
            self._num_settled = max(self._num_settled, number)
            self._is_settled.notify_all()

    def finish(self) -> None:
        """Wait until all that was settled is where it belongs."""
        self._compute()

    def give_up(self) -> None:
        """Let no job wait any more for one that is not going to be settled."""
        self._compute()
        self._slots.clear()
        self._settle_to(self._num_begun)
