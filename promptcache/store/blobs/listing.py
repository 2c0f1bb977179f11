"""The inventory: which files lie in the folders of blobs, and of what size."""

import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOB_NAME = re.compile(r"([0-9a-f]{2})[0-9a-f]{30}\.safetensors")
SHELF_NAME = re.compile(r"[0-9a-f]{2}")
# A change this soon after another need not change the time of a folder: file systems
# count in ticks of up to 10 ms, some of them in seconds.
MTIME_RESOLUTION_SECONDS = 2.0


class _Shard(NamedTuple):
    """What one folder held when it had been changed last at a time."""

    changed_at: int
    nbytes_by_name: dict[str, int]


class BlobListing:
    """The files one level below a folder.

    A blob never changes, and to come and go it changes the time of its folder: one
    that has the time it had is not listed again.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder; it need not exist."""
        self._folder = folder
        self._shelves: dict[str, _Shard] = {}

    def blobs(self) -> Iterator[tuple[str, int]]:
        """Yield key and size of every file that has a blob's name and place."""
        for shelf, files in self._listed():
            for name, nbytes in files.items():
                found = BLOB_NAME.fullmatch(name)
                if found and found[1] == shelf:
                    yield name.partition(".")[0], nbytes

    def nbytes(self) -> int:
        """Return the size of all files, whatever their names."""
        return sum(sum(files.values()) for _, files in self._listed())

    def foreign(self) -> Iterator[tuple[str, int]]:
        """Yield path below the folder and size of every file that is not a blob."""
        for shelf, files in self._listed():
            for name, nbytes in files.items():
                found = BLOB_NAME.fullmatch(name)
                if not found or found[1] != shelf:
                    yield str(Path(shelf, name)), nbytes

    def _listed(self) -> Iterator[tuple[str, dict[str, int]]]:
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
                yield "", {name: status.st_size}
            elif SHELF_NAME.fullmatch(name):
                yield name, self._shelf(name, status.st_mtime_ns)
            else:
                yield name, dict(_below(self._folder / name))

    def _shelf(self, name: str, changed_at: int) -> dict[str, int]:
        known = self._shelves.get(name)
        if known is not None and known.changed_at == changed_at:
            return known.nbytes_by_name
        files = dict(_below(self._folder / name))
        if time.time() - changed_at / 1e9 > MTIME_RESOLUTION_SECONDS:
            self._shelves[name] = _Shard(changed_at, files)
        return files


def _below(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield path and size of the files below a folder; links are not followed.

    So is a folder that has the name of a blob, beside what is in it.
    """
    for parent, folders, names in os.walk(folder, onerror=_raise_unless_gone):
        others = (
            name
            for name in folders
            if BLOB_NAME.fullmatch(name) or Path(parent, name).is_symlink()
        )
        for name in [*names, *others]:
            path = Path(parent, name)
            try:
                yield str(path.relative_to(folder)), path.lstat().st_size
            except FileNotFoundError:
                continue


def _raise_unless_gone(error: OSError) -> None:
    """Let no folder that cannot be listed count as an empty one."""
    if not isinstance(error, FileNotFoundError):
        raise error
