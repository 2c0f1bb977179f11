"""Single flight: requests that wait while another one reads what they need."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from promptcache.server.backend.request_state import RequestState, ServedRequest

# What is shared by less is read again: templates begin alike.
MIN_SHARED_TOKENS = 32
# Whether a request can go on changes when another one has come further; that is told.
# Without, it is looked at so often.
LOOK_SECONDS = 0.2
# mlx-lm's: the queue of the answers, the request and its arguments.
Job = tuple[Any, ServedRequest, Any]


class SingleFlight:
    """The requests that wait, in the order in which they came."""

    def __init__(self, must_wait: Callable[[RequestState], bool]) -> None:
        self._must_wait = must_wait
        self._waiting: deque[tuple[Job, RequestState]] = deque()
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def holds(self, job: Job, reading: RequestState) -> bool:
        """Hold a request if it has to wait, and return whether it is held."""
        if not self._must_wait(reading):
            return False
        self._waiting.append((job, reading))
        return True

    def look(self) -> None:
        """Have the requests that wait looked at, as something has changed."""
        self._look_at = 0.0

    def is_due(self) -> bool:
        """Return whether they are to be looked at."""
        return bool(self._waiting) and time.monotonic() >= self._look_at

    def release(self) -> Job | None:
        """Return a request that can go on, if there is one."""
        if not self.is_due():
            return None
        for i, (job, reading) in enumerate(self._waiting):
            if reading.over.is_set() or not self._must_wait(reading):
                del self._waiting[i]
                return job
        self._look_at = time.monotonic() + LOOK_SECONDS
        return None
