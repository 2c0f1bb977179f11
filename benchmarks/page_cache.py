"""The page cache: put files into it, take them out, and see how much is in it."""

import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

READ_NBYTES = 1 << 22
IN_MEMORY = 1


def can_drop() -> bool:
    """Return whether this system drops a file's pages on request."""
    return sys.platform == "linux"


def warm(files: Sequence[Path]) -> None:
    """Read files, so that their pages are in memory."""
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.read(READ_NBYTES):
                pass


def drop(files: Sequence[Path]) -> None:
    """Write what is not on the disk yet, and forget the pages of files."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(files: Sequence[Path]) -> float | None:
    """Return the share of the files' pages that are in memory, None if unknown."""
    if not can_drop():
        return None
    counts = [_pages(path) for path in files]
    return sum(inside for inside, _ in counts) / sum(total for _, total in counts)


def _pages(path: Path) -> tuple[int, int]:
    """Return how many pages of a file are in memory, and how many it has."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        # Written to by nobody: ctypes takes the address of writable memory only.
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
    num_pages = -(-len(mapping) // mmap.PAGESIZE)
    pages = (ctypes.c_ubyte * num_pages)()
    start = ctypes.c_char.from_buffer(mapping)
    address = ctypes.c_void_p(ctypes.addressof(start))
    status = libc.mincore(address, ctypes.c_size_t(len(mapping)), pages)
    del start
    mapping.close()
    if status:
        raise OSError(ctypes.get_errno(), "mincore failed", str(path))
    return sum(page & IN_MEMORY for page in pages), num_pages
