"""The store: the one owner of index and blobs.

It never sees a tensor: whoever saves hands over a function that encodes a range of
tokens, and whoever loads gets the path of a blob.
"""

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from promptcache import location, pruning, recovery
from promptcache.allowance import Allowance
from promptcache.blobs import BlobFolder
from promptcache.chain import BLOCK_SIZE, Chain, unpack
from promptcache.errors import (
    DamagedBlobError,
    DamagedIndexError,
    KeyNotFoundError,
    StoreError,
    StoreFullError,
    UsageError,
)
from promptcache.eviction import surplus_checkpoints
from promptcache.index import Index
from promptcache.index.history import Deed
from promptcache.matching import checkpoints_on, longest_match, longest_rows
from promptcache.neighbourhood import find_neighbourhood, joined
from promptcache.types import (
    BlobHeader,
    EncodedSegment,
    Fingerprint,
    ListedPrefix,
    LoadEstimate,
    Match,
    Neighbourhood,
    Origin,
    Prefix,
    PrefixReport,
    PrunePlan,
    PrunePolicy,
    PruneReport,
    Receipt,
    Removal,
    Resumption,
    SegmentInfo,
    SegmentReport,
    SegmentRow,
    SegmentSlice,
    Usage,
    VerifyReport,
    Worth,
    Written,
    tag_of,
)

# mlx-lm's prefill step: what an interrupted build loses at most, and what a match
# that ends inside a segment reads for nothing.
MAX_SEGMENT_TOKENS = 2048
# How often a save starts again because another process evicted what it hangs on.
SAVE_ATTEMPTS = 3

# What a header and rows take besides the tensors, and what SQLite's WAL grows by.
ROWS_NBYTES = 32 * 1024

# Shorter reads tell more of a model's fixed costs than of its speed.
LEAST_SPEED_TOKENS = 64
LEAST_LOADED_TOKENS = 1000
# Other work, or a page cache that was cold, may have slowed a load down.
LOAD_BELIEVED_SECONDS = 3600

# In place of a key: what was reused is in memory and nowhere on disk.
MEMORY_KEY = "memory"

Encode = Callable[[int, int], EncodedSegment]


