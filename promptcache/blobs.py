"""Blobs: the immutable files of the store, one safetensors file for each segment.

Files of the store are written and removed only here. What a tensor means is the
codec's business, which blobs exist is the index's.

Two checksums guard a blob: `checksum` covers the header, so that it can be
trusted before anything is allocated by it, and `data_checksum` the data.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash
from safetensors import SafetensorError, safe_open

from promptcache.checksum import combined, digest
from promptcache.errors import DamagedBlobError, StoreError, StoreFormatError
from promptcache.types import (
    BlobHeader,
    EncodedSegment,
    Fingerprint,
    Garbage,
    Resumption,
    SegmentInfo,
    Tensor,
    TensorSpec,
    Worth,
    bits_of,
)

FORMAT_VERSION = 3
READ_NBYTES = 1 << 22
CACHEDIR_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Prompt caches of promptcache, which can always be computed again.\n"
)


class StagedBlob(NamedTuple):
    """A file that is complete and durable in `tmp/`, on its way to its place."""

    tmp: Path
    path: Path
    nbytes: int

    def publish(self) -> None:
        """Give it its name, durably. Raises OSError."""
        self.tmp.rename(self.path)
        _fsync(self.path.parent)


class BlobFolder:
    """The files below a store's folder.

    Invariants:
        A blob is complete and durable before it has its name.
        Folders have mode 0700 and files 0600, whatever the umask.
    """

    def __init__(self, root: Path) -> None:
        """Take the store's folder; nothing is created before `create`."""
        self.root = root
        self._blobs = root / "blobs"
        self._tmp = root / "tmp"
        self._quarantine = root / "quarantine"

    def create(self) -> None:
        """Create the store's folders. Raises OSError."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (self._blobs, self._tmp, self._quarantine):
            folder.mkdir(mode=0o700, exist_ok=True)
        if not (self.root / "CACHEDIR.TAG").exists():
            self.write_file("CACHEDIR.TAG", CACHEDIR_TAG.encode())

    def path(self, key: str) -> Path:
        """Return where a blob is, or would be."""
        return self._blobs / key[:2] / f"{key}.safetensors"

    def exists(self, key: str) -> bool:
        """Return whether a blob has its name."""
        return self.path(key).exists()

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
        self, info: SegmentInfo, segment: EncodedSegment
    ) -> Iterator["StagedBlob"]:
        """Write a blob to `tmp/`, to publish it or to drop it. Raises OSError."""
        tensors = sorted(segment.tensors, key=lambda t: -_itemsize(t))
        header = _encode_header(info, segment.layout, tensors)
        path = self.path(info.key)
        self._create_folder(path.parent)
        with self._staged(path, [header, *(t.data for t in tensors)]) as staged:
            yield staged

    def _create_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
            _fsync(folder.parent)

    @contextlib.contextmanager
    def _staged(
        self, path: Path, buffers: Iterable[bytes | memoryview]
    ) -> Iterator["StagedBlob"]:
        tmp = self._tmp / f"{path.name}.{os.getpid()}.{id(buffers):x}"
        # The lock tells a prune in another process that this is no garbage.
        with _open_locked(tmp) as file:
            try:
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                _flush(file.fileno())
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
            return _decode_header(self.path(key), key)
        except FileNotFoundError:
            raise DamagedBlobError("blob is missing") from None
        except IsADirectoryError:
            raise DamagedBlobError("blob is a folder") from None
        except OSError as error:
            # Such as too many open files: the blob may well be sound.
            raise StoreError(f"blob cannot be read ({error.strerror})") from error
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedBlobError(f"header cannot be read ({error})") from None

    def read_token_ids(self, header: BlobHeader) -> bytes:
        """Return the packed token ids of a blob, unchecked. Raises OSError."""
        offset = header.data_start
        for spec in header.tensors:
            nbytes = spec.nbytes
            if spec.name == "token_ids":
                with open(self.path(header.info.key), "rb") as file:
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
        try:
            with open(self.path(key), "rb") as file:
                file.seek(header.data_start)
                digests = [
                    digest(_pieces(file, spec.nbytes)) for spec in header.tensors
                ]
                is_longer = bool(file.read(1))
        except FileNotFoundError:
            raise DamagedBlobError("blob is missing") from None
        except IsADirectoryError:
            raise DamagedBlobError("blob is a folder") from None
        except OSError as error:
            raise StoreError(f"blob cannot be read ({error.strerror})") from error
        if combined(digests) != header.data_checksum or is_longer:
            raise DamagedBlobError("checksum of the data does not match")
        return header

    def nbytes(self, key: str) -> int:
        """Return the size of a blob, 0 if it is missing."""
        return _size(self.path(key))

    def stored(self) -> Iterator[tuple[str, int]]:
        """Yield the key and size of every blob on disk."""
        for path in self._blobs.glob("??/*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                yield path.stem, path.stat().st_size

    def remove(self, key: str) -> int:
        """Remove a blob and return its size; a blob already gone is no error."""
        path = self.path(key)
        try:
            nbytes = path.stat().st_size
            path.unlink()
        except FileNotFoundError:
            return 0
        return nbytes

    def set_aside(self, path: Path) -> None:
        """Move a damaged file into `quarantine/`; one already gone is no error."""
        with contextlib.suppress(FileNotFoundError):
            path.rename(self._quarantine / path.name)

    def quarantined(self) -> Iterator[str]:
        """Yield the keys of the blobs that were set aside."""
        yield from sorted(p.stem for p in self._quarantine.glob("*.safetensors"))

    def garbage(self) -> list[Garbage]:
        """Return the files in `tmp/` whose writer is gone, and `quarantine/`."""
        abandoned = [path for path in _files(self._tmp) if not _is_locked(path)]
        return [
            Garbage(str(path.relative_to(self.root)), _size(path))
            for path in [*abandoned, *_files(self._quarantine)]
        ]

    def sweep(self, garbage: Garbage) -> int:
        """Remove a file that `garbage` named and return its size, 0 if it stays."""
        path = self.root / garbage.path
        try:
            with open(path, "rb") as file:
                # Held while the file goes, so that a writer sees that it went.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                return os.fstat(file.fileno()).st_size
        except (BlockingIOError, FileNotFoundError):
            return 0

    def lock_path(self, key: str) -> Path:
        """Return the file whose lock is held by whoever computes a prefix."""
        return self._tmp / f"{key}.lock"

    def remove_lock(self, key: str) -> None:
        """Remove the file of a lock that is held."""
        self.lock_path(key).unlink(missing_ok=True)

    def total_nbytes(self) -> int:
        """Return the size of all files of the store."""
        return sum(_size(path) for path in _files(self.root))


def _encode_header(info: SegmentInfo, layout: str, tensors: list[Tensor]) -> bytes:
    # Imported here because it takes 20 ms, which `ls` can do without.
    from importlib.metadata import version

    specs = [TensorSpec(t.name, t.dtype, t.shape) for t in tensors]
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "key": info.key,
        "parent_key": info.parent_key or "",
        "fingerprint": info.fingerprint.digest,
        "fingerprint_parts": json.dumps(dict(info.fingerprint.parts), sort_keys=True),
        "model": info.fingerprint.model,
        "source": info.fingerprint.source or "",
        "start": str(info.start),
        "end": str(info.end),
        "is_prefix": str(int(info.is_prefix)),
        "created_at": repr(info.created_at),
        "resumption": json.dumps(info.resumption._asdict()),
        "worth": str(int(info.worth)),
        "layout": layout,
        "mlx_version": version("mlx"),
        "mlx_lm_version": version("mlx-lm"),
        "data_checksum": combined(digest([tensor.data]) for tensor in tensors),
    }
    metadata["checksum"] = _header_checksum(metadata, specs)
    return _safetensors_header(metadata, specs)


def _pieces(file: BinaryIO, nbytes: int) -> Iterator[bytes]:
    """Yield the next bytes of a file, some at a time."""
    while nbytes and (data := file.read(min(nbytes, READ_NBYTES))):
        nbytes -= len(data)
        yield data


def _safetensors_header(metadata: dict[str, str], specs: list[TensorSpec]) -> bytes:
    """Return the length and the JSON, as the safetensors format asks for them."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": spec.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _decode_header(path: Path, key: str) -> BlobHeader:
    with open(path, "rb") as file:
        data_start = 8 + int.from_bytes(file.read(8), "little")
    with safe_open(path, framework="numpy") as file:
        metadata = dict(file.metadata() or {})
        slices = {name: file.get_slice(name) for name in file.offset_keys()}
        specs = [
            TensorSpec(name, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        ]
    if metadata.pop("checksum") != _header_checksum(metadata, specs):
        raise DamagedBlobError("checksum of the header does not match")
    _check_format(metadata)
    if metadata["key"] != key:
        raise DamagedBlobError(f"blob holds another segment, {metadata['key']}")
    return BlobHeader(
        info=_decode_info(metadata),
        layout=metadata["layout"],
        tensors=tuple(specs),
        data_checksum=metadata["data_checksum"],
        data_start=data_start,
    )


def _check_format(metadata: dict[str, str]) -> None:
    written = int(metadata["format_version"])
    if written > FORMAT_VERSION:
        raise StoreFormatError(
            f"blob has format {written} and this promptcache reads up to "
            f"{FORMAT_VERSION}, upgrade promptcache"
        )
    if written < FORMAT_VERSION:
        raise StoreFormatError(
            f"blob has the older format {written}, `promptcache prune` removes it"
        )


def _decode_info(metadata: dict[str, str]) -> SegmentInfo:
    return SegmentInfo(
        key=metadata["key"],
        parent_key=metadata["parent_key"] or None,
        fingerprint=Fingerprint(
            digest=metadata["fingerprint"],
            model=metadata["model"],
            source=metadata["source"] or None,
            parts=json.loads(metadata["fingerprint_parts"]),
        ),
        start=int(metadata["start"]),
        end=int(metadata["end"]),
        is_prefix=metadata["is_prefix"] == "1",
        created_at=float(metadata["created_at"]),
        resumption=Resumption(**json.loads(metadata["resumption"])),
        worth=Worth(int(metadata["worth"])),
    )


def _header_checksum(metadata: dict[str, str], specs: list[TensorSpec]) -> str:
    canonical = json.dumps(
        [metadata, sorted(specs)], sort_keys=True, separators=(",", ":")
    )
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _itemsize(tensor: Tensor) -> int:
    return bits_of(tensor.dtype) // 8


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _open_locked(path: Path) -> BinaryIO:
    """Create a file that others see locked from the start."""
    while True:
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        file = os.fdopen(os.open(path, flags, 0o600), "wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        # A prune took it between the two.
        file.close()


def _flush(descriptor: int) -> None:
    """Make a file durable; on a Mac `fsync` alone stops at the drive's cache."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)
