"""Array digests: hashes of the content of a model's arrays, on several threads."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import ref

import xxhash

# Of 8 MiB, XXH3 needs a millisecond: enough to be worth a thread's while, and all
# threads have something to do also with a single large array.
PIECE_NBYTES = 8 * 1024**2
# How much is looked at before anything of it is given up: where arrays lie in another
# memory, or not in order, this much is copied.
BATCH_NBYTES = 256 * 1024**2
# What is not done after this many seconds is told.
LONG_SECONDS = 1.0


class ArrayDigests:
    """The digests of arrays, remembered as long as these live.

    An array that is changed in place keeps the digest that it had, until `forget`.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self._announce = announce
        self._by_id: dict[int, tuple[Callable[[], Any], bytes]] = {}

    def of(self, arrays: Iterable[Any]) -> list[bytes]:
        """Return the digest of each array's bytes, in the order of its elements."""
        arrays = list(arrays)
        unique = {id(array): array for array in arrays}
        living = {i: self._by_id[i] for i in unique.keys() & self._by_id.keys()}
        current = {i: d for i, d in living.items() if d[0]() is unique[i]}
        new = {i: array for i, array in unique.items() if i not in current}
        digests = self._hashed([*new.values()])
        found = zip(new.items(), digests, strict=True)
        self._by_id = current | {i: (ref(array), d) for (i, array), d in found}
        return [self._by_id[id(array)][1] for array in arrays]

    def forget(self) -> None:
        """Forget all digests, as arrays may have been changed in place."""
        self._by_id.clear()

    def _hashed(self, arrays: list[Any]) -> Iterator[bytes]:
        started, is_told = time.perf_counter(), False
        with ThreadPoolExecutor(thread_name_prefix="promptcache-hash") as pool:
            for batch in _batches(arrays):
                if not is_told and time.perf_counter() - started > LONG_SECONDS:
                    is_told = True
                    nbytes = sum(array.nbytes for array in arrays)
                    self._announce(f"hashing {nbytes / 1e9:.1f} GB of weights")
                yield from _digests(batch, pool)


def _batches(arrays: Iterable[Any]) -> Iterator[list[Any]]:
    """Yield the arrays in lists of `BATCH_NBYTES`, or of one that is larger."""
    batch: list[Any] = []
    nbytes = 0
    for array in arrays:
        if batch and nbytes + array.nbytes > BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(array)
        nbytes += array.nbytes
    if batch:
        yield batch


def _digests(arrays: Iterable[Any], pool: ThreadPoolExecutor) -> list[bytes]:
    """Hash arrays, which are evaluated on this thread; others see plain bytes."""
    import mlx.core as mx

    views: list[Any] = [
        mx.contiguous(array).flatten().view(mx.uint8) for array in arrays
    ]
    if mx.default_device().type != mx.DeviceType.cpu:
        # A copy: what the host looks at leaves the device's own memory.
        views = [view | 0 for view in views]
    mx.eval(views)
    pieces = [
        [pool.submit(xxhash.xxh3_128_digest, p) for p in _pieces(memoryview(view))]
        for view in views
    ]
    return [
        xxhash.xxh3_128_digest(b"".join(job.result() for job in jobs))
        for jobs in pieces
    ]


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, data.nbytes, PIECE_NBYTES):
        yield data[start : start + PIECE_NBYTES]
