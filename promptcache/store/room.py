"""Room: what a store's files may take, and how more of it is made."""

import contextlib
from collections.abc import Mapping

from promptcache import pruning
from promptcache.allowance import Allowance
from promptcache.blobs import BlobFolder
from promptcache.errors import StoreFullError
from promptcache.index import Index


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
        self.num_evicted += pruning.make_room(
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
