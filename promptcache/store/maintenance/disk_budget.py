"""The disk budget: what saves may write, and room made below the size limit."""

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from promptcache.errors import StoreFullError
from promptcache.locks import told
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.index.rows import SegmentNode
from promptcache.store.maintenance import prune
from promptcache.store.maintenance.eviction import pinned_nbytes, plan_eviction
from promptcache.store.reports import PrunePlan, describe_foreign
from promptcache.units import format_size

# A system whose disk is full fails in many ways. Of a small volume, 20 GB, a part.
DEFAULT_FLOOR_NBYTES = 10**9
DEFAULT_FLOOR_SHARE = 20
# What a WAL may take beyond the limit while it cannot be emptied: what SQLite lets it
# have at any time, 1,000 pages, or a part of a large store.
WAL_NBYTES, WAL_SHARE = 4 * 1024**2, 10


class DiskBudget:
    """What a store may write: by its size limit, by day and by what the disk has free.

    Attributes:
        max_nbytes: Size limit of all files in bytes, held by evicting the segments
            that were unused for the longest time.
        min_free_nbytes: Nothing is written that leaves less free on the disk; None for
            1 GB, or a twentieth of the volume if that is less.
        max_daily_nbytes: Most bytes of blobs to write in a day, None for no limit.
        num_evicted: How many segments were evicted to make room.
    """

    def __init__(
        self,
        index: Index,
        blobs: BlobFolder,
        *,
        max_nbytes: int,
        min_free_nbytes: int | None = None,
        max_daily_nbytes: int | None = None,
    ) -> None:
        self._index = index
        self._blobs = blobs
        self.max_nbytes = max_nbytes
        self.min_free_nbytes = min_free_nbytes
        self.max_daily_nbytes = max_daily_nbytes
        self.num_evicted = 0

    def check_free(self, nbytes: int) -> None:
        """Raise StoreFullError if the disk or the day have no room for more bytes."""
        check_disk(self._blobs.root, nbytes, self.min_free_nbytes)
        limit = self.max_daily_nbytes
        written = self._index.history.written().today_nbytes
        if limit is not None and written + nbytes > limit:
            raise StoreFullError(
                f"{format_size(written)} of the {format_size(limit)} that may be "
                "written in a day are, raise --daily-writes or wait"
            )

    def try_reserve(
        self, nbytes: int, *, protect: Mapping[str, int] | None = None
    ) -> None:
        """Do as `reserve` if that is possible, otherwise nothing."""
        with contextlib.suppress(StoreFullError):
            self.reserve(nbytes, protect=protect)

    def reserve(self, nbytes: int, *, protect: Mapping[str, int] | None = None) -> None:
        """Sweep garbage, then evict, until more bytes fit below the size limit.

        Args:
            nbytes: The bytes that are needed.
            protect: Keys of segments that must stay, with their ancestors, and up to
                which position.

        Raises:
            StoreFullError: They cannot fit; nothing was evicted then.
        """
        # Again and again, because a blob that is gone already frees less than its row
        # says.
        while not self._fits(nbytes):
            self._index.database.refresh()
            self._index.clock.settle()
            self._index.database.shrink()
            leaves = self._index.leaves(protect=protect)
            plan = self._plan(nbytes, leaves)
            if not plan.removals and not plan.garbage:
                return
            prune.execute(self._index, self._blobs, plan)
            if plan.removals and self._index.leaves(protect=protect) == leaves:
                # It would be tried for ever.
                raise self._full_error(nbytes)
            self.num_evicted += len(plan.removals)

    def _fits(self, nbytes: int) -> bool:
        return self._blobs.files.total_nbytes() + nbytes <= self.max_nbytes

    def _plan(self, nbytes: int, leaves: Collection[SegmentNode]) -> PrunePlan:
        garbage = prune.find_garbage(self._index, self._blobs)
        total = self._blobs.files.total_nbytes() - prune.sum_nbytes(garbage)
        self._check_foreign(total - self.max_nbytes)
        over = total - self._stuck_nbytes() + nbytes - self.max_nbytes
        evicted = plan_eviction(leaves, nbytes=over, now=self._index.clock.time())
        if prune.sum_nbytes(evicted) < over:
            raise self._full_error(nbytes)
        removals = prune.removals_of(dict.fromkeys(evicted, "makes room"))
        return PrunePlan(tuple(removals), tuple(garbage), total)

    def _stuck_nbytes(self) -> int:
        """Return the size of a WAL that cannot be emptied now, because it is read.

        Nothing is evicted for it, which would make it larger.
        """
        nbytes = self._blobs.files.wal_nbytes()
        if nbytes > max(self.max_nbytes // WAL_SHARE, WAL_NBYTES):
            raise StoreFullError(
                f"the index has {format_size(nbytes)} in its WAL, which is kept by "
                f"{told(self._index.database.reader())}, end it"
            )
        return nbytes

    def _check_foreign(self, over: int) -> None:
        """Raise StoreFullError if foreign files alone exceed the limit."""
        if over <= self.max_nbytes // prune.FOREIGN_SHARE:
            # As in every full store: there is no need to look for them.
            return
        foreign = self._blobs.files.foreign()
        if prune.foreign_excess(foreign, over, self.max_nbytes):
            raise StoreFullError(
                f"the store is over its limit of {format_size(self.max_nbytes)}: "
                f"{describe_foreign(foreign)}"
            )

    def _full_error(self, nbytes: int) -> StoreFullError:
        limit = format_size(self.max_nbytes)
        room = f"{format_size(nbytes)} do not fit into the limit of {limit}"
        pinned = pinned_nbytes(self._index.leaves())
        if pinned:
            advice = f" because {format_size(pinned)} are pinned, unpin some of it"
        else:
            advice = ", raise it with --max-size or PROMPTCACHE_MAX_SIZE"
        return StoreFullError(room + advice)


def check_disk(folder: Path, nbytes: int, min_free_nbytes: int | None = None) -> None:
    """Raise StoreFullError if too little of a folder's disk would stay free."""
    volume = os.statvfs(folder)
    free = volume.f_bavail * volume.f_frsize
    floor = min_free_nbytes
    if floor is None:
        total = volume.f_blocks * volume.f_frsize
        floor = min(DEFAULT_FLOOR_NBYTES, total // DEFAULT_FLOOR_SHARE)
    if floor and free - nbytes < floor:
        raise StoreFullError(
            f"the disk has {format_size(free)} free and {format_size(floor)} are "
            "to stay free, make room there or lower PROMPTCACHE_MIN_FREE"
        )
