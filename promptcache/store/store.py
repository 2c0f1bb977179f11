"""The store: the one owner of index and blobs.

It never sees a tensor: whoever saves hands over a function that encodes a range of
tokens, and whoever loads gets the path of a blob.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from promptcache import config
from promptcache.locks import Patience
from promptcache.segments.chain import Chain
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import Match
from promptcache.store import catalog
from promptcache.store.folder import StoreFolder
from promptcache.store.index.rows import PrefixRow
from promptcache.store.lookup import longest_match
from promptcache.store.maintenance.disk_budget import DiskBudget
from promptcache.store.reports import (
    PinQuota,
    Prefix,
    PrefixReport,
    PruneReport,
    Usage,
    Written,
)
from promptcache.store.segments import Segments
from promptcache.store.usage import UsageLog


class PrefixStore(StoreFolder):
    """Prefixes on disk: found by token ids, kept under a size limit.

    Invariants:
        A row refers only to a blob that is durably in place.
        A row is deleted before its blob.
        Only leaves are evicted, pinned prefixes and their ancestors never.
        All files of the store fit into `max_nbytes` after every save.

    Attributes:
        segments: What runs read and save.
        usage_log: What runs report of it, and what loads are likely to cost.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_nbytes: int | None = None,
        min_free_nbytes: int | None = None,
        max_daily_nbytes: int | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Open a store, creating it where there is none.

        An index that is missing or damaged is rebuilt from the blobs; `rebuilt`
        then tells how many segments it got back. `num_evicted` counts what had to go
        to make room for saves.

        Args:
            path: The folder, else `PROMPTCACHE_DIR`, else in the user's cache folder.
            max_nbytes: Size limit of all files in bytes, else
                `PROMPTCACHE_MAX_SIZE`, else 10 GB.
            min_free_nbytes: Save nothing that leaves less free on the disk, else
                `PROMPTCACHE_MIN_FREE`, else 1 GB or a twentieth of a small disk.
            max_daily_nbytes: Most bytes to write in a day, else
                `PROMPTCACHE_DAILY_WRITES`, else no limit.
            patience: How long to wait for other processes, else 5 seconds for a lock,
                and what to call then.

        Raises:
            StoreFormatError: A newer promptcache wrote it.
            StoreError: It cannot be opened.
        """
        folder = config.store_dir(path)
        limit = config.max_nbytes() if max_nbytes is None else max_nbytes
        if min_free_nbytes is None:
            min_free_nbytes = config.min_free_nbytes()
        if max_daily_nbytes is None:
            max_daily_nbytes = config.max_daily_nbytes()
        super().__init__(folder, patience)
        self._budget = DiskBudget(
            self._index,
            self._blobs,
            max_nbytes=limit,
            min_free_nbytes=min_free_nbytes,
            max_daily_nbytes=max_daily_nbytes,
        )
        self.segments = Segments(self, self._budget)
        self.usage_log = UsageLog(self._index, self._budget)

    @property
    def max_nbytes(self) -> int:
        """Return the size limit of all files in bytes."""
        return self._budget.max_nbytes

    @max_nbytes.setter
    def max_nbytes(self, nbytes: int) -> None:
        self._budget.max_nbytes = nbytes

    @property
    def num_evicted(self) -> int:
        """Return how many segments had to go to make room for saves."""
        return self._budget.num_evicted

    def lookup(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        *,
        skip: Collection[str] = (),
    ) -> Match:
        """Return the longest cached prefix of token ids that a run can resume.

        Args:
            token_ids: The prompt.
            fingerprint: What KV values depend on. Of one whose rows are stored in
                fewer bits, the exact rows are taken where they reach as far.
            skip: Keys of segments to do without.

        Raises:
            StoreError: The index cannot be read.
        """
        self._index.database.refresh()
        chains = (Chain(f.digest, token_ids) for f in fingerprint.reusable)
        matches = (longest_match(self._index, chain, skip=skip) for chain in chains)
        # The first one if two are equally long.
        return max(matches, key=lambda match: match.cached_tokens)

    def usage(self, *, namespace: str | None = None) -> list[Usage]:
        """Return what requests got from the store, by model and prefix.

        Only those of a namespace, if one is given. Raises StoreError.
        """
        return self._index.history.usage(namespace)

    def written(self) -> Written:
        """Return how many bytes of blobs were written. Raises StoreError."""
        return self._index.history.written()

    def prefixes(self, *, namespace: str | None = None) -> list[Prefix]:
        """Return what was built or saved, the last used first.

        Only what is in a namespace, if one is given. Raises StoreError.
        """
        return catalog.prefixes(self._index, namespace)

    def resolve(self, key_or_name: str, *, namespace: str | None = None) -> Prefix:
        """Return the prefix with a name, a key or an unambiguous start of one.

        Args:
            key_or_name: The prefix.
            namespace: Where to look. Without one all are looked through, and a name
                that is not in the default namespace is given as `namespace/name`.

        Raises:
            KeyNotFoundError: There is none, or more than one.
        """
        return catalog.resolve(self._index, key_or_name, namespace)

    def report(self, key_or_name: str, *, namespace: str | None = None) -> PrefixReport:
        """Return all that is known of a prefix; see `resolve`.

        Raises:
            KeyNotFoundError: There is no such prefix.
            DamagedBlobError: One of its blobs cannot be read.
        """
        return catalog.report(self._index, self._blobs, key_or_name, namespace)

    def listed_at(self, key: str) -> float | None:
        """Return when a prefix was listed, or None if it is not. Raises StoreError."""
        return self._index.prefixes.created_at(key)

    def unlist(self, key: str) -> None:
        """Stop listing a prefix that is not pinned; what it holds stays.

        Raises StoreError.
        """
        with self._index.database.writing():
            if key not in {pin.key for pin in self._index.prefixes.pins()}:
                self._index.prefixes.remove(key)

    def pin(
        self,
        key_or_name: str,
        name: str,
        *,
        manifest: str | None = None,
        namespace: str | None = None,
        quota: PinQuota | None = None,
    ) -> Prefix:
        """Name a prefix, so that eviction keeps it with its ancestors; return it.

        A prefix has one name. A name that another prefix of its namespace has moves
        to this one.

        Args:
            key_or_name: The prefix.
            name: Its name from now on, of up to 128 characters.
            manifest: The file that wants it so, if any.
            namespace: See `resolve`.
            quota: How much may be pinned in its namespace, any amount if None.

        Raises:
            KeyNotFoundError: There is no such prefix.
            QuotaError: More would be pinned than may be; nothing was changed.
            UsageError: The name cannot be one.
        """
        return catalog.pin(
            self._index,
            self._blobs,
            key_or_name,
            name,
            manifest=manifest,
            namespace=namespace,
            quota=quota,
        )

    def unpin(self, name: str, *, namespace: str | None = None) -> Prefix:
        """Take a name away, so that its prefix may be evicted; return the prefix.

        Args:
            name: The name.
            namespace: See `resolve`.

        Raises:
            KeyNotFoundError: No prefix has this name.
        """
        return catalog.unpin(self._index, self._blobs, name, namespace=namespace)

    def pins(self, *, namespace: str | None = None) -> list[PrefixRow]:
        """Return the prefixes that are pinned.

        Only those of a namespace, if one is given. Raises StoreError.
        """
        return self._index.prefixes.pins(namespace)

    def remove(self, key_or_name: str) -> PruneReport:
        """Remove a prefix, even a pinned one, and the segments only it needs.

        Raises:
            KeyNotFoundError: There is no such prefix.
            StoreError: It cannot be removed.
        """
        return catalog.remove(self._index, self._blobs, key_or_name)