class PrefixStore:
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

        Raises:
            StoreFormatError: A newer promptcache wrote it.
            StoreError: It cannot be opened.
        """
        self.path = location.store_dir(path)
        self.max_nbytes = location.max_nbytes() if max_nbytes is None else max_nbytes
        self._allowance = Allowance(
            location.min_free_nbytes() if min_free_nbytes is None else min_free_nbytes,
            location.max_daily_nbytes()
            if max_daily_nbytes is None
            else max_daily_nbytes,
        )
        self.rebuilt = 0
        self.num_evicted = 0
        self._blobs = BlobFolder(self.path)
        try:
            self._blobs.create()
        except OSError as error:
            if not os.path.exists(self.path / "index.db"):
                raise StoreError(
                    f"the store {self.path} cannot be created ({error.strerror})"
                ) from error
        self._index = self._open_index()

    def _open_index(self) -> Index:
        try:
            return self._new_index()
        except DamagedIndexError:
            with self._locked("index"):
                return self._recovered_index()

    def _recovered_index(self) -> Index:
        try:
            # Another process may have recovered it while this one waited.
            return self._new_index()
        except DamagedIndexError:
            recovery.set_index_aside(self._blobs)
            return self._new_index()

    def _new_index(self) -> Index:
        def populate(index: Index) -> None:
            self.rebuilt += recovery.rebuild(index, self._blobs)

        return Index(self.path / "index.db", populate=populate)

    @property
    def is_read_only(self) -> bool:
        """Return whether nothing can be saved here."""
        return self._index.database.read_only

    def close(self) -> None:
        """Close the index; the store cannot be used any more."""
        self._index.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

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

    def nbytes_of(self, match: Match) -> int:
        """Return the size of the blobs of a match. Raises StoreError."""
        return self._index.nbytes_of([part.key for part in match.slices])

    def touch(self, match: Match) -> str | None:
        """Note that a match was reused; return the key of the prefix it counts for.

        Raises StoreError.
        """
        keys = [part.key for part in match.slices]
        return self._index.touch(keys, match.cached_tokens, now=time.time())

    def record(self, receipt: Receipt) -> tuple[str | None, float]:
        """Note what a request reused.

        Return the key of the prefix that it counts for, and the seconds saved: what
        reading the reused tokens would have taken at this model's speed on this
        machine, or 0 until that is known. Raises StoreError.
        """
        match, cached_tokens = receipt.match, receipt.cached_tokens
        speed = self.prefill_speed(receipt.fingerprint)
        saved_seconds = cached_tokens / speed if speed else 0.0
        if self.is_read_only:
            return match.key, saved_seconds
        with self._index.database.impatient():
            with self._index.database.writing():
                # Less is shared by chance: templates begin alike.
                least = min(BLOCK_SIZE, cached_tokens + receipt.prefilled_tokens - 1)
                is_hit = cached_tokens >= max(least, 1)
                key = (self.touch(match) or match.key) if is_hit else None
                counts_for = (key or MEMORY_KEY) if is_hit else None
                self._index.history.add_receipt(receipt, counts_for, saved_seconds)
            self._keep_room(0, protect=match.key)
        return key or match.key, saved_seconds

    def add_speed(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long a model took to read so many tokens. Raises StoreError."""
        if num_tokens >= LEAST_SPEED_TOKENS:
            self._add_speed(fingerprint, "prefill", num_tokens, seconds)

    def add_load(
        self, fingerprint: Fingerprint, num_tokens: int, seconds: float
    ) -> None:
        """Note how long it took to load so many cached tokens. Raises StoreError."""
        if num_tokens >= LEAST_LOADED_TOKENS:
            self._add_speed(fingerprint, "load", num_tokens, seconds)

    def _add_speed(
        self, fingerprint: Fingerprint, deed: Deed, num_tokens: int, seconds: float
    ) -> None:
        if seconds <= 0 or self.is_read_only:
            return
        with self._index.database.impatient():
            now = time.time()
            self._index.history.add_speed(
                fingerprint, deed, num_tokens, seconds, now=now
            )

    def prefill_speed(self, fingerprint: Fingerprint) -> float | None:
        """Return how many tokens a second a model reads here, or None if unknown.

        Raises StoreError.
        """
        return self._index.history.speed(fingerprint.digest, "prefill")

    def estimate(
        self, fingerprint: Fingerprint, num_tokens: int
    ) -> LoadEstimate | None:
        """Return what it takes to load so many cached tokens, and to read them again.

        None until both were measured on this machine. A load that is an hour old is
        not believed, so that it is tried again from time to time. Raises StoreError.
        """
        since = time.time() - LOAD_BELIEVED_SECONDS
        load = self._index.history.speed(fingerprint.digest, "load", since=since)
        prefill = self.prefill_speed(fingerprint)
        if load is None or prefill is None:
            return None
        return LoadEstimate(num_tokens / load, num_tokens / prefill)

    def usage(self) -> list[Usage]:
        """Return what requests got from the store, by model and prefix.

        Raises StoreError.
        """
        return self._index.history.usage()

    def written(self) -> Written:
        """Return how many bytes of blobs were written. Raises StoreError."""
        return self._index.history.written()

    def neighbourhood(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        origin: Origin | None = None,
    ) -> Neighbourhood:
        """Return what is stored, and was, that is close to a prompt.

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
                [find_neighbourhood(self._index, chain, origin) for chain in chains],
                fingerprint,
            )

    def give_up(self, key: str) -> list[str]:
        """Forget a segment that cannot be used, with all that hangs on it.

        Its blob moves to `quarantine/`. Return the names that went. Raises StoreError.
        """
        return recovery.give_up(self._index, self._blobs, key)

    def prefixes(self, *, namespace: str | None = None) -> list[Prefix]:
        """Return what was built or saved, the last used first.

        Only what is in a namespace, if one is given. Raises StoreError.
        """
        with self._index.database.reading():
            tree = self._tree()
            return [
                self._with_nbytes(prefix, segment_id, tree)
                for prefix, segment_id in self._index.prefixes.all()
                if namespace in (None, self._namespace_of(segment_id))
            ]

    def _namespace_of(self, segment_id: int) -> str:
        return self._index.fingerprints.of_segment(segment_id).parts.get(
            "namespace", ""
        )

    def _with_nbytes(
        self, prefix: Prefix, segment_id: int, tree: pruning.Tree
    ) -> Prefix:
        freed = tree.freed(prefix.key, segment_id)
        return replace(prefix, nbytes=sum(segment.nbytes for segment in freed))

    def _tree(self) -> pruning.Tree:
        return pruning.Tree(self._index.leaves(), self._index.prefixes.all())

    def resolve(self, key_or_name: str) -> Prefix:
        """Return the prefix with a name, a key or an unambiguous start of one.

        Raises:
            KeyNotFoundError: There is none, or more than one.
        """
        with self._index.database.reading():
            prefix, segment_id = self._resolve(key_or_name)
            return self._with_nbytes(prefix, segment_id, self._tree())

    def _resolve(self, key_or_name: str) -> tuple[Prefix, int]:
        found = [
            (prefix, segment_id)
            for prefix, segment_id in self._index.prefixes.all()
            if (key_or_name and prefix.key.startswith(key_or_name))
            or key_or_name == prefix.name
        ]
        exact = [f for f in found if key_or_name in (f[0].name, f[0].key)]
        if len(found) > 1 and not exact:
            raise KeyNotFoundError(
                f"key {key_or_name!r} is ambiguous, {len(found)} keys begin with it: "
                f"{', '.join(prefix.key[:12] for prefix, _ in found[:4])}"
            )
        if not found:
            raise KeyNotFoundError(
                f"no prefix has the key or name {key_or_name!r}, "
                "`promptcache ls` lists them"
            )
        return (exact or found)[0]

    def report(self, key_or_name: str) -> PrefixReport:
        """Return all that is known of a prefix.

        Raises:
            KeyNotFoundError: There is no such prefix.
            DamagedBlobError: One of its blobs cannot be read.
        """
        with self._index.database.reading():
            prefix, segment_id = self._resolve(key_or_name)
            rows = self._index.path_to(segment_id)
            return PrefixReport(
                prefix=self._with_nbytes(prefix, segment_id, self._tree()),
                fingerprint=self._index.fingerprints.of_segment(segment_id),
                segments=tuple(self._segment_report(row) for row in rows),
                token_ids=unpack(self._index.token_ids(segment_id, prefix.num_tokens)),
            )

    def _segment_report(self, row: SegmentRow) -> SegmentReport:
        try:
            layout = self._blobs.read_header(row.key).layout
        except DamagedBlobError as error:
            raise DamagedBlobError(
                f"segment {row.key[:12]}: {error}, run `promptcache verify --fix`"
            ) from error
        return SegmentReport(row.key, row.start, row.end, row.nbytes, layout)

    def total_nbytes(self) -> int:
        """Return the size of all files of the store."""
        return self._blobs.total_nbytes()

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

        Args:
            token_ids: See `save`.
            fingerprint: See `save`.
            is_tail: See `save`.
            cut_at: See `save`.
            after: Up to where it is as good as stored.

        Raises:
            StoreError: The index cannot be read.
        """
        chain = Chain(fingerprint.digest, token_ids)
        rows = longest_rows(self._index, chain, limit=len(chain), is_tail=is_tail)
        return [*_cuts(max(rows.cached_tokens, after), len(chain), cut_at)]

    def save(
        self,
        token_ids: Sequence[int],
        fingerprint: Fingerprint,
        encode: Encode,
        *,
        is_prefix: bool = True,
        is_tail: bool = False,
        cut_at: Collection[int] = (),
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

        Raises:
            StoreFullError: It does not fit and nothing more may be evicted.
            StoreError: It cannot be written.
        """
        chain = Chain(fingerprint.digest, token_ids)

        def attempt() -> bool:
            """Add what is missing; tell whether no ancestor went away meanwhile."""
            rows = longest_rows(self._index, chain, limit=len(chain), is_tail=is_tail)
            parent_key = rows.key
            for start, end in _cuts(rows.cached_tokens, len(chain), cut_at):
                segment = encode(start, end)
                info = _info(
                    chain,
                    parent_key=parent_key,
                    fingerprint=fingerprint,
                    start=start,
                    end=end,
                    is_prefix=is_prefix and end == len(chain),
                    resumption=segment.resumption,
                )
                if not self._add(info, segment, chain):
                    return False
                parent_key = info.key
            assert parent_key is not None
            end_key = self._checkpoint_key(chain, is_tail=is_tail) or parent_key
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
        worth: Worth = Worth.STEP,
    ) -> str:
        """Save the state at the end of a prefix whose rows are stored; return its key.

        Older checkpoints on the way there are thinned out.

        Args:
            token_ids: The whole prefix.
            fingerprint: What its KV values depend on.
            segment: The state.
            is_prefix: Whether to list its end, or keep it as a step on the way.
            worth: How much it is worth against others.

        Raises:
            StoreFullError: It does not fit and nothing more may be evicted.
            StoreError: It cannot be written.
        """
        chain = Chain(fingerprint.digest, token_ids)
        position = len(chain)
        is_tail = not segment.resumption.extendable
        has_logits = segment.resumption.has_logits

        def attempt() -> bool:
            rows = longest_rows(self._index, chain, limit=position, is_tail=is_tail)
            if rows.key is None or rows.cached_tokens < position:
                raise StoreError("what it hangs on has been evicted meanwhile")
            info = _info(
                chain,
                parent_key=rows.key,
                fingerprint=fingerprint,
                start=position,
                end=position,
                is_prefix=is_prefix,
                resumption=segment.resumption,
                worth=worth,
            )
            known = self._checkpoint_key(chain, is_tail=is_tail)
            if known is not None and (known == info.key or not has_logits):
                return not is_prefix or self._list_prefix(chain, known)
            if not self._add(info, segment, chain):
                return False
            self._replace(info, chain)
            self._thin(info.key)
            self._hold_limit(info.key)
            return not is_prefix or self._list_prefix(chain, info.key)

        self._try(attempt)
        return chain.key_at(position)

    def _try(self, attempt: Callable[[], bool]) -> None:
        """Save, once more where others changed what it hangs on meanwhile."""
        if self.is_read_only:
            raise StoreError(f"the store {self.path} is read-only")
        try:
            if any(attempt() for _ in range(SAVE_ATTEMPTS)):
                return
        except OSError as error:
            raise StoreError(
                f"cannot write to the store {self.path} ({error.strerror})"
            ) from error
        raise StoreError("other processes evict faster than this one can save")

    def _checkpoint_key(self, chain: Chain, *, is_tail: bool) -> str | None:
        """Return the key of the checkpoint at the end of a chain, if there is one."""
        for has_logits in (True, False):
            kind = Resumption(extendable=not is_tail, has_logits=has_logits)
            tag = tag_of(kind, is_checkpoint=True)
            key = chain.tagged_key_at(len(chain), tag)
            if self._index.segment_id(key) is not None:
                return key
        return None

    def _replace(self, info: SegmentInfo, chain: Chain) -> None:
        """Remove the checkpoint that lacks the logits which a new one has."""
        kind = info.resumption._replace(has_logits=False)
        key = chain.tagged_key_at(info.end, tag_of(kind, is_checkpoint=True))
        with self._index.database.writing():
            old, new = (self._index.segment_id(k) for k in (key, info.key))
            if key == info.key or old is None or new is None:
                return
            self._index.prefixes.move(old, new)
            self._index.remove_leaf(key)
        pruning.remove_blobs(self._index, self._blobs, [key])

    def _thin(self, key: str) -> None:
        """Remove the checkpoints that a new one makes less worth their bytes."""
        found = checkpoints_on(self._index, key)
        if not found:
            return
        surplus = surplus_checkpoints(
            [checkpoint for checkpoint, is_on_way in found.items() if is_on_way],
            [checkpoint for checkpoint, is_on_way in found.items() if not is_on_way],
        )
        removed = [c.key for c in surplus if self._index.remove_leaf(c.key)]
        pruning.remove_blobs(self._index, self._blobs, removed)

    def _add(self, info: SegmentInfo, segment: EncodedSegment, chain: Chain) -> bool:
        """Write a blob, then publish it together with its row.

        Return False if another process changed what it hangs on meanwhile.
        """
        with self._blobs.room():
            nbytes = segment.nbytes + ROWS_NBYTES
            written_nbytes = self._index.history.written().today_nbytes
            self._allowance.check(self.path, nbytes, written_nbytes)
            self._make_room(nbytes, protect=info.parent_key)
            is_added = self._write(info, segment, chain)
            if is_added:
                self._hold_limit(info.key)
        return is_added

    def _write(self, info: SegmentInfo, segment: EncodedSegment, chain: Chain) -> bool:
        with (
            self._blobs.staged(info, segment) as staged,
            self._index.database.writing(),
        ):
            if self._index.segment_id(info.key) is not None:
                return True
            is_tail = not info.resumption.extendable
            rows = longest_rows(self._index, chain, limit=info.end, is_tail=is_tail)
            if (rows.key, rows.cached_tokens) != (info.parent_key, info.start):
                return False
            staged.publish()
            self._index.add_segment(info, chain, nbytes=staged.nbytes)
            self._index.history.add_written(staged.nbytes, now=info.created_at)
        return True

    def _hold_limit(self, key: str) -> None:
        """Make up for rows that took more room than was made, or take them back."""
        try:
            self._make_room(0, protect=key)
            # What is noted of it later is to fit, too.
            self._keep_room(ROWS_NBYTES, protect=key)
        except StoreFullError:
            self._index.remove_leaf(key)
            pruning.remove_blobs(self._index, self._blobs, [key])
            self._index.database.shrink()
            raise

    def _keep_room(self, nbytes: int, *, protect: str | None) -> None:
        """Make room for what is noted, if that can be; it is written all the same."""
        with contextlib.suppress(StoreFullError):
            self._make_room(nbytes, protect=protect)

    def _make_room(self, nbytes: int, *, protect: str | None) -> None:
        self.num_evicted += pruning.make_room(
            self._index,
            self._blobs,
            nbytes=nbytes,
            limit=self.max_nbytes,
            protect=protect,
        )

    def _list_prefix(self, chain: Chain, segment_key: str) -> bool:
        with self._index.database.writing():
            segment_id = self._index.segment_id(segment_key)
            if segment_id is None:
                return False
            is_new = self._index.prefixes.add(
                chain.key_at(len(chain)), segment_id, len(chain), now=time.time()
            )
            if is_new:
                # Its blob does not tell that a prefix ends there.
                recovery.write_prefixes(self._index, self._blobs)
        if is_new:
            self._hold_limit(segment_key)
        return True

    def listed_at(self, key: str) -> float | None:
        """Return when a prefix was listed, or None if it is not. Raises StoreError."""
        return self._index.prefixes.created_at(key)

    def unlist(self, key: str) -> None:
        """Stop listing a prefix that is not pinned; what it holds stays.

        Raises StoreError.
        """
        with self._index.database.writing():
            if key not in {
                pinned for pinned, _ in self._index.prefixes.names().values()
            }:
                self._index.prefixes.remove(key)

    def configs(self, template: str) -> list[dict[str, Any]]:
        """Return with which arguments of a template of this hash prompts were rendered.

        Raises StoreError.
        """
        return self._index.history.configs(template)

    def set_origin(self, key: str, origin: Origin) -> None:
        """Note how a listed prefix was rendered. Raises StoreError."""
        with self._index.database.writing():
            self._index.prefixes.set_origin(key, origin)
            self._index.history.add_config(origin)
        self._keep_room(0, protect=None)

    @contextlib.contextmanager
    def building(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the lock for computing a prefix, so that only one process does.

        `on_wait` is called when another process holds it. The lock of a process
        that dies is released. Raises StoreError.
        """
        if self.is_read_only:
            raise StoreError(f"the store {self.path} is read-only")
        with self._locked(key, on_wait):
            yield

    @contextlib.contextmanager
    def _locked(
        self, name: str, on_wait: Callable[[], None] = lambda: None
    ) -> Iterator[None]:
        # Imported here because it takes 30 ms, which `ls` can do without.
        import filelock

        lock = filelock.FileLock(self._blobs.lock_path(name), mode=0o600)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            on_wait()
            lock.acquire()
        except OSError as error:
            raise StoreError(
                f"cannot write to the store {self.path} ({error.strerror})"
            ) from error
        try:
            yield
        finally:
            self._blobs.remove_lock(name)
            lock.release()

    # Pins

    def pin(
        self, key_or_name: str, name: str, *, manifest: str | None = None
    ) -> Prefix:
        """Name a prefix, so that eviction keeps it with its ancestors; return it.

        A prefix has one name. A name that another prefix has moves to this one.

        Args:
            key_or_name: The prefix.
            name: Its name from now on.
            manifest: The file that wants it so, if any.

        Raises:
            KeyNotFoundError: There is no such prefix.
            UsageError: The name cannot be one.
        """
        check_name(name)
        with self._index.database.writing():
            prefix, segment_id = self._resolve(key_or_name)
            for checkpoint in self._index.checkpoints([segment_id]):
                # Without it, rows that are left of an interrupted build are of no use.
                if checkpoint.position == prefix.num_tokens:
                    segment_id = self._index.segment_id(checkpoint.key) or segment_id
            self._index.prefixes.add(
                prefix.key, segment_id, prefix.num_tokens, now=time.time()
            )
            self._index.prefixes.set_name(prefix.key, name, manifest=manifest)
            recovery.write_prefixes(self._index, self._blobs)
        return self.resolve(prefix.key)

    def unpin(self, name: str) -> Prefix:
        """Take a name away, so that its prefix may be evicted; return the prefix.

        Raises:
            KeyNotFoundError: No prefix has this name.
        """
        with self._index.database.writing():
            if name not in self._index.prefixes.names():
                raise KeyNotFoundError(
                    f"no prefix is pinned as {name!r}, `promptcache ls` lists the names"
                )
            key, _ = self._index.prefixes.names()[name]
            self._index.prefixes.set_name(key, None)
            recovery.write_prefixes(self._index, self._blobs)
        return self.resolve(key)

    def pins(self) -> list[ListedPrefix]:
        """Return the prefixes that are pinned. Raises StoreError."""
        return [
            entry for entry in self._index.prefixes.listed() if entry.name is not None
        ]

    # Removing and verifying

    def remove(self, key_or_name: str) -> PruneReport:
        """Remove a prefix, even a pinned one, and the segments only it needs.

        Raises:
            KeyNotFoundError: There is no such prefix.
            StoreError: It cannot be removed.
        """
        with self._index.database.writing():
            prefix, segment_id = self._resolve(key_or_name)
            freed = self._tree().freed(prefix.key, segment_id)
            for segment in freed:
                pruning.note_eviction(self._index, segment.key, "removed")
            self._index.prefixes.remove(prefix.key)
            for segment in freed:
                self._index.remove_leaf(segment.key)
            if prefix.pinned:
                recovery.write_prefixes(self._index, self._blobs)
        removals = [Removal(prefix.key, "removed", sum(s.nbytes for s in freed))]
        pruning.remove_blobs(self._index, self._blobs, [s.key for s in freed])
        return pruning.report(self._index, self._blobs, removals, [])

    def plan_prune(self, policy: PrunePolicy, *, now: float | None = None) -> PrunePlan:
        """Return what a prune by a policy would remove; nothing is changed.

        Raises StoreError.
        """
        now = time.time() if now is None else now
        return pruning.plan_prune(self._index, self._blobs, policy, now=now)

    def execute(self, plan: PrunePlan) -> PruneReport:
        """Do what a plan says, except for what got used or pinned meanwhile.

        Raises:
            StoreError: A file cannot be removed.
        """
        return pruning.execute(self._index, self._blobs, plan)

    def verify(
        self,
        *,
        fix: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> VerifyReport:
        """Read every blob in full and compare it with its checksums and the index.

        Sound blobs that the index does not know are added to it if their
        ancestors are there.

        Args:
            fix: Set damaged blobs aside and forget the segments that need them.
            progress: Called with the number of blobs checked and their total.

        Raises:
            StoreError: The index cannot be read or written.
        """
        if not self._index.database.is_sound():
            self._index.database.close()
            with self._locked("index"):
                recovery.set_index_aside(self._blobs)
                self._index = self._new_index()
        report = recovery.verify(self._index, self._blobs, fix=fix, progress=progress)
        rebuilt, self.rebuilt = self.rebuilt, 0
        return replace(report, rebuilt=report.rebuilt + rebuilt)


def check_name(name: str) -> None:
    """Raise UsageError if this cannot name a prefix."""
    if not name.strip() or not name.isprintable():
        raise UsageError(f"{name!r} cannot be a name, use printable characters")


def _info(chain: Chain, **fields: Any) -> SegmentInfo:
    """Return what a new segment is, with the key that its chain and kind give it."""
    info = SegmentInfo(key="", created_at=time.time(), **fields)
    return replace(info, key=chain.tagged_key_at(info.end, info.tag))


def _cuts(start: int, end: int, cut_at: Collection[int]) -> Iterator[tuple[int, int]]:
    """Yield the segments of a range."""
    places = cut_at or range(0, end, MAX_SEGMENT_TOKENS)
    stops = [*sorted(place for place in places if start < place < end), end]
    if start < end:
        yield from pairwise([start, *stops])
