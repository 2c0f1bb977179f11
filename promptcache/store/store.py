"""The store: the one owner of index and blobs.

It never sees a tensor: whoever saves hands over a function that encodes a range of
tokens, and whoever loads gets the path of a blob.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from promptcache import config
from promptcache.errors import DamagedBlobError
from promptcache.locks import Patience
from promptcache.segments.blob_format import BlobHeader
from promptcache.segments.chain import Chain
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import (
    EncodedSegment,
    Match,
    Priority,
    PromptOrigin,
    SegmentSlice,
)
from promptcache.store import catalog, usage
from promptcache.store.folder import StoreFolder
from promptcache.store.index.rows import PrefixRow
from promptcache.store.lookup import longest_match
from promptcache.store.maintenance.disk_budget import DiskBudget
from promptcache.store.nearby import find_neighbourhood, joined
from promptcache.store.reports import (
    PinQuota,
    Prefix,
    PrefixReport,
    PruneReport,
    Usage,
    Written,
)
from promptcache.store.types import LoadEstimate, NearbyPrefixes, RequestUsage
from promptcache.store.writer import Encode, SegmentWriter


class PrefixStore(StoreFolder):
    """Prefixes on disk: found by token ids, kept under a size limit.

    Invariants:
        A row refers only to a blob that is durably in place.
        A row is deleted before its blob.
        Only leaves are evicted, pinned prefixes and their ancestors never.
        All files of the store fit into `max_nbytes` after every save.
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
                and whom to tell.

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
        self._writer = SegmentWriter(self._index, self._blobs, self._budget)

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

    # Reading

    def lookup(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        *,
        generating: bool = False,
        skip: Collection[str] = (),
    ) -> Match:
        """Return the longest cached prefix of token ids that a run can take over from.

        Args:
            token_ids: The prompt.
            fingerprint: What KV values depend on. Of one whose rows are stored in
                fewer bits, the exact rows are taken where they reach as far.
            generating: Leave at least one token to read, unless the logits after the
                last one are stored.
            skip: Keys of segments to do without.

        Raises:
            StoreError: The index cannot be read.
        """
        self._index.database.refresh()
        chains = (Chain(f.digest, token_ids) for f in fingerprint.reusable)
        matches = (
            longest_match(self._index, chain, generating=generating, skip=skip)
            for chain in chains
        )
        # Of two that are equally long, the first.
        return max(matches, key=lambda match: match.cached_tokens)

    def key_of(self, token_ids: Sequence[int], fingerprint: Fingerprint) -> str:
        """Return the key that a prefix has, or would have."""
        return Chain(fingerprint.digest, token_ids).key_at(len(token_ids))

    def open_blob(self, part: SegmentSlice) -> tuple[Path, BlobHeader]:
        """Return the path and the verified header of a matched segment's blob.

        Raises:
            DamagedBlobError: It is missing or does not hold this segment.
            StoreFormatError: A newer promptcache wrote it.
        """
        header = self._blobs.read_header(part.key)
        if (header.info.start, header.info.end) != (part.start, part.end):
            raise DamagedBlobError("blob holds another range of tokens")
        return self._blobs.path(part.key), header

    def holds(self, part: SegmentSlice) -> bool:
        """Return whether a matched segment is there as it was. Raises StoreError."""
        return self._index.has_segment(part.key, part.start, part.end)

    def nbytes_of(self, match: Match) -> int:
        """Return the size of the blobs of a match. Raises StoreError."""
        return self._index.nbytes_of([part.key for part in match.slices])

    def nearby(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        origin: PromptOrigin | None = None,
    ) -> NearbyPrefixes:
        """Return what is stored, and was, that is close to a prompt.

        Only what is in the fingerprint's namespace counts.

        Args:
            token_ids: The prompt.
            fingerprint: What its KV values depend on.
            origin: How it was rendered.

        Raises:
            StoreError: The index cannot be read.
        """
        chains = [Chain(f.digest, token_ids) for f in fingerprint.reusable]
        with self._index.database.reading():
            return joined(
                [
                    find_neighbourhood(
                        self._index, chain, origin, namespace=fingerprint.namespace
                    )
                    for chain in chains
                ],
                fingerprint,
            )

    # What requests got

    def touch(self, match: Match) -> str | None:
        """Note that a match was reused; return the key of the prefix it counts for.

        Raises StoreError.
        """
        return usage.touch(self._index, match)

    def record(self, receipt: RequestUsage) -> tuple[str | None, float]:
        """Note what a request reused.

        Return the key of the prefix that it counts for, and the seconds saved: what
        reading the reused tokens would have taken at this model's speed on this
        machine, or 0 until that is known. Raises StoreError.
        """
        return usage.record(self._index, self._budget, receipt)

    def add_speed(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long a model took to read so many tokens. Raises StoreError."""
        usage.add_prefill(self._index, fingerprint, num_tokens, seconds)

    def add_load(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long it took to load so many cached tokens. Raises StoreError."""
        usage.add_load(self._index, fingerprint, num_tokens, seconds)

    def prefill_speed(self, fingerprint: Fingerprint) -> float | None:
        """Return how many tokens a second a model reads here, or None if unknown.

        Raises StoreError.
        """
        return usage.prefill_speed(self._index, fingerprint)

    def estimate(
        self, fingerprint: Fingerprint, num_tokens: int
    ) -> LoadEstimate | None:
        """Return what it takes to load so many cached tokens, and to read them again.

        None until both were measured on this machine. A load that is an hour old is
        not believed, so that it is tried again from time to time. Raises StoreError.
        """
        return usage.estimate(self._index, fingerprint, num_tokens)

    def usage(self, *, namespace: str | None = None) -> list[Usage]:
        """Return what requests got from the store, by model and prefix.

        Only those of a namespace, if one is given. Raises StoreError.
        """
        return self._index.history.usage(namespace)

    def written(self) -> Written:
        """Return how many bytes of blobs were written. Raises StoreError."""
        return self._index.history.written()

    # Saving

    def missing(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        *,
        is_tail: bool = False,
        cut_at: Collection[int] = (),
        after: int = 0,
    ) -> list[tuple[int, int]]:
        """Return the ranges of a prefix that `save` would ask for, as things are now.

        Up to `after` it is as good as stored; see `save`. Raises StoreError.
        """
        return self._writer.missing(
            token_ids, fingerprint, is_tail=is_tail, cut_at=cut_at, after=after
        )

    def save(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        encode: Encode,
        *,
        is_prefix: bool = True,
        is_tail: bool = False,
        cut_at: Collection[int] = (),
        state_nbytes: int = 0,
        next_turn: int | None = None,
    ) -> str:
        """Save what is not stored yet of a prefix; return its key.

        Args:
            token_ids: The whole prefix.
            fingerprint: What its KV values depend on.
            encode: Returns the state of a token range `[start, end)`; it is called
                for the ranges that are missing only.
            is_prefix: Whether to list its end, or keep it as a step on the way.
            is_tail: Whether what comes after the last of `cut_at` is good for this
                very prompt only.
            cut_at: Where segments must end, in place of multiples of
                `MAX_SEGMENT_TOKENS`.
            state_nbytes: Size of the checkpoint that follows, without which the rows
                are of no use: what fits only without it is not saved.
            next_turn: See `save_checkpoint`.

        Raises:
            StoreFullError: It does not fit and nothing more may be evicted.
            StoreError: It cannot be written.
        """
        return self._writer.save(
            token_ids,
            fingerprint,
            encode,
            is_prefix=is_prefix,
            is_tail=is_tail,
            cut_at=cut_at,
            state_nbytes=state_nbytes,
            next_turn=next_turn,
        )

    def save_checkpoint(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        segment: EncodedSegment,
        *,
        is_prefix: bool = True,
        priority: Priority = Priority.STEP,
        next_turn: int | None = None,
    ) -> str:
        """Save the state at the end of a prefix whose rows are stored; return its key.

        Older checkpoints on the way there are thinned out.

        Args:
            token_ids: The whole prefix.
            fingerprint: What its KV values depend on.
            segment: The state.
            is_prefix: Whether to list its end, or keep it as a step on the way.
            priority: How much it is worth against others.
            next_turn: Where the next turn is likely to part from this one, so that the
                last checkpoint up to there stays.

        Raises:
            StoreFullError: It does not fit and nothing more may be evicted.
            StoreError: It cannot be written.
        """
        return self._writer.save_checkpoint(
            token_ids,
            fingerprint,
            segment,
            is_prefix=is_prefix,
            priority=priority,
            next_turn=next_turn,
        )

    def configs(self, template: str, *, namespace: str = "") -> list[dict[str, Any]]:
        """Return with which arguments of a template of this hash prompts were rendered.

        Those of a namespace count. Raises StoreError.
        """
        return self._index.history.configs(template, namespace)

    def set_origin(self, key: str, origin: PromptOrigin) -> None:
        """Note how a listed prefix was rendered. Raises StoreError."""
        with self._index.database.writing():
            self._index.prefixes.set_origin(key, origin)
            self._index.history.add_config(key, origin)
        self._budget.try_reserve(0)

    # Listing

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
