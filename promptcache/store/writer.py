"""The segment writer: saves what is missing of a prefix, under the size limit.

It writes a blob, then the row, and takes back what turns out not to fit. What is in
the segments is left to whoever encodes them.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from promptcache.errors import StoreError, StoreFullError
from promptcache.segments.chain import Chain
from promptcache.segments.cut import token_nbytes
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import (
    CHECKPOINT_TAG,
    EncodedSegment,
    Priority,
    SegmentInfo,
)
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.lookup import checkpoints_on, longest_match, longest_stored
from promptcache.store.maintenance import prefix_backup, prune
from promptcache.store.maintenance.disk_budget import DiskBudget
from promptcache.store.maintenance.eviction import surplus_checkpoints

# mlx-lm's prefill step: what an interrupted build loses at most, and what a match
# that ends inside a segment reads for nothing.
MAX_SEGMENT_TOKENS = 2048
# How often a save starts again because another process evicted its parent.
SAVE_ATTEMPTS = 3
# What a header and rows take besides the tensors, and what SQLite's WAL grows by.
ROWS_NBYTES = 32 * 1024
Encode = Callable[[int, int], EncodedSegment]


class SegmentWriter:
    """Writes segments and checkpoints into a store, blob by blob.

    Invariants:
        A row refers only to a blob that is durably in place.
        All files of the store fit into its limit after every save.
    """

    def __init__(self, index: Index, blobs: BlobFolder, budget: DiskBudget) -> None:
        self._index = index
        self._blobs = blobs
        self._budget = budget

    def missing(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        *,
        cut_at: Collection[int] = (),
        after: int = 0,
    ) -> list[tuple[int, int]]:
        """Return the ranges of a prefix that `save` would ask for, as things are now.

        Up to `after` it is as good as stored; see `save`. Raises StoreError.
        """
        chain = Chain(fingerprint.digest, token_ids)
        rows = longest_stored(self._index, chain, limit=len(chain))
        return [*_cuts(max(rows.cached_tokens, after), len(chain), cut_at)]

    def save(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        encode: Encode,
        *,
        is_prefix: bool = True,
        cut_at: Collection[int] = (),
        state_nbytes: int = 0,
        next_turn: int | None = None,
    ) -> str:
        """Save what is not stored yet of a prefix; return its key.

        Args:
            encode: Returns the state of a token range `[start, end)`; it is called
                for the ranges that are missing only.
            is_prefix: Whether to list its end, or keep it as a step on the way.
            cut_at: Where segments must end, in place of multiples of
                `MAX_SEGMENT_TOKENS`.
            state_nbytes: Size of the checkpoint that follows, without which the rows
                are of no use: what fits only without it is not saved.
            next_turn: See `save_checkpoint`.

        Raises:
            StoreFullError: It does not fit and nothing more may be evicted.
            StoreError: It cannot be written.
        """
        chain = Chain(fingerprint.digest, token_ids)
        state_nbytes += ROWS_NBYTES if state_nbytes else 0

        def attempt() -> bool:
            """Add what is missing; return whether all ancestors are still there."""
            rows = longest_stored(self._index, chain, limit=len(chain))
            parent_key = rows.key
            place = self._place(token_ids, chain, next_turn) if state_nbytes else {}
            for start, end in _cuts(rows.cached_tokens, len(chain), cut_at):
                segment = encode(start, end)
                is_end = is_prefix and end == len(chain)
                info = self._info(chain, fingerprint, segment, start, end, is_end)
                rest = segment.nbytes * (len(chain) - end) // (end - start)
                more = rest + state_nbytes if state_nbytes else 0
                protect = {**place, **({parent_key: start} if parent_key else {})}
                if not self._add(info, segment, chain, protect, more):
                    return False
                parent_key = info.key
            assert parent_key is not None
            end_key = self._checkpoint_key(chain) or parent_key
            return not is_prefix or self._list_prefix(chain, end_key)

        self._try(attempt)
        return chain.key_at(len(chain))

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

        Older checkpoints on the way there are thinned out. For arguments see `save`.

        Args:
            segment: The state.
            priority: How much it is worth against others.
            next_turn: Where the next turn is likely to part from this one, so that the
                last checkpoint up to there stays.

        Raises:
            StoreFullError: It does not fit and nothing more may be evicted.
            StoreError: It cannot be written.
        """
        chain = Chain(fingerprint.digest, token_ids)
        position = len(chain)

        def attempt() -> bool:
            rows = longest_stored(self._index, chain, limit=position)
            if rows.key is None or rows.cached_tokens < position:
                raise StoreError("its parent segment was evicted meanwhile")
            info = self._info(
                chain, fingerprint, segment, position, position, is_prefix, priority
            )
            if self._checkpoint_key(chain) is not None:
                return not is_prefix or self._list_prefix(chain, info.key)
            place = self._place(token_ids, chain, next_turn)
            protect = {**place, rows.key: position}
            if not self._add(info, segment, chain, protect):
                return False
            way = [(part.key, part.stop) for part in rows.slices]
            with self._index.database.writing():
                self._index.touch_passed(way, now=self._index.clock.now())
            self._thin(info.key, next_turn)
            self._hold_limit(info.key, position, place)
            return not is_prefix or self._list_prefix(chain, info.key)

        self._try(attempt)
        return chain.key_at(position)

    def _info(
        self,
        chain: Chain,
        fingerprint: Fingerprint,
        segment: EncodedSegment,
        start: int,
        end: int,
        is_prefix: bool,
        priority: Priority = Priority.STEP,
    ) -> SegmentInfo:
        info = SegmentInfo(
            key="",
            start_hash=chain.key_at(start),
            created_at=self._index.clock.time(),
            fingerprint=fingerprint,
            start=start,
            end=end,
            is_prefix=is_prefix,
            resumption=segment.resumption,
            priority=priority,
        )
        return replace(info, key=chain.tagged_key_at(end, info.tag))

    def _place(
        self, token_ids: Sequence[int], chain: Chain, next_turn: int | None
    ) -> dict[str, int]:
        """Return the key of what the next turn would resume at now, and where."""
        shared = Chain(chain.fingerprint, token_ids[:next_turn])
        slices = longest_match(self._index, shared).slices
        return {part.key: part.stop for part in slices[-1:]}

    def _try(self, attempt: Callable[[], bool]) -> None:
        """Save, again where others changed its ancestors meanwhile."""
        if self._index.database.read_only:
            raise StoreError(f"the store {self._blobs.root} is read-only")
        try:
            if any(attempt() for _ in range(SAVE_ATTEMPTS)):
                return
        except OSError as error:
            raise StoreError(
                f"cannot write to the store {self._blobs.root} ({error.strerror})"
            ) from error
        raise StoreError("other processes evict faster than this one can save")

    def _list_prefix(self, chain: Chain, segment_key: str) -> bool:
        with self._index.database.writing():
            segment_id = self._index.segment_id(segment_key)
            if segment_id is None:
                return False
            now = self._index.clock.now()
            is_new = self._index.prefixes.add(
                chain.key_at(len(chain)), segment_id, len(chain), now=now
            )
            if is_new:
                # Its blob does not tell that a prefix ends there.
                prefix_backup.write_prefixes(self._index, self._blobs)
        if is_new:
            self._hold_limit(segment_key, len(chain))
        return True

    def _checkpoint_key(self, chain: Chain) -> str | None:
        """Return the key of the checkpoint at the end of a chain, if there is one."""
        key = chain.tagged_key_at(len(chain), CHECKPOINT_TAG)
        return key if self._index.segment_id(key) is not None else None

    def _thin(self, key: str, next_turn: int | None) -> None:
        """Remove the checkpoints that a new one makes less worth their bytes."""
        checkpoints = checkpoints_on(self._index, key)
        if not checkpoints:
            return
        surplus = surplus_checkpoints(
            [checkpoint for checkpoint, is_on_way in checkpoints.items() if is_on_way],
            [
                checkpoint
                for checkpoint, is_on_way in checkpoints.items()
                if not is_on_way
            ],
            next_turn=next_turn,
        )
        removed = [c.key for c in surplus if self._index.remove_leaf(c.key)]
        prune.remove_blobs(self._index, self._blobs, removed)

    def _add(
        self,
        info: SegmentInfo,
        segment: EncodedSegment,
        chain: Chain,
        protect: Mapping[str, int],
        more_nbytes: int = 0,
    ) -> bool:
        """Write a blob, then publish it together with its row.

        Room is made for what follows, too. Return False if another process removed
        its parent meanwhile.
        """
        with self._blobs.files.write_lock():
            nbytes = segment.nbytes + ROWS_NBYTES + more_nbytes
            self._budget.check_free(nbytes)
            self._budget.reserve(nbytes, protect=protect)
            try:
                is_added = self._write(info, segment, chain)
            except StoreError:
                # The blob may be in place, on a disk that had no room for its row.
                with contextlib.suppress(StoreError):
                    prune.remove_blobs(self._index, self._blobs, [info.key])
                    self._index.database.shrink()
                raise
            if is_added:
                self._hold_limit(info.key, info.end, protect)
        return is_added

    def _write(self, info: SegmentInfo, segment: EncodedSegment, chain: Chain) -> bool:
        with (
            self._blobs.staged(info, segment) as staged,
            self._index.database.writing(),
        ):
            if self._index.segment_id(info.key) is not None:
                return True
            rows = longest_stored(self._index, chain, limit=info.end)
            if rows.cached_tokens != info.start:
                return False
            staged.publish()
            self._index.add_segment(
                info,
                chain,
                parent_key=rows.key,
                nbytes=staged.nbytes,
                token_nbytes=token_nbytes(info, segment.specs),
            )
            self._index.history.add_written(staged.nbytes, now=info.created_at)
        return True

    def _hold_limit(
        self, key: str, end: int, protect: Mapping[str, int] | None = None
    ) -> None:
        """Make up for rows that took more room than was made, or take them back."""
        protect = {**(protect or {}), key: end}
        try:
            self._budget.reserve(0, protect=protect)
            # What is noted of it later is to fit, too.
            self._budget.try_reserve(ROWS_NBYTES, protect=protect)
        except StoreFullError:
            self._index.remove_leaf(key)
            prune.remove_blobs(self._index, self._blobs, [key])
            self._index.database.shrink()
            raise


def _cuts(start: int, end: int, cut_at: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield the segments of a range."""
    places = cut_at or range(0, end, MAX_SEGMENT_TOKENS)
    stops = [*sorted(place for place in places if start < place < end), end]
    if start < end:
        yield from pairwise([start, *stops])
