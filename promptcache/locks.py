"""Locks between processes: how long to wait for one, and who holds it.

Nothing here blocks. A lock is tried again and again, so that a signal ends the wait on
any thread, and a process that is stopped does not stop the others.
"""

import contextlib
import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# Locks are held for milliseconds, and for a second where much is evicted: whoever
# holds one for longer is stopped, or on a disk that hangs.
SAVE_SECONDS = 5.0
# A wait that an interrupted process may add to its end.
HURRIED_SECONDS = 1.0
# Shorter waits are not worth a line.
TELL_SECONDS = 1.0
FIRST_PAUSE_SECONDS, PAUSE_SECONDS, LONG_PAUSE_SECONDS = 0.001, 0.01, 0.05
# Of another process's command, to recognize it by.
COMMAND_LENGTH = 60


class Holder(NamedTuple):
    """A process that holds a lock, as far as the system tells."""

    pid: int
    command: str = ""
    is_stopped: bool = False

    def __str__(self) -> str:
        command = f' "{self.command}"' if self.command else ""
        stopped = ", which is stopped" if self.is_stopped else ""
        return f"process {self.pid}{command}{stopped}"


Who = Callable[[], Holder | None]


class Patience:
    """How long this process waits for others, and who hears of it.

    A process that is stopped is waited for no longer than a save does.

    Attributes:
        seconds: The longest wait for one lock.
        on_wait: Called with a line for people where a wait takes a second.
    """

    def __init__(
        self,
        seconds: float = SAVE_SECONDS,
        on_wait: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start with no wait going on."""
        self.seconds = seconds
        self.on_wait = on_wait
        self._is_over = False
        self._is_hurried = False

    def end(self) -> None:
        """End all waits, on every thread, now and later."""
        self._is_over = True

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """Wait for a moment only, on every thread: this process was interrupted."""
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
        """Yield when to try to get a lock, until that has taken too long.

        Args:
            who: Returns who holds it.
            most: The longest wait, in place of `seconds`.
            tell_after: When to say what is waited for.
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
    descriptor: int,
    path: Path,
    patience: Patience,
    *,
    most: float | None = None,
    tell_after: float = TELL_SECONDS,
) -> None:
    """Lock an open file or folder.

    Raises:
        TimeoutError: Another process holds the lock for too long.
    """
    attempts = patience.attempts(
        lambda: holder_of(path), most=most, tell_after=tell_after
    )
    for _ in attempts:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
    raise TimeoutError(errno.ETIMEDOUT, f"locked by {told(holder_of(path))}")


def told(holder: Holder | None) -> str:
    """Return a holder in words, also one that cannot be known."""
    return str(holder or "another process")


def holder_of(path: Path, first: int = 0, last: int | None = None) -> Holder | None:
    """Return who has locked a file, or the bytes `[first, last]` of it, if known.

    The file is not opened: to close it would drop this process's own POSIX locks.
    Only a file that ends with `.lock` is read, for the number that it may hold.
    """
    try:
        pid = _locking_pid(path.stat(), first, last)
    except (OSError, ValueError):
        # Not on Linux.
        pid = _written_pid(path) if path.suffix == ".lock" else None
    return None if pid is None else _process(pid)


def _locking_pid(status: os.stat_result, first: int, last: int | None) -> int | None:
    """Return who Linux says has locked a file."""
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
    try:
        with open(path, "rb", opener=_opened_for_reading) as file:
            return int(file.read(20))
    except (OSError, ValueError):
        return None


def _opened_for_reading(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _process(pid: int) -> Holder:
    """Return what the system tells of a process."""
    try:
        # What follows the name, which may hold anything.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].strip()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        command = b" ".join([os.path.basename(arguments[0]), *arguments[1:]])
    except OSError:
        # Imported here because most commands can do without.
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
