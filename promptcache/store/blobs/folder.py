"""Blobs: the immutable files of the store, one safetensors file for each segment.

The meaning of a tensor is left to the codec, and which blobs exist to the index.

Two checksums guard a blob: `checksum` covers the header, so that it can be
trusted before anything is allocated by it, and `data_checksum` the data.
"""

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.files import (
    NotRegularFileError,
    create_folder,
    make_path_durable,
    open_file,
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
from promptcache.store.blobs.store_files import StagedFile, StoreFiles, readable

READ_NBYTES = 1 << 22
# A key from a damaged index must not lead anywhere else.
KEY = re.compile(r"[0-9a-f]{32}")


class BlobFolder:
    """The blobs of a store; see `StoreFiles` for what holds for all of its files."""

    def __init__(self, root: Path, patience: Patience | None = None) -> None:
        self.root = root
        self.files = StoreFiles(root, patience)

    @readable
    def path(self, key: str) -> Path:
        """Return where a blob is or would be. Raises DamagedBlobError if nowhere."""
        if not KEY.fullmatch(key):
            raise DamagedBlobError(f"{key!r} is not a blob key")
        folder = self.files.blobs / key[:2]
        if folder.is_symlink():
            raise DamagedBlobError("the folder of the blob is a link")
        return folder / f"{key}.safetensors"

    @readable
    def exists(self, key: str) -> bool:
        """Return whether a blob is there, sound or not."""
        try:
            return self.path(key).exists()
        except DamagedBlobError:
            return False

    @readable
    def nbytes(self, key: str) -> int:
        """Return the size of a blob, 0 if it is missing."""
        return size_of(self.path(key))

    @readable
    def stored(self) -> list[tuple[str, int]]:
        """Return the key and size of every blob on disk."""
        return list(self.files.listing.blobs())

    @readable
    def quarantined(self) -> list[str]:
        """Return the keys of the blobs in `quarantine/`."""
        return sorted(p.stem for p in self.files.quarantine.glob("*.safetensors"))

    @contextlib.contextmanager
    def staged(
        self,
        info: SegmentInfo,
        segment: EncodedSegment,
        *,
        whole: BlobHeader | None = None,
    ) -> Iterator[StagedFile]:
        """Write a blob to `tmp/`, to publish it or to drop it. Raises OSError.

        A blob already there may be replaced: it is garbage or the same. `whole` is the
        header of the blob that this one is the head of, if it is one.
        """
        tensors = sorted(segment.tensors, key=lambda t: -bits_of(t.dtype))
        header = encode_header(info, segment.layout, tensors, whole=whole)
        path = self.path(info.key)
        if not path.parent.is_dir():
            create_folder(path.parent)
            make_path_durable(path.parent.parent)
        with self.files.staged(path, [header, *(t.data for t in tensors)]) as staged:
            yield staged

    def read_header(self, key: str) -> BlobHeader:
        """Read and check a blob's header.

        Raises:
            DamagedBlobError: The blob is missing, truncated or changed.
            StoreError: It cannot be read now.
            StoreFormatError: A newer promptcache wrote it.
        """
        with _errors_translated():
            return read_header(self.path(key), key)

    def read_token_ids(self, header: BlobHeader) -> bytes:
        """Return the packed token ids of a blob, unchecked. Raises OSError."""
        offset = header.data_start
        for spec in header.tensors:
            if spec.name == "token_ids":
                with open_file(self.path(header.info.key)) as file:
                    return os.pread(file.fileno(), spec.nbytes, offset)
            offset += spec.nbytes
        raise DamagedBlobError("token ids are missing")

    def check(self, key: str) -> BlobHeader:
        """Read a whole blob, compare its checksums and return its header.

        Raises what `read_header` raises.
        """
        header = self.read_header(key)
        with self._checked(header) as (file, digests):
            digests += [digest(_pieces(file, spec.nbytes)) for spec in header.tensors]
        return header

    def read_tensors(
        self, header: BlobHeader, slice_of: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Return the result of a function for each tensor, as `check` reads it."""
        tensors = []
        with self._checked(header) as (file, digests):
            for spec in header.tensors:
                data = file.read(spec.nbytes)
                digests.append(digest([data]))
                if len(data) == spec.nbytes:
                    tensors.append(slice_of(Tensor(*spec, memoryview(data))))
        return tensors

    @contextlib.contextmanager
    def _checked(self, header: BlobHeader) -> Iterator[tuple[BinaryIO, list[bytes]]]:
        """Open the data of a blob; compare the digests that the caller appends."""
        digests: list[bytes] = []
        with _errors_translated(), open_file(self.path(header.info.key)) as file:
            file.seek(header.data_start)
            yield file, digests
            is_longer = bool(file.read(1))
        if combined_checksum(digests) != header.data_checksum or is_longer:
            raise DamagedBlobError("checksum of the data does not match")

    def remove(self, key: str) -> int:
        """Remove a blob and return its size, 0 if it is gone already."""
        try:
            return self.files.remove(self.path(key))
        except (FileNotFoundError, DamagedBlobError):
            return 0


@contextlib.contextmanager
def _errors_translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DamagedBlobError("blob is missing") from None
    except NotRegularFileError as error:
        raise DamagedBlobError(f"blob is {error.strerror}") from None
    except OSError as error:
        # Such as too many open files: the blob may well be sound.
        raise StoreError(f"blob cannot be read ({error.strerror})") from error


def _pieces(file: BinaryIO, nbytes: int) -> Iterator[bytes]:
    while nbytes and (data := file.read(min(nbytes, READ_NBYTES))):
        nbytes -= len(data)
        yield data
