"""Files: opened without following links, locked, made durable, counted."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600


class IrregularFileError(OSError):
    """What has a file's name is a folder, a link or a pipe."""


def create_folder(folder: Path) -> None:
    """Create a private folder, whatever the umask. Raises OSError."""
    try:
        folder.mkdir(mode=PRIVATE_FOLDER)
    except FileExistsError:
        if not folder.is_dir():
            raise
        return
    folder.chmod(PRIVATE_FOLDER)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    A link is not followed, and a pipe not waited for. Raises OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise IrregularFileError(errno.ELOOP, "a link") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    raise IrregularFileError(errno.EISDIR, kind)


def open_locked(path: Path) -> BinaryIO:
    """Create a file that others see locked from the start. Raises OSError."""
    while True:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
        file = os.fdopen(os.open(path, flags, PRIVATE_FILE), "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        # A prune took it between the two.
        file.close()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Let one at a time work in a folder; a lock of its own would leave a file behind.

    Raises OSError.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether another process is at work on a file."""
    try:
        with open_file(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def lock_at_once(file: BinaryIO) -> None:
    """Lock a file. Raises BlockingIOError if another process has it locked."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def make_durable(descriptor: int) -> None:
    """Make a file durable; on a Mac `fsync` alone stops at the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)


def make_names_durable(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        make_durable(descriptor)
    finally:
        os.close(descriptor)


def size_of(path: Path) -> int:
    """Return the size of a file, or of a link itself; 0 if there is none."""
    try:
        return path.lstat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def files_below(folder: Path, *without: str) -> Iterator[Path]:
    """Yield all files below a folder, and links, which are not followed.

    `without` are names of folders in it to leave out.
    """
    for parent, folders, names in os.walk(folder):
        if Path(parent) == folder:
            folders[:] = (name for name in folders if name not in without)
        links = (name for name in folders if Path(parent, name).is_symlink())
        yield from (Path(parent, name) for name in [*names, *links])


def intruder(path: Path) -> str | None:
    """Return what others could do to a file or folder that is there, or None."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written to by other users"
    return None
