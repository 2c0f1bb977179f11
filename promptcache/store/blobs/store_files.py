"""The files of a store besides its blobs: created, locked, quarantined and removed.

Files of the store are removed only here.
"""

import contextlib
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from promptcache.errors import StoreError
from promptcache.files import (
    NotRegularFileError,
    check_private,
    create_folder,
    files_below,
    fsync_file,
    is_locked,
    lock_at_once,
    locked_folder,
    make_path_durable,
    open_file,
    open_locked,
    size_of,
)
from promptcache.locks import Patience
from promptcache.store.blobs.listing import SHARD_NAME, BlobListing
from promptcache.store.reports import ForeignFile, Garbage

P = ParamSpec("P")
Result = TypeVar("Result")
# The list of a quarter of a million prefixes.
MAX_FILE_NBYTES = 1 << 26
# Where conversations are kept, which is left to `transcript`.
CHATS = "chats"
# What a store has at its root, besides what git reads.
OWN_FOLDERS = ("blobs", "tmp", "quarantine", CHATS)
OWN_FILES = (
    *("CACHEDIR.TAG", "prefixes.json", "secret", "index.db"),
    *("index.db-wal", "index.db-shm", "index.db-journal"),
)
GITIGNORE = ".gitignore"
CACHEDIR_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Prompt caches of promptcache, which can always be computed again.\n"
)


def readable(
    method: Callable[Concatenate[Any, P], Result],
) -> Callable[Concatenate[Any, P], Result]:
    """Raise StoreError where the system cannot read the files, instead of OSError."""

    @functools.wraps(method)
    def read(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be read ({error.strerror})"
            ) from error

    return read


class StagedFile(NamedTuple):
    """A file that is complete and durable in `tmp/`, with the path it is meant for."""

    tmp: Path
    path: Path
    nbytes: int

    def publish(self) -> None:
        """Give it its name, durably. Raises OSError."""
        self.tmp.rename(self.path)
        make_path_durable(self.path.parent)


