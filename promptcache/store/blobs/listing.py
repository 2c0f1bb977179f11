"""The listing of the blobs' folder: which files are in it, and their sizes."""

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from promptcache.files import files_below

BLOB_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
BLOB_PATH = re.compile(r"([0-9a-f]{2})/(\1[0-9a-f]{30})\.safetensors")
SHARD_NAME = re.compile(r"[0-9a-f]{2}")
# A change this soon after another need not change the time of a folder: file systems
# count in ticks of up to 10 ms, some of them in seconds.
MTIME_RESOLUTION_SECONDS = 2.0


class _Shard(NamedTuple):
    changed_at: int
    nbytes_by_path: dict[str, int]


class BlobListing:
    """The files below the folder of blobs, which need not exist.

    A blob never changes, and adding or removing one changes the time of its shard,
    which is listed again only then.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[str, _Shard] = {}

    def blobs(self) -> Iterator[tuple[str, int]]:
        """Yield key and size of every file that has a blob's name and place."""
        for path, nbytes in self._files():
            if match := BLOB_PATH.fullmatch(path):
                yield match[2], nbytes

    def foreign(self) -> Iterator[tuple[str, int]]:
        """Yield path below the folder and size of every file that is not a blob."""
        for path, nbytes in self._files():
            if not BLOB_PATH.fullmatch(path):
                yield path, nbytes

    def nbytes(self) -> int:
        """Return the size of all files, whatever their names."""
        return sum(sum(files.values()) for files in self._listed())

    def _files(self) -> Iterator[tuple[str, int]]:
        for files in self._listed():
            yield from files.items()

    def _listed(self) -> Iterator[dict[str, int]]:
        try:
            names = sorted(os.listdir(self._folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in names:
            try:
                status = os.lstat(self._folder / name)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(status.st_mode):
                # A link among them is not followed.
                yield {name: status.st_size}
            elif SHARD_NAME.fullmatch(name):
                yield self._shard(name, status.st_mtime_ns)
            else:
                yield self._sizes(name)

    def _shard(self, name: str, changed_at: int) -> dict[str, int]:
        shard = self._shards.get(name)
        if shard is not None and shard.changed_at == changed_at:
            return shard.nbytes_by_path
        sizes = self._sizes(name)
        if time.time() - changed_at / 1e9 > MTIME_RESOLUTION_SECONDS:
            self._shards[name] = _Shard(changed_at, sizes)
        return sizes

    def _sizes(self, name: str) -> dict[str, int]:
        """Return the files below one folder; so is a folder with a blob's name.

        A folder that cannot be listed must not count as an empty one.
        """
        sizes = {}
        folder, gone = self._folder / name, (FileNotFoundError,)
        for path in files_below(folder, skip_errors=gone, also=BLOB_NAME.fullmatch):
            with contextlib.suppress(FileNotFoundError):
                sizes[str(path.relative_to(self._folder))] = path.lstat().st_size
        return sizes
