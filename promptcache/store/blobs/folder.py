"""Blobs: the immutable files of the store, one safetensors file for each segment.

Files of the store are written and removed only here. What a tensor means is the
codec's business, which blobs exist is the index's.

Two checksums guard a blob: `checksum` covers the header, so that it can be
trusted before anything is allocated by it, and `data_checksum` the data.
"""

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Concatenate, NamedTuple, ParamSpec, TypeVar

from promptcache.errors import DamagedBlobError, StoreError
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
from promptcache.segments.blob_format import (
    BlobHeader,
    combined_checksum,
    digest,
    encode_header,
    read_header,
)
from promptcache.segments.dtypes import bits_of
from promptcache.segments.types import EncodedSegment, SegmentInfo, Tensor
from promptcache.store.blobs.listing import SHELF_NAME, BlobListing
from promptcache.store.reports import ForeignFile, Garbage

P = ParamSpec("P")
Result = TypeVar("Result")
READ_NBYTES = 1 << 22
# The list of a quarter of a million prefixes.
MAX_FILE_NBYTES = 1 << 26
# What comes from a damaged index must not lead anywhere else.
KEY = re.compile(r"[0-9a-f]{32}")
# Where conversations are kept, which is left to `transcript`.
CHATS = "chats"
# What a store has at its root, besides what git is told.
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


def _readable(
    method: "Callable[Concatenate[BlobFolder, P], Result]",
) -> "Callable[Concatenate[BlobFolder, P], Result]":
    """Raise StoreError where the system cannot read the files, instead of OSError."""

    @functools.wraps(method)
    def read(self: "BlobFolder", /, *args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return method(self, *args, **kwargs)
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be read ({error.strerror})"
            ) from error

    return read


class StagedBlob(NamedTuple):
    """A file that is complete and durable in `tmp/`, on its way to its place."""

    tmp: Path
    path: Path
    nbytes: int

    def publish(self) -> None:
        """Give it its name, durably. Raises OSError."""
        self.tmp.rename(self.path)
        make_path_durable(self.path.parent)


