"""Locks between processes: how long to wait for one, and who holds it.

A lock is tried again and again, so that a signal ends the wait on any thread, and a
process that is stopped does not stop the others.
"""

import contextlib
import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypedDict, Unpack

# Locks are held for milliseconds, and for a second during large evictions. A process
# that holds one for longer is stopped, or its disk hangs.
SAVE_SECONDS = 5.0
# Longest wait of a process that was interrupted.
HURRIED_SECONDS = 1.0
# Shorter waits are not reported.
TELL_SECONDS = 1.0
FIRST_PAUSE_SECONDS, PAUSE_SECONDS, LONG_PAUSE_SECONDS = 0.001, 0.01, 0.05
# Characters of another process's command to show.
COMMAND_LENGTH = 60


class Holder(NamedTuple):
    """A process that holds a lock, as far as the system knows."""

    pid: int
    command: str = ""
    is_stopped: bool = False

    def __str__(self) -> str:
        command = f' "{self.command}"' if self.command else ""
        stopped = ", which is stopped" if self.is_stopped else ""
        return f"process {self.pid}{command}{stopped}"


Who = Callable[[], Holder | None]


class Limits(TypedDict, total=False):
    """The longest wait in seconds, and when to report it; see `Patience.attempts`."""

    most: float | None
    tell_after: float


class Patience:
    """How long to wait for locks of other processes, and how to report it.

    The wait for a process that is stopped is at most `SAVE_SECONDS`.

    Attributes:
        seconds: The longest wait for one lock.
        on_wait: Called with a line for people once a wait takes a second.
    """

    def __init__(
        self,
        seconds: float = SAVE_SECONDS,
        on_wait: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.seconds = seconds
        self.on_wait = on_wait
        self._is_over = False
        self._is_hurried = False

    def end(self) -> None:
        """End all waits, on every thread, now and later."""
        self._is_over = True

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """Limit all waits to `HURRIED_SECONDS`, on every thread."""
        self._is_hurried = True
        try:
            yield
        finally:
            self._is_hurried = False

    def attempts(
        self,
        who: Who,
        *,
        most: float | None = None,
        tell_after: float = TELL_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Iterator[None]:
        """Yield whenever a lock should be tried, until the wait is too long.

        Args:
            who: Returns the holder of the lock.
            most: The longest wait, in place of `seconds`.
            tell_after: Report the holder after this many seconds.
            sleep: Waits between two attempts.
        """
        started = time.monotonic()
        pause, look_at = FIRST_PAUSE_SECONDS, tell_after
        while True:
            yield
            waited = time.monotonic() - started
            if waited >= self._limit(most):
                return
            if waited >= look_at:
                holder = who()
                if look_at == tell_after:
                    self.on_wait(f"waiting for {told(holder)}")
                if holder and holder.is_stopped and waited >= SAVE_SECONDS:
                    return
                look_at = waited + TELL_SECONDS
                pause = LONG_PAUSE_SECONDS
            sleep(pause)
            pause = max(pause, min(2 * pause, PAUSE_SECONDS))

    def _limit(self, most: float | None) -> float:
        if self._is_over:
            return 0.0
        limit = self.seconds if most is None else most
        return min(limit, HURRIED_SECONDS if self._is_hurried else math.inf)


def lock(
    descriptor: int, path: Path, patience: Patience, **limits: Unpack[Limits]
) -> None:
    """Lock an open file or folder.

    Raises TimeoutError if another process holds the lock for too long.
    """
    for _ in patience.attempts(lambda: holder_of(path), **limits):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
    raise TimeoutError(errno.ETIMEDOUT, f"locked by {told(holder_of(path))}")


def told(holder: Holder | None) -> str:
    """Return a holder in words, "another process" if it is not known."""
    return str(holder or "another process")


def holder_of(path: Path, first: int = 0, last: int | None = None) -> Holder | None:
    """Return the process that has a file or its bytes `[first, last]` locked, if known.

    The file is not opened: closing it would drop this process's own POSIX locks.
    Only a file that ends with `.lock` is read, for the process id in it.
    """
    try:
        pid = _locking_pid(path.stat(), first, last)
    except (OSError, ValueError):
        # Not on Linux.
        pid = _written_pid(path) if path.suffix == ".lock" else None
    return None if pid is None else _process(pid)


def _locking_pid(status: os.stat_result, first: int, last: int | None) -> int | None:
    device, inode = status.st_dev, status.st_ino
    name = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    for line in Path("/proc/locks").read_text().splitlines():
        # `1: FLOCK ADVISORY WRITE pid device:inode start end`; `->` if it waits.
        fields = line.split()
        if fields[1] == "->" or fields[5] != name or int(fields[4]) <= 0:
            continue
        start, end = int(fields[6]), fields[7]
        is_before = end != "EOF" and int(end) < first
        if not is_before and (last is None or start <= last):
            return int(fields[4])
    return None


def _written_pid(path: Path) -> int | None:
    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)

    try:
        with open(path, "rb", opener=opener) as file:
            return int(file.read(20))
    except (OSError, ValueError):
        return None


def _process(pid: int) -> Holder:
    try:
        # What follows the name, which may contain anything.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].strip()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        command = b" ".join([os.path.basename(arguments[0]), *arguments[1:]])
    except OSError:
        # Imported here because most commands do not need it.
        import subprocess

        ps = ["ps", "-o", "state=,command=", "-p", str(pid)]
        try:
            output = subprocess.run(ps, capture_output=True).stdout
        except OSError:
            return Holder(pid)
        state, _, rest = output.decode(errors="replace").strip().partition(" ")
        command = rest.encode()
    text = command.decode(errors="replace")[:COMMAND_LENGTH].strip()
    visible = "".join(c if c.isprintable() else "?" for c in text)
    return Holder(pid, visible, state.upper().startswith("T"))
