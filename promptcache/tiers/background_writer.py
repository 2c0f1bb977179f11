"""The writer: one thread that writes what others have encoded.

It gets plain bytes, because an array can be evaluated only on the thread whose
stream it was computed on.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

# What may wait for the disk at most: two pieces of 2,048 tokens of a model with
# 8 billion parameters.
MAX_QUEUED_NBYTES = 512 * 1024**2


class BackgroundWriter:
    """Runs jobs one after the other, in the order they come in.

    Invariants:
        The bytes of all jobs that wait or run fit into `max_nbytes`, unless there is
        only one.
    """

    def __init__(self, max_nbytes: int = MAX_QUEUED_NBYTES) -> None:
        """Take how many bytes may wait; the thread starts with the first job."""
        self._max_nbytes = max_nbytes
        self._queued_nbytes = 0
        self._has_less = threading.Condition()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="promptcache-writer")

    @property
    def queued_nbytes(self) -> int:
        """Return the bytes of the jobs that wait or run."""
        return self._queued_nbytes

    def is_full(self) -> bool:
        """Return whether a job of half of what may wait would have to wait itself."""
        return self._queued_nbytes > self._max_nbytes // 2

    def submit(self, job: Callable[[], None], nbytes: int) -> "Future[None]":
        """Run a job that holds so many bytes, once there is room for them."""
        with self._has_less:
            self._has_less.wait_for(lambda: self.has_room(nbytes))
            self._queued_nbytes += nbytes
        future = self._pool.submit(job)
        future.add_done_callback(lambda _: self._release(nbytes))
        return future

    def has_room(self, nbytes: int) -> bool:
        """Return whether a job of so many bytes would not have to wait."""
        queued = self._queued_nbytes
        return queued == 0 or queued + nbytes <= self._max_nbytes

    def _release(self, nbytes: int) -> None:
        with self._has_less:
            self._queued_nbytes -= nbytes
            self._has_less.notify_all()

    def close(self) -> None:
        """Finish all jobs and end the thread."""
        self._pool.shutdown()
