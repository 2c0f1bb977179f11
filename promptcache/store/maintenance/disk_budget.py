"""The disk budget: what a save may write, and room made for it."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from promptcache.errors import StoreFullError
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.maintenance import prune
from promptcache.units import format_size

# A system whose disk is full fails in many ways. Of a small volume, 20 GB, a part.
DEFAULT_FLOOR_NBYTES = 10**9
DEFAULT_FLOOR_SHARE = 20


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left alone, and what may be written in a day.

    Attributes:
        min_free_nbytes: Nothing is written that leaves less free on the disk; None for
            1 GB, or a twentieth of the volume if that is less.
        max_daily_nbytes: Most bytes of blobs to write in a day, None for no limit.
    """

    min_free_nbytes: int | None = None
    max_daily_nbytes: int | None = None

    def check(self, folder: Path, nbytes: int, written_nbytes: int) -> None:
        """Make sure that so many bytes may be written.

        Args:
            folder: On the disk in question.
            nbytes: How many bytes.
            written_nbytes: What was written today already.

        Raises:
            StoreFullError: They may not.
            OSError: The folder is gone.
        """
        self._check_disk(folder, nbytes)
        most = self.max_daily_nbytes
        if most is not None and written_nbytes + nbytes > most:
            raise StoreFullError(
                f"{format_size(written_nbytes)} of the {format_size(most)} that may be "
                "written in a day are, raise PROMPTCACHE_DAILY_WRITES or wait"
            )

    def _check_disk(self, folder: Path, nbytes: int) -> None:
        volume = os.statvfs(folder)
        free = volume.f_bavail * volume.f_frsize
        floor = self.min_free_nbytes
        if floor is None:
            total = volume.f_blocks * volume.f_frsize
            floor = min(DEFAULT_FLOOR_NBYTES, total // DEFAULT_FLOOR_SHARE)
        if floor and free - nbytes < floor:
            raise StoreFullError(
                f"the disk has {format_size(free)} free and {format_size(floor)} are "
                "to stay free, make room there or lower PROMPTCACHE_MIN_FREE"
            )


class Room:
    """The size limit of a store, held by evicting what was not used for long.

    Attributes:
        max_nbytes: Size limit of all files in bytes.
        allowance: How much may be written, for the sake of the disk.
        num_evicted: How many segments had to go for it.
    """

    def __init__(
        self,
        index: Index,
        blobs: BlobFolder,
        *,
        max_nbytes: int,
        allowance: Allowance,
    ) -> None:
        """Take a store's files, their size limit, and how much may be written."""
        self._index = index
        self._blobs = blobs
        self.allowance = allowance
        self.max_nbytes = max_nbytes
        self.num_evicted = 0

    def check(self, nbytes: int) -> None:
        """Make sure that so many bytes of a blob may be written.

        Raises:
            StoreFullError: They may not.
        """
        written_nbytes = self._index.history.written().today_nbytes
        self.allowance.check(self._blobs.root, nbytes, written_nbytes)

    def make(self, nbytes: int, *, protect: Mapping[str, int] | None = None) -> None:
        """Evict until so many bytes more fit.

        `protect` are the keys of segments that must stay with their ancestors, and up
        to which position.

        Raises:
            StoreFullError: They cannot; nothing was evicted then.
        """
        self.num_evicted += prune.make_room(
            self._index,
            self._blobs,
            nbytes=nbytes,
            limit=self.max_nbytes,
            protect=protect,
        )

    def keep(self, nbytes: int, *, protect: Mapping[str, int] | None = None) -> None:
        """Make room for what is noted, if that can be; it is written all the same."""
        with contextlib.suppress(StoreFullError):
            self.make(nbytes, protect=protect)