class StoreFiles:
    """The folder of a store, and the private files in it.

    Invariants:
        A file is complete and durable before it has its name.
        Folders have mode 0700 and files 0600, whatever the umask.
        Links below the store's folder are not followed.
        What only looks at files raises StoreError, what writes them OSError.
    """

    def __init__(self, root: Path, patience: Patience | None = None) -> None:
        self.root = root
        self.patience = patience or Patience()
        self.blobs = root / "blobs"
        self.tmp = root / "tmp"
        self.quarantine = root / "quarantine"
        self.listing = BlobListing(self.blobs)

    def create(self) -> None:
        """Create the store's folders.

        Raises:
            StoreError: Others could write to it.
            OSError: It cannot be created.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        create_folder(self.root)
        self._check_private()
        for folder in (self.blobs, self.tmp, self.quarantine):
            create_folder(folder)
        if not (self.root / "CACHEDIR.TAG").exists():
            self._sign()

    def _check_private(self) -> None:
        check_private(self.root, may_be_link=True)
        for name in (*OWN_FOLDERS, "index.db"):
            check_private(self.root / name)

    def _sign(self) -> None:
        """Make backups skip the folder, and git if nothing else is in it."""
        if set(os.listdir(self.root)) <= {*OWN_FOLDERS, *OWN_FILES}:
            self.write_file(GITIGNORE, b"*\n")
        self.write_file("CACHEDIR.TAG", CACHEDIR_TAG.encode())

    def clear_the_way(self) -> None:
        """Quarantine what has the name of a folder or file of the store but is not one.

        Raises OSError.
        """
        if not self.root.is_dir():
            return
        if os.path.lexists(self.quarantine) and not _is_folder(self.quarantine):
            aside = self.root / f"{self.quarantine.name}.aside"
            self.quarantine.rename(aside)
            create_folder(self.quarantine)
            aside.rename(self.quarantine / self.quarantine.name)
        create_folder(self.quarantine)
        inside = _inside(self.blobs) if _is_folder(self.blobs) else []
        shards = (path for path in inside if SHARD_NAME.fullmatch(path.name))
        for folder in (self.tmp, self.blobs, self.root / CHATS, *shards):
            if os.path.lexists(folder) and not _is_folder(folder):
                self.quarantine_file(folder)
        for path in (self.root / name for name in OWN_FILES):
            is_file = path.is_file() and not path.is_symlink()
            if os.path.lexists(path) and not is_file:
                self.quarantine_file(path)

    def read_file(self, name: str) -> bytes:
        """Return a small file at the root of the store. Raises OSError."""
        with open_file(self.root / name) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_NBYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            return file.read()

    def write_file(self, name: str, data: bytes) -> None:
        """Replace a small file at the root of the store, durably. Raises OSError."""
        with self.staged(self.root / name, [data]) as staged:
            staged.publish()

    @contextlib.contextmanager
    def staged(
        self, path: Path, buffers: Iterable[bytes | memoryview]
    ) -> Iterator[StagedFile]:
        """Write a file to `tmp/`, to publish it or to drop it. Raises OSError."""
        tmp = self.tmp / f"{path.name}.{os.getpid()}.{id(buffers):x}"
        # Its lock keeps a prune in another process from removing it as garbage.
        with open_locked(tmp, self.patience) as file:
            try:
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                fsync_file(file.fileno())
                yield StagedFile(tmp, path, file.tell())
            finally:
                tmp.unlink(missing_ok=True)

    @contextlib.contextmanager
    def write_lock(self) -> Iterator[None]:
        """Keep other processes from making room for the same bytes. Raises OSError."""
        with locked_folder(self.tmp, self.patience):
            yield

    def lock_path(self, key: str) -> Path:
        """Return the file that is locked while a prefix is computed."""
        return self.tmp / f"{key}.lock"

    def quarantine_file(self, path: Path) -> None:
        """Move a damaged file into `quarantine/`, unless it is gone already."""
        target = self.quarantine / path.name
        with contextlib.suppress(FileNotFoundError):
            if _is_folder(path) or _is_folder(target):
                # A folder cannot be replaced.
                self.remove(target)
        with contextlib.suppress(FileNotFoundError):
            path.rename(target)

    @readable
    def garbage(self) -> list[Garbage]:
        """Return what is in `tmp/` and has no writer, and what is in `quarantine/`."""
        abandoned = [path for path in _inside(self.tmp) if not is_locked(path)]
        return [
            Garbage(str(path.relative_to(self.root)), _nbytes(path))
            for path in [*abandoned, *_inside(self.quarantine)]
        ]

    @readable
    def foreign(self) -> list[ForeignFile]:
        """Return the files that no promptcache writes, the largest first.

        For example the copies that a synchronised folder keeps of files that two
        machines changed.
        """
        own = [self.root / name for name in (*OWN_FILES, GITIGNORE)]
        files = [
            ForeignFile(str(path.relative_to(self.root)), size_of(path))
            for path in files_below(self.root, *OWN_FOLDERS)
            if path not in own
        ]
        files += [ForeignFile(f"blobs/{p}", n) for p, n in self.listing.foreign()]
        return sorted(files, key=lambda file: (-file.nbytes, file.path))

    def remove(self, path: Path) -> int:
        """Remove a file or a whole folder and return its size. Raises OSError."""
        nbytes = _nbytes(path)
        if _is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
        return nbytes

    def sweep(self, garbage: Garbage) -> int:
        """Remove garbage and return its size, 0 if it stays."""
        path = self.root / garbage.path
        try:
            if self.tmp not in path.parents:
                # Nobody writes it. An index may be in use, so only SQLite opens it.
                return self.remove(path)
            with open_file(path) as file:
                # Locked until the file is removed, so that a writer notices.
                lock_at_once(file)
                path.unlink()
                return os.fstat(file.fileno()).st_size
        except NotRegularFileError:
            return self.remove(path)
        except (BlockingIOError, FileNotFoundError):
            return 0

    @readable
    def wal_nbytes(self) -> int:
        """Return the size of the index's WAL, which no eviction makes smaller."""
        return size_of(self.root / "index.db-wal")

    @readable
    def total_nbytes(self) -> int:
        """Return the size of all files of the store."""
        # In this order, a file that is published meanwhile is not counted twice.
        nbytes = self.listing.nbytes()
        return nbytes + sum(size_of(path) for path in files_below(self.root, "blobs"))


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _nbytes(path: Path) -> int:
    if _is_folder(path):
        return sum(size_of(inside) for inside in files_below(path))
    return size_of(path)
