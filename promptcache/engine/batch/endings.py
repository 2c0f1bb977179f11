"""Endings: requests that are over, until what is kept of them is saved."""

import time

from promptcache.engine.batch.run import Run
from promptcache.errors import warn

# What the end of an answer waits for its prompt to be stored: it has been told by then,
# and a disk that takes longer shall not keep who waits for it.
SAVE_SECONDS = 0.5


class Endings:
    """Saves what was read of requests that are over, and tells that they have ended.

    Without an error that is told when they are saved, or when that takes long.
    """

    def __init__(self) -> None:
        self._runs: list[Run] = []

    def __len__(self) -> int:
        return len(self._runs)

    def add(self, run: Run, error: Exception | None = None) -> None:
        """Begin to save a request; no step of it may be under way."""
        run.pieces = run.steps = None
        run.ends_at = time.monotonic() + SAVE_SECONDS
        if error is not None:
            _tell(run, error)
        if hasattr(run.generation, "state"):
            try:
                run.generation.keeper.finish()
            except Exception as failure:
                warn(f"a prompt is not kept: {failure}")
        self._runs.append(run)

    def advance(self) -> None:
        """Tell the ends that are due."""
        now = time.monotonic()
        for run in [*self._runs]:
            is_settled = _is_settled(run)
            if is_settled or now >= run.ends_at:
                _tell(run)
            if is_settled:
                self._runs.remove(run)


def _is_settled(run: Run) -> bool:
    """Return whether nothing of a request is to be saved any more."""
    if not hasattr(run.generation, "state"):
        return True
    if not run.generation.keeper.is_settled:
        return False
    try:
        run.generation.keeper.settle()
    except Exception as failure:
        warn(f"a prompt is not saved: {failure}")
    return True


def _tell(run: Run, error: Exception | None = None) -> None:
    if run.is_told:
        return
    run.is_told = True
    try:
        run.listener.on_end(error)
    except Exception as failure:
        warn(f"nobody takes the end of a request: {failure}")