class BlobFolder:
    """The files below a store's folder.

    Invariants:
        A blob is complete and durable before it has its name.
        Folders have mode 0700 and files 0600, whatever the umask.
        Links below the store's folder are not followed.
        What only looks at files raises StoreError, what writes them OSError.
    """

    def __init__(self, root: Path, patience: Patience | None = None) -> None:
        """Take the store's folder; nothing is created before `create`."""
        self.root = root
        self.patience = patience or Patience()
        self._blobs = root / "blobs"
        self._tmp = root / "tmp"
        self._quarantine = root / "quarantine"
        self._inventory = BlobListing(self._blobs)

    def create(self) -> None:
        """Create the store's folders.

        Raises:
            StoreError: Others could write to it.
            OSError: It cannot be created.
        """
        self.root.parent.mkdir(parents=True, exist_ok=True)
        create_folder(self.root)
        self._check_private()
        for folder in (self._blobs, self._tmp, self._quarantine):
            create_folder(folder)
        if not (self.root / "CACHEDIR.TAG").exists():
            self._sign()

    def _sign(self) -> None:
        """Have backups skip the folder, and git if nothing else is in it."""
        if set(os.listdir(self.root)) <= {*OWN_FOLDERS, *OWN_FILES}:
            self.write_file(GITIGNORE, b"*\n")
        self.write_file("CACHEDIR.TAG", CACHEDIR_TAG.encode())

    def clear_the_way(self) -> None:
        """Set aside what has the name of a folder or a file of the store and is none.

        Raises OSError.
        """
        if not self.root.is_dir():
            return
        if os.path.lexists(self._quarantine) and not _is_folder(self._quarantine):
            aside = self.root / f"{self._quarantine.name}.aside"
            self._quarantine.rename(aside)
            create_folder(self._quarantine)
            aside.rename(self._quarantine / self._quarantine.name)
        create_folder(self._quarantine)
        inside = _inside(self._blobs) if _is_folder(self._blobs) else []
        shelves = (path for path in inside if SHELF_NAME.fullmatch(path.name))
        for folder in (self._tmp, self._blobs, self.root / CHATS, *shelves):
            if os.path.lexists(folder) and not _is_folder(folder):
                self.set_aside(folder)
        for path in (self.root / name for name in OWN_FILES):
            is_file = path.is_file() and not path.is_symlink()
            if os.path.lexists(path) and not is_file:
                self.set_aside(path)

    def _check_private(self) -> None:
        """Raise StoreError where others could put or change files."""
        inside = (self._blobs, self._tmp, self._quarantine, self.root / CHATS)
        check_private(self.root, may_be_link=True)
        for path in (*inside, self.root / "index.db"):
            check_private(path)

    @_readable
    def path(self, key: str) -> Path:
        """Return where a blob is, or would be.

        Raises:
            DamagedBlobError: This is no key, or a link is in the way.
        """
        if not KEY.fullmatch(key):
            raise DamagedBlobError(f"{key!r} is no key of a blob")
        folder = self._blobs / key[:2]
        if folder.is_symlink():
            raise DamagedBlobError("the folder of the blob is a link")
        return folder / f"{key}.safetensors"

    @_readable
    def exists(self, key: str) -> bool:
        """Return whether a blob has its name."""
        try:
            return self.path(key).exists()
        except DamagedBlobError:
            return False

    def read_file(self, name: str) -> bytes:
        """Return a small file at the root of the store. Raises OSError."""
        with open_file(self.root / name) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_NBYTES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            return file.read()

    def write_file(self, name: str, data: bytes) -> None:
        """Replace a small file at the root of the store, durably. Raises OSError."""
        with self._staged(self.root / name, [data]) as staged:
            staged.publish()

    def publish(self, info: SegmentInfo, segment: EncodedSegment) -> int:
        """Write a blob durably under its key and return its size in bytes.

        A blob already there is replaced: it is garbage or the same. Raises OSError.
        """
        with self.staged(info, segment) as staged:
            staged.publish()
        return staged.nbytes

    @contextlib.contextmanager
    def staged(
        self,
        info: SegmentInfo,
        segment: EncodedSegment,
        *,
        whole: BlobHeader | None = None,
    ) -> Iterator["StagedBlob"]:
        """Write a blob to `tmp/`, to publish it or to drop it. Raises OSError.

        `whole` is the header of the blob that it is the head of, if it is one.
        """
        tensors = sorted(segment.tensors, key=lambda t: -_itemsize(t))
        header = encode_header(info, segment.layout, tensors, whole=whole)
        path = self.path(info.key)
        self._create_folder(path.parent)
        with self._staged(path, [header, *(t.data for t in tensors)]) as staged:
            yield staged

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Let nobody else make room and write until the end.

        Others would make the same room for themselves. Raises OSError.
        """
        with locked_folder(self._tmp, self.patience):
            yield

    def _create_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            create_folder(folder)
            make_path_durable(folder.parent)

    @contextlib.contextmanager
    def _staged(
        self, path: Path, buffers: Iterable[bytes | memoryview]
    ) -> Iterator["StagedBlob"]:
        tmp = self._tmp / f"{path.name}.{os.getpid()}.{id(buffers):x}"
        # The lock tells a prune in another process that this is no garbage.
        with open_locked(tmp, self.patience) as file:
            try:
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                fsync_file(file.fileno())
                yield StagedBlob(tmp, path, file.tell())
            finally:
                tmp.unlink(missing_ok=True)

    def read_header(self, key: str) -> BlobHeader:
        """Read and check a blob's header.

        Raises:
            DamagedBlobError: The blob is missing, truncated or its header changed.
            StoreError: It cannot be read now.
            StoreFormatError: A newer promptcache wrote it.
        """
        try:
            return read_header(self.path(key), key)
        except FileNotFoundError:
            raise DamagedBlobError("blob is missing") from None
        except NotRegularFileError as error:
            raise DamagedBlobError(f"blob is {error.strerror}") from None
        except OSError as error:
            # Such as too many open files: the blob may well be sound.
            raise StoreError(f"blob cannot be read ({error.strerror})") from error

    def read_token_ids(self, header: BlobHeader) -> bytes:
        """Return the packed token ids of a blob, unchecked. Raises OSError."""
        offset = header.data_start
        for spec in header.tensors:
            nbytes = spec.nbytes
            if spec.name == "token_ids":
                with open_file(self.path(header.info.key)) as file:
                    return os.pread(file.fileno(), nbytes, offset)
            offset += nbytes
        raise DamagedBlobError("token ids are missing")

    def check(self, key: str) -> BlobHeader:
        """Read a whole blob and compare its checksums; return its header.

        Raises:
            DamagedBlobError: It does not hold what was written.
            StoreFormatError: A newer promptcache wrote it.
        """
        header = self.read_header(key)
        with self._checked(header) as (file, digests):
            digests += [digest(_pieces(file, spec.nbytes)) for spec in header.tensors]
        return header

    def read_tensors(
        self, header: BlobHeader, taken: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Return what a function takes of each tensor of a blob, which is checked.

        Raises what `check` raises.
        """
        tensors = []
        with self._checked(header) as (file, digests):
            for spec in header.tensors:
                data = file.read(spec.nbytes)
                digests.append(digest([data]))
                if len(data) == spec.nbytes:
                    tensors.append(taken(Tensor(*spec, memoryview(data))))
        return tensors

    @contextlib.contextmanager
    def _checked(self, header: BlobHeader) -> Iterator[tuple[BinaryIO, list[bytes]]]:
        """Open the data of a blob, and compare the digests that are put into a list."""
        digests: list[bytes] = []
        try:
            with open_file(self.path(header.info.key)) as file:
                file.seek(header.data_start)
                yield file, digests
                is_longer = bool(file.read(1))
        except FileNotFoundError:
            raise DamagedBlobError("blob is missing") from None
        except NotRegularFileError as error:
            raise DamagedBlobError(f"blob is {error.strerror}") from None
        except OSError as error:
            raise StoreError(f"blob cannot be read ({error.strerror})") from error
        if combined_checksum(digests) != header.data_checksum or is_longer:
            raise DamagedBlobError("checksum of the data does not match")

    @_readable
    def nbytes(self, key: str) -> int:
        """Return the size of a blob, 0 if it is missing."""
        return size_of(self.path(key))

    @_readable
    def stored(self) -> list[tuple[str, int]]:
        """Return the key and size of every blob on disk."""
        return list(self._inventory.blobs())

    def remove(self, key: str) -> int:
        """Remove a blob and return its size; a blob already gone is no error."""
        try:
            return _remove(self.path(key))
        except (FileNotFoundError, DamagedBlobError):
            return 0

    def set_aside(self, path: Path) -> None:
        """Move what is damaged into `quarantine/`; what is gone already is no error."""
        target = self._quarantine / path.name
        with contextlib.suppress(FileNotFoundError):
            if _is_folder(path) or _is_folder(target):
                # A folder cannot be replaced.
                _remove(target)
        with contextlib.suppress(FileNotFoundError):
            path.rename(target)

    @_readable
    def quarantined(self) -> list[str]:
        """Return the keys of the blobs that were set aside."""
        return sorted(p.stem for p in self._quarantine.glob("*.safetensors"))

    @_readable
    def garbage(self) -> list[Garbage]:
        """Return what is in `tmp/` and whose writer is gone, and in `quarantine/`."""
        abandoned = [path for path in _inside(self._tmp) if not is_locked(path)]
        return [
            Garbage(str(path.relative_to(self.root)), _nbytes(path))
            for path in [*abandoned, *_inside(self._quarantine)]
        ]

    @_readable
    def foreign(self) -> list[ForeignFile]:
        """Return the files that no promptcache puts there, the largest first.

        Such as the copies that a synchronised folder keeps of what two machines
        changed.
        """
        own = [self.root / name for name in (*OWN_FILES, GITIGNORE)]
        files = [
            ForeignFile(str(path.relative_to(self.root)), size_of(path))
            for path in files_below(self.root, *OWN_FOLDERS)
            if path not in own
        ]
        files += [
            ForeignFile(f"blobs/{name}", nbytes)
            for name, nbytes in self._inventory.foreign()
        ]
        return sorted(files, key=lambda file: (-file.nbytes, file.path))

    def sweep(self, garbage: Garbage) -> int:
        """Remove what `garbage` named and return its size, 0 if it stays."""
        path = self.root / garbage.path
        if self._tmp not in path.parents:
            # Nobody writes it. An index may be in use, so only SQLite opens it.
            with contextlib.suppress(FileNotFoundError):
                return _remove(path)
            return 0
        try:
            with open_file(path) as file:
                # Held while the file goes, so that a writer sees that it went.
                lock_at_once(file)
                path.unlink()
                return os.fstat(file.fileno()).st_size
        except NotRegularFileError:
            return _remove(path)
        except (BlockingIOError, FileNotFoundError):
            return 0

    def lock_path(self, key: str) -> Path:
        """Return the file whose lock is held by whoever computes a prefix."""
        return self._tmp / f"{key}.lock"

    @_readable
    def wal_nbytes(self) -> int:
        """Return the size of the index's WAL, which no eviction makes smaller."""
        return size_of(self.root / "index.db-wal")

    @_readable
    def total_nbytes(self) -> int:
        """Return the size of all files of the store."""
        # In this order, a file that is published meanwhile is not counted twice.
        nbytes = self._inventory.nbytes()
        return nbytes + sum(size_of(path) for path in files_below(self.root, "blobs"))


def _inside(folder: Path) -> list[Path]:
    """Return what is in a folder, if there is one."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _nbytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    if _is_folder(path):
        return sum(size_of(inside) for inside in files_below(path))
    return size_of(path)


def _remove(path: Path) -> int:
    """Remove a file or a whole folder, and return its size. Raises OSError."""
    nbytes = _nbytes(path)
    if _is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink()
    return nbytes


def _pieces(file: BinaryIO, nbytes: int) -> Iterator[bytes]:
    """Yield the next bytes of a file, some at a time."""
    while nbytes and (data := file.read(min(nbytes, READ_NBYTES))):
        nbytes -= len(data)
        yield data


def _itemsize(tensor: Tensor) -> int:
    return bits_of(tensor.dtype) // 8
