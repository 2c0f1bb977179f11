"""Files: opened without following links, locked, made durable, counted."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from promptcache.errors import StoreError
from promptcache.locks import TELL_SECONDS, Patience, lock

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600


class NotRegularFileError(OSError):
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
            raise NotRegularFileError(errno.ELOOP, "a link") from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
    raise NotRegularFileError(errno.EISDIR, kind)


def open_private(path: Path) -> int:
    """Open a regular file to read and to add to, created where there is none.

    Return its descriptor. Nobody else can write to it, and it is no link. Raises
    StoreError, and OSError.
    """
    check_private(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, PRIVATE_FILE)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NotRegularFileError(errno.EISDIR, "no regular file")


def open_locked(
    path: Path,
    patience: Patience,
    *,
    most: float | None = None,
    tell_after: float = TELL_SECONDS,
) -> BinaryIO:
    """Create a file that others see locked from the start.

    For `most` and `tell_after` see `Patience.attempts`.

    Raises:
        TimeoutError: Another process has it locked.
        OSError: It cannot be created.
    """
    while True:
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW
        file = os.fdopen(os.open(path, flags, PRIVATE_FILE), "wb")
        try:
            lock(file.fileno(), path, patience, most=most, tell_after=tell_after)
            if os.fstat(file.fileno()).st_nlink:
                file.truncate()
                return file
        except BaseException:
            file.close()
            raise
        # A prune took it between the two.
        file.close()


@contextlib.contextmanager
def lock_file(
    path: Path,
    patience: Patience,
    *,
    most: float | None = None,
    tell_after: float = TELL_SECONDS,
) -> Iterator[None]:
    """Hold a lock that is a file of its own, which says who holds it.

    Raises what `open_locked` raises.
    """
    file = open_locked(path, patience, most=most, tell_after=tell_after)
    with file:
        try:
            # Only for others to know; a disk may be full.
            with contextlib.suppress(OSError):
                os.write(file.fileno(), str(os.getpid()).encode())
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(folder: Path, patience: Patience) -> Iterator[None]:
    """Let one at a time work in a folder; a lock of its own would leave a file behind.

    Raises:
        TimeoutError: Another process works in it for too long.
        OSError: It cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor, folder, patience)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether another process is, or may be, at work on a file."""
    try:
        with open_file(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (NotRegularFileError, FileNotFoundError):
        return False
    except OSError:
        return True
    return False


def lock_at_once(file: BinaryIO | int) -> None:
    """Lock a file. Raises BlockingIOError if another process has it locked."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def fsync_file(descriptor: int) -> None:
    """Make a file durable; on a Mac `fsync` alone stops at the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)


def make_path_durable(path: Path) -> None:
    """Make a file, or the names in a folder, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync_file(descriptor)
    finally:
        os.close(descriptor)


def broken_link(path: Path) -> str | None:
    """Return which link on a path leads to nothing, in words, or None."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            below = "" if link == path else f"{path} cannot be found: "
            return f"{below}{link} is a link to {os.readlink(link)}, which is not there"
    return None


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
    for parent, folders, names in os.walk(folder, onerror=_raise_unless_barred):
        if Path(parent) == folder:
            folders[:] = (name for name in folders if name not in without)
        links = (name for name in folders if Path(parent, name).is_symlink())
        yield from (Path(parent, name) for name in [*names, *links])


def _raise_unless_barred(error: OSError) -> None:
    """Leave out what went away, or is not this user's, but not what a disk fails at."""
    if not isinstance(error, (FileNotFoundError, PermissionError)):
        raise error


def check_private(path: Path, *, may_be_link: bool = False) -> None:
    """Make sure that nobody else can put files there, or change them.

    What is not there is no trouble. Raises StoreError, and OSError.
    """
    if path.is_symlink() and not may_be_link:
        raise StoreError(f"{path} is a link, put what it leads to in its place")
    if reason := foreign_access(path):
        advice = (
            "run `chmod go-w` on it"
            if "written" in reason
            else "choose another folder with --store or PROMPTCACHE_DIR"
        )
        raise StoreError(f"the store is not private: {path} {reason}, {advice}")


def foreign_access(path: Path) -> str | None:
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
