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
        self._max_nbytes = max_nbytes
        self._queued_nbytes = 0
        self._space_freed = threading.Condition()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="promptcache-writer")

    @property
    def queued_nbytes(self) -> int:
        """Return the bytes of the jobs that wait or run."""
        return self._queued_nbytes

    def submit(self, job: Callable[[], None], nbytes: int) -> "Future[None]":
        """Run a job that holds so many bytes, once there is room for them."""
        with self._space_freed:
            self._space_freed.wait_for(lambda: self.has_room(nbytes))
            self._queued_nbytes += nbytes
        try:
            future = self._pool.submit(job)
        except BaseException:
            self._release(nbytes)
            raise
        future.add_done_callback(lambda _: self._release(nbytes))
        return future

    def has_room(self, nbytes: int) -> bool:
        """Return whether a job of so many bytes would not have to wait."""
        queued = self._queued_nbytes
        return not (queued and nbytes) or queued + nbytes <= self._max_nbytes

    def _release(self, nbytes: int) -> None:
        with self._space_freed:
            self._queued_nbytes -= nbytes
            self._space_freed.notify_all()

    def wait(self) -> None:
        """Wait until all jobs that were submitted so far are done."""
        self.submit(lambda: None, 0).result()

    def close(self) -> None:
        """Finish all jobs and end the thread."""
        self._pool.shutdown()
