"""Every step that a process takes on the disk, to stop it or to fail it at one.

A step is a call that changes a file or a folder, half of a write, or a statement
that changes the index. They are counted in the tests only: the calls are wrapped, the
code under test knows nothing of it.
"""

import contextlib
import io
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

WRITING = os.O_CREAT | os.O_WRONLY | os.O_RDWR
READING = ("SELECT", "WITH", "PRAGMA USER_VERSION\n", "PRAGMA BUSY_TIMEOUT")
# As `Path` and the library call them: what changes a name takes a path first.
CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "chmod")


class Step(NamedTuple):
    """What is about to be done, and to which file; of a statement, its text."""

    deed: str
    subject: str


OnStep = Callable[[Step], None]


class _File(io.BufferedWriter):
    """A file that is being written, without a buffer that hides when."""

    def __init__(self, descriptor: int, on_step: OnStep, path: str) -> None:
        super().__init__(io.FileIO(descriptor, "wb"))
        self._on_step = on_step
        self._path = path

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        half = len(view) // 2
        for part in filter(len, (view[:half], view[half:])):
            self._on_step(Step("write", self._path))
            super().write(part)
            self.flush()
        return len(view)


def _connection(
    on_step: OnStep, skipped: tuple[str, ...] = READING
) -> type[sqlite3.Connection]:
    """Return a class of connections that tell their statements."""

    def told(sql: str) -> None:
        text = " ".join(sql.split())
        if not text.upper().startswith(skipped):
            on_step(Step("sql", text))

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> sqlite3.Cursor:
            told(sql)
            return super().execute(sql, *args)

        def executemany(self, sql: str, rows: Iterable[Any]) -> sqlite3.Cursor:
            told(sql)
            return super().executemany(sql, rows)

        def executescript(self, sql: str) -> sqlite3.Cursor:
            told(sql)
            return super().executescript(sql)

        def commit(self) -> None:
            told("COMMIT")
            super().commit()

    return Connection


@contextlib.contextmanager
def traced(on_step: OnStep) -> Iterator[None]:
    """Call a function before each step that this process takes."""
    paths: dict[int, str] = {}
    real_open, real_fsync, real_connect = os.open, os.fsync, sqlite3.connect
    real_fdopen = os.fdopen

    def open_(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & WRITING:
            on_step(Step("open", str(path)))
        descriptor = real_open(path, flags, *args, **kwargs)
        paths[descriptor] = str(path)
        return descriptor

    def fsync(descriptor: int) -> None:
        on_step(Step("fsync", paths.get(descriptor, "?")))
        real_fsync(descriptor)

    def fdopen(descriptor: int, mode: str = "r", *args: Any) -> Any:
        if mode == "wb":
            return _File(descriptor, on_step, paths.get(descriptor, "?"))
        return real_fdopen(descriptor, mode, *args)

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return real_connect(*args, factory=_connection(on_step), **kwargs)

    def wrapped(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            target = args[0] if name in ("rename", "replace") else ""
            on_step(Step(name, f"{path} {target}".strip()))
            return real(path, *args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch("os.open", open_))
        stack.enter_context(patch("os.fsync", fsync))
        stack.enter_context(patch("os.fdopen", fdopen))
        stack.enter_context(patch("sqlite3.connect", connect))
        for name in CALLS:
            stack.enter_context(patch(f"os.{name}", wrapped(name)))
        yield


# What looks at files without changing them, with a path first.
LOOKS = ("stat", "lstat", "listdir", "scandir", "access", "readlink", "statvfs", "open")
# The same with a descriptor.
READS = ("fstat", "pread", "preadv")


@contextlib.contextmanager
def watched(folder: Path, on_step: OnStep) -> Iterator[None]:
    """Call a function before each look at a folder or at what is below it."""
    inside: set[int] = set()
    real_open, real_connect = open, sqlite3.connect

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return False
        name = os.fsdecode(path)
        return name == str(folder) or name.startswith(f"{folder}/")

    def look(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if not is_inside(path):
                return real(path, *args, **kwargs)
            try:
                on_step(Step(name, str(path)))
            except OSError:
                if name == "access":
                    return False
                raise
            result = real(path, *args, **kwargs)
            if name == "open":
                inside.add(result)
            return result

        return call

    def read(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(descriptor: int, *args: Any) -> Any:
            if descriptor in inside:
                on_step(Step(name, str(descriptor)))
            return real(descriptor, *args)

        return call

    def open_(file: Any, *args: Any, **kwargs: Any) -> Any:
        if is_inside(file):
            on_step(Step("open", str(file)))
        return real_open(file, *args, **kwargs)

    def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        return real_connect(*args, factory=_connection(on_step, ()), **kwargs)

    with contextlib.ExitStack() as stack:
        for name in LOOKS:
            stack.enter_context(patch(f"os.{name}", look(name)))
        for name in filter(lambda name: hasattr(os, name), READS):
            stack.enter_context(patch(f"os.{name}", read(name)))
        stack.enter_context(patch("builtins.open", open_))
        stack.enter_context(patch("io.open", open_))
        stack.enter_context(patch("sqlite3.connect", connect))
        yield


def looks_of(act: Callable[[], object], folder: Path) -> list[Step]:
    """Return the looks that a function takes at a folder."""
    found: list[Step] = []
    with watched(folder, found.append):
        act()
    return found


def steps_of(act: Callable[[], object]) -> list[Step]:
    """Return the steps that a function takes."""
    found: list[Step] = []
    with traced(found.append):
        act()
    return found


@contextlib.contextmanager
def failing(
    number: int, code: int, *, from_then_on: bool = False, below: Path | None = None
) -> Iterator[None]:
    """Let a step of this process fail as a disk does, or all from then on.

    With a folder, let a look at it or at what is below it fail instead.
    """
    count = 0

    def on_step(step: Step) -> None:
        nonlocal count
        count += 1
        if count == number or (from_then_on and count > number):
            raise _failure(step, code)

    with traced(on_step) if below is None else watched(below, on_step):
        yield


def _failure(step: Step, code: int) -> Exception:
    if step.deed != "sql":
        return OSError(code, os.strerror(code), step.subject.split(" ")[0])
    error = sqlite3.OperationalError(os.strerror(code))
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


def files_of(steps: Iterable[Step], folder: Path) -> list[str]:
    """Return the steps as text, without the folder's own path and running numbers."""
    return [f"{s.deed} {s.subject}".replace(f"{folder}/", "") for s in steps]
