"""The allowance: how much may be written, for the sake of the disk.

The size limit says how much a store may hold; this says when to write nothing at all.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from promptcache.errors import StoreFullError
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
