"""Destinations: arrays with room for a prompt, which blobs' rows are read into.

Rows that are read to where they are used are in memory once, and copied by nobody.
That takes half of the time of reading them and joining them after: the pages of new
memory cost more than the bytes (Linux, 4 KB pages).
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

from promptcache.types import TensorSpec

if TYPE_CHECKING:
    import mlx.core as mx

# Reads of one blob at a time; more do not help from two cores on.
NUM_READERS = 2
# How many buffers a read takes at once; POSIX promises 16, Linux and macOS take 1024.
MOST_BUFFERS = 512
# Dtypes of keys and values, in safetensors' spelling and in mlx's.
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}

Buffers = list[memoryview]


class Destination:
    """Keys and values of the plain parts of a cache, for all segments of a match.

    Only with MLX's CPU backend, where an array's memory can be written to.

    Invariants:
        An array is written to before anything is computed from it.
    """

    def __init__(self, cache_parts: Mapping[str, Any], room: int) -> None:
        """Take the parts of a fresh cache by name, and for how many tokens to allocate.

        Nothing is allocated yet.
        """
        import mlx.core as mx

        self._room = room
        self._steps: dict[str, int] = {}
        if mx.default_device() == mx.Device(mx.cpu):
            self._steps = {
                f"layers.{name}.{tensor}": part.step
                for name, part in cache_parts.items()
                if type(part).__name__ == "KVCache"
                for tensor in ("keys", "values")
            }
        self._arrays: dict[str, mx.array] = {}
        self._pool = ThreadPoolExecutor(NUM_READERS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown()
        self._arrays.clear()

    def array(self, name: str) -> "mx.array | None":
        """Return the array of a tensor, shape `(1, kv_heads, capacity, head_dim)`."""
        return self._arrays.get(name)

    def prepare(self, specs: Sequence[TensorSpec]) -> set[str]:
        """Allocate what is missing; return the names of the tensors that it takes."""
        new = [s for s in specs if s.name not in self._arrays and self._is_plain(s)]
        self._arrays |= dict(zip((s.name for s in new), self._zeros(new), strict=True))
        return {spec.name for spec in specs if self._fits(spec)}

    def _is_plain(self, spec: TensorSpec) -> bool:
        is_known = spec.name in self._steps and spec.dtype in DTYPES
        # Some models have keys or values of no width.
        return is_known and len(spec.shape) == 4 and spec.nbytes > 0

    def _zeros(self, specs: Sequence[TensorSpec]) -> "list[mx.array]":
        """Return zeros with room, written by two threads of MLX's."""
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        streams = (mx.default_stream(mx.cpu), generation_stream)
        arrays = []
        for i, spec in enumerate(specs):
            step = self._steps[spec.name]
            shape = list(spec.shape)
            shape[-2] = math.ceil(self._room / step) * step
            dtype = getattr(mx, DTYPES[spec.dtype])
            arrays.append(mx.zeros(shape, dtype, stream=streams[i % 2]))
        mx.eval(arrays)
        return arrays

    def _fits(self, spec: TensorSpec) -> bool:
        """Return whether rows of this shape and dtype go into the array."""
        array = self._arrays.get(spec.name)
        if array is None or not self._is_plain(spec):
            return False
        *outer, _, width = array.shape
        same_shape = [*spec.shape[:2], spec.shape[3]] == [*outer, width]
        return same_shape and str(array.dtype) == f"mlx.core.{DTYPES[spec.dtype]}"

    def read(
        self, descriptor: int, offset: int, spec: TensorSpec, start: int, stop: int
    ) -> "Future[Buffers]":
        """Read a tensor of the rows from `start` on, of which those to `stop` are kept.

        Args:
            descriptor: The blob's file.
            offset: Where the tensor begins in it.
            spec: The tensor.
            start: Its first row.
            stop: The row after the last one to keep.

        Returns:
            All of its bytes in their order, once they are read. Raises OSError.
        """
        buffers = list(self._buffers(spec, start, stop))
        return self._pool.submit(_read, descriptor, offset, buffers)

    def _buffers(self, spec: TensorSpec, start: int, stop: int) -> Iterator[memoryview]:
        array = self._arrays[spec.name]
        _, heads, num_rows, _ = spec.shape
        capacity = array.shape[-2]
        memory = memoryview(array).cast("B")
        row_nbytes = len(memory) // (heads * capacity)
        for head in range(heads):
            first = head * capacity + start
            yield memory[first * row_nbytes : (first + stop - start) * row_nbytes]
            if rest := (num_rows - (stop - start)) * row_nbytes:
                # Not wanted, but needed to check what is.
                yield memoryview(bytearray(rest))


def read_bytes(descriptor: int, offset: int, nbytes: int) -> Buffers:
    """Read bytes of a file into new memory. Raises OSError."""
    return _read(descriptor, offset, [memoryview(bytearray(nbytes))])


def _read(descriptor: int, offset: int, buffers: Buffers) -> Buffers:
    left = [buffer for buffer in buffers if len(buffer)]
    while left:
        num_read = os.preadv(descriptor, left[:MOST_BUFFERS], offset)
        if not num_read:
            raise EOFError("blob is truncated")
        offset += num_read
        left = list(_after(left, num_read))
    return buffers


def _after(buffers: Buffers, num_read: int) -> Iterator[memoryview]:
    """Yield what is left of buffers after so many bytes."""
    for buffer in buffers:
        if num_read < len(buffer):
            yield buffer[num_read:]
        num_read = max(num_read - len(buffer), 0)
