"""Files: opened without following links, locked, made durable, listed."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Unpack

from promptcache.errors import StoreError
from promptcache.locks import Limits, Patience, lock

PRIVATE_FOLDER = 0o700
PRIVATE_FILE = 0o600


class NotRegularFileError(OSError):
    """The path of a file leads to a folder, a link or a pipe."""


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
    """Open a regular file for reading; links are not followed. Raises OSError."""
    try:
        descriptor = _open_regular(path, os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise NotRegularFileError(errno.ELOOP, "a link") from None
        raise
    return os.fdopen(descriptor, "rb")


def open_private(path: Path) -> int:
    """Open or create a file that only this user can write to, to read and append.

    Return its descriptor. Raises StoreError and OSError.
    """
    check_private(path)
    return _open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)


def _open_regular(path: Path, flags: int) -> int:
    # O_NONBLOCK, so that a pipe is not waited for.
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, PRIVATE_FILE)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
    raise NotRegularFileError(errno.EISDIR, kind)


def open_locked(path: Path, patience: Patience, **limits: Unpack[Limits]) -> BinaryIO:
    """Create a file, locked before anything is written to it.

    Raises OSError, which is a TimeoutError if another process holds the lock.
    """
    while True:
        flags = os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW
        file = os.fdopen(os.open(path, flags, PRIVATE_FILE), "wb")
        try:
            lock(file.fileno(), path, patience, **limits)
            if os.fstat(file.fileno()).st_nlink:
                file.truncate()
                return file
        except BaseException:
            file.close()
            raise
        # A prune removed it between opening and locking.
        file.close()


@contextlib.contextmanager
def lock_file(
    path: Path, patience: Patience, **limits: Unpack[Limits]
) -> Iterator[None]:
    """Hold a lock file with this process's id. Raises what `open_locked` raises."""
    with open_locked(path, patience, **limits) as file:
        try:
            # Only informs others; the disk may be full.
            with contextlib.suppress(OSError):
                os.write(file.fileno(), str(os.getpid()).encode())
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_folder(folder: Path, patience: Patience) -> Iterator[None]:
    """Hold a lock on a folder itself; a lock file could be left behind.

    Raises OSError, which is a TimeoutError if another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        lock(descriptor, folder, patience)
        yield
    finally:
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Return whether another process has, or may have, a file locked."""
    try:
        with open_file(path) as file:
            lock_at_once(file)
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
    if hasattr(fcntl, "F_FULLFSYNC"):
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def make_path_durable(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync_file(descriptor)
    finally:
        os.close(descriptor)


def broken_link(path: Path) -> str | None:
    """Return a message about the link on a path that is broken, or None."""
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            below = "" if link == path else f"{path} cannot be found: "
            return f"{below}{link} is a link to {os.readlink(link)}, which is not there"
    return None


def size_of(path: Path) -> int:
    """Return the size of a file or of a link itself, 0 if it is missing."""
    try:
        return path.lstat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def files_below(
    folder: Path,
    *without: str,
    skip_errors: tuple[type[OSError], ...] = (FileNotFoundError, PermissionError),
    also: Callable[[str], object] = lambda name: False,
) -> Iterator[Path]:
    """Yield all files below a folder, and links, which are not followed.

    Args:
        folder: Where to look.
        without: Names of folders in it to leave out.
        skip_errors: Leave out a folder that cannot be listed for such a reason; by
            default, one that went away or belongs to another user. Raise others.
        also: By name, which folders to yield besides the files in them.
    """

    def on_error(error: OSError) -> None:
        if not isinstance(error, skip_errors):
            raise error

    for parent, folders, names in os.walk(folder, onerror=on_error):
        if Path(parent) == folder:
            folders[:] = (name for name in folders if name not in without)
        others = (n for n in folders if also(n) or Path(parent, n).is_symlink())
        yield from (Path(parent, name) for name in [*names, *others])


def check_private(path: Path, *, may_be_link: bool = False) -> None:
    """Raise StoreError if others could write to a path; it need not exist."""
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
    """Return why an existing path is not private, or None."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written to by other users"
    return None
