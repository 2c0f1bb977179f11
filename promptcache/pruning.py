"""Pruning: which segments and files go, planned first and executed after.

Blobs are removed under the write lock and after their rows, so that a crash leaves
at worst an orphan, and a blob that somebody publishes again at the same moment is
seen either here or there.
"""

import time
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from promptcache.blobs import BlobFolder
from promptcache.chain import Chain
from promptcache.errors import DamagedIndexError, StoreError, StoreFullError
from promptcache.eviction import plan_eviction
from promptcache.index import ROOT_ID, Index
from promptcache.locks import told
from promptcache.reports import (
    Garbage,
    Prefix,
    PrunePlan,
    PrunePolicy,
    PruneReport,
    Removal,
)
from promptcache.types import Leaf
from promptcache.units import format_age, format_size

# In one transaction, rows that share a page are written to the WAL once, and the WAL
# counts for the size limit. Other writers wait for it, 8 ms.
EVICTED_AT_ONCE = 100
# What a WAL may take beyond the limit while it cannot be emptied: what SQLite lets it
# have at any time, 1,000 pages, or a part of a large store.
WAL_NBYTES, WAL_SHARE = 4 * 1024**2, 10


def plan_prune(
    index: Index, blobs: BlobFolder, policy: PrunePolicy, *, now: float
) -> PrunePlan:
    """Return what a prune by a policy would remove; nothing is changed."""
    garbage = find_garbage(index, blobs)
    segments = index.leaves()
    removals = _unwanted(segments, policy, now)
    total = blobs.total_nbytes()
    if policy.max_nbytes is None:
        return PrunePlan(tuple(removals), tuple(garbage), total)
    fixed = blobs.wal_nbytes()
    over = total - fixed - policy.max_nbytes - _nbytes(removals) - _nbytes(garbage)
    gone = {removal.key for removal in removals}
    rest = [segment for segment in segments if segment.key not in gone]
    reason = f"over the size limit of {format_size(policy.max_nbytes)}"
    evicted = plan_eviction(rest, nbytes=over) if over > 0 else []
    return PrunePlan(
        (*removals, *_removals(evicted, reason)),
        tuple(garbage),
        total,
        over_nbytes=max(over - _nbytes(evicted), 0),
    )


def _unwanted(
    segments: Collection[Leaf], policy: PrunePolicy, now: float
) -> list[Removal]:
    """Return what goes by model and by age, each segment once."""
    removals: list[Removal] = []
    if policy.model is not None:
        of_model = plan_eviction(segments, may_go=lambda s: s.model == policy.model)
        removals += _removals(of_model, f"of model {policy.model}")
    if policy.older_than is not None:
        gone = {removal.key for removal in removals}
        rest = [segment for segment in segments if segment.key not in gone]
        oldest = now - policy.older_than
        unused = plan_eviction(rest, may_go=lambda s: s.used_at < oldest)
        removals += [
            Removal(s.key, f"not used for {format_age(now - s.used_at)}", s.nbytes)
            for s in unused
        ]
    return removals


def _removals(segments: Iterable[Leaf], reason: str) -> list[Removal]:
    return [Removal(segment.key, reason, segment.nbytes) for segment in segments]


def _nbytes(items: Iterable[Removal | Garbage | Leaf]) -> int:
    return sum(item.nbytes for item in items)


def find_garbage(index: Index, blobs: BlobFolder) -> list[Garbage]:
    """Return the files that nothing refers to."""
    known = index.segment_keys()
    orphans = [
        Garbage(str(blobs.path(key).relative_to(blobs.root)), nbytes)
        for key, nbytes in blobs.stored()
        if key not in known
    ]
    return [*orphans, *blobs.garbage()]


def execute(index: Index, blobs: BlobFolder, plan: PrunePlan) -> PruneReport:
    """Do what a plan says, except for what got used, pinned or adopted meanwhile."""
    swept = [g for g in plan.garbage if _sweep(index, blobs, g)]
    removals: list[Removal] = []
    for start in range(0, len(plan.removals), EVICTED_AT_ONCE):
        evicted = _evict(index, plan.removals[start : start + EVICTED_AT_ONCE])
        remove_blobs(index, blobs, [removal.key for removal in evicted])
        removals += evicted
    return report(index, blobs, removals, swept)


def _evict(index: Index, removals: Sequence[Removal]) -> list[Removal]:
    """Remove segments' rows, remembering why, and return those that went."""
    evicted = []
    with index.database.writing():
        for removal in removals:
            note_eviction(index, removal.key, removal.reason)
            if index.remove_leaf(removal.key):
                evicted.append(removal)
    return evicted


def note_eviction(index: Index, key: str, reason: str) -> None:
    """Remember that a segment is being taken away.

    Also for other prompts that begin like those which end there.
    """
    segment_id = index.segment_id(key)
    if segment_id is None:
        return
    *_, last = index.path_to(segment_id)
    keys = {last.end: key}
    if heads := index.prefixes.heads(key):
        digest = index.fingerprints.of_segment(segment_id).digest
        chain = Chain(digest, index.token_ids(segment_id, max(heads)))
        begins = (head for head in heads if last.start < head < last.end)
        keys |= {head: chain.key_at(head) for head in begins}
    index.history.note_eviction(key, keys, reason, now=time.time())


def _sweep(index: Index, blobs: BlobFolder, garbage: Garbage) -> bool:
    """Remove a file and return whether it is gone now."""
    path = Path(garbage.path)
    try:
        if path.parts[0] == "blobs":
            return bool(remove_blobs(index, blobs, [path.stem]))
        blobs.sweep(garbage)
    except OSError as error:
        raise StoreError(f"{path} cannot be removed ({error.strerror})") from error
    return not (blobs.root / path).exists()


def remove_blobs(index: Index, blobs: BlobFolder, keys: Iterable[str]) -> int:
    """Remove those of the blobs that no row refers to; return their size.

    Raises StoreError.
    """
    try:
        with index.database.writing():
            return sum(
                blobs.remove(key)
                for key in keys
                if index.segment_id(key) is None
                # Another index may refer to it.
                and not index.database.is_replaced()
            )
    except OSError as error:
        raise StoreError(f"a blob cannot be removed ({error.strerror})") from error


def report(
    index: Index,
    blobs: BlobFolder,
    removals: Sequence[Removal],
    garbage: Sequence[Garbage],
) -> PruneReport:
    """Return what was removed, after the index gave back its room too."""
    index.history.forget_configs()
    index.database.shrink()
    return PruneReport(
        removals=tuple(removals),
        garbage=tuple(garbage),
        freed_nbytes=_nbytes(removals) + _nbytes(garbage),
        kept_nbytes=blobs.total_nbytes(),
    )


def make_room(
    index: Index, blobs: BlobFolder, *, nbytes: int, limit: int, protect: str | None
) -> int:
    """Sweep garbage, then evict, until so many bytes more fit; return how many went.

    Args:
        nbytes: Room that is needed.
        limit: Size limit of all files in bytes.
        protect: Key of the segment that must stay, with its ancestors.

    Raises:
        StoreFullError: It cannot be had; nothing was evicted then.
    """
    if blobs.total_nbytes() + nbytes <= limit:
        return 0
    index.database.refresh()
    index.database.shrink()
    garbage = find_garbage(index, blobs)
    fixed = _stuck_nbytes(index, blobs, limit)
    over = blobs.total_nbytes() - fixed + nbytes - limit - _nbytes(garbage)
    if over <= 0 and not garbage:
        return 0
    protected = index.segment_id(protect) if protect else None
    segments = index.leaves()
    evicted = plan_eviction(
        segments,
        nbytes=max(over, 0),
        protected=[] if protected is None else [protected],
    )
    if _nbytes(evicted) < over:
        raise StoreFullError(_full_message(segments, nbytes, limit))
    removals = _removals(evicted, "makes room")
    execute(index, blobs, PrunePlan(tuple(removals), tuple(garbage), 0))
    # Once more, because a blob that is gone already gives less room than its row says.
    more = make_room(index, blobs, nbytes=nbytes, limit=limit, protect=protect)
    return len(evicted) + more


def _stuck_nbytes(index: Index, blobs: BlobFolder, limit: int) -> int:
    """Return the size of a WAL that cannot be emptied now, because somebody reads it.

    It makes nothing else go: evicting would make it larger. Raises StoreFullError
    before it takes too much.
    """
    nbytes = blobs.wal_nbytes()
    if nbytes > max(limit // WAL_SHARE, WAL_NBYTES):
        raise StoreFullError(
            f"the index has {format_size(nbytes)} in its WAL, which is kept by "
            f"{told(index.database.reader())}, end it"
        )
    return nbytes


def _full_message(segments: Collection[Leaf], nbytes: int, limit: int) -> str:
    room = f"{format_size(nbytes)} do not fit into the limit of {format_size(limit)}"
    pinned = pinned_nbytes(segments)
    if pinned:
        return f"{room} because {format_size(pinned)} are pinned, unpin some of it"
    return f"{room}, raise it with --max-size or PROMPTCACHE_MAX_SIZE"


def pinned_nbytes(segments: Collection[Leaf]) -> int:
    """Return the size of what eviction keeps: what is pinned, with its ancestors."""
    return _nbytes(segments) - _nbytes(plan_eviction(segments))


class Tree:
    """The segments and the prefixes that end in them, to tell who needs whom."""

    def __init__(
        self, segments: Iterable[Leaf], prefixes: Iterable[tuple[Prefix, int]]
    ) -> None:
        """Take all segments, and all prefixes with their segments' ids."""
        self._by_id = {segment.id: segment for segment in segments}
        self._needed_by: dict[int, set[str | int]] = {}
        # Checkpoints on the way, which go with the rows they hang on.
        self._loose: dict[int, list[Leaf]] = {}
        for prefix, segment_id in prefixes:
            self._needed_by.setdefault(segment_id, set()).add(prefix.key)
        for segment in self._by_id.values():
            if segment.is_checkpoint and segment.id not in self._needed_by:
                self._loose.setdefault(segment.parent_id, []).append(segment)
            else:
                self._needed_by.setdefault(segment.parent_id, set()).add(segment.id)

    def freed(self, key: str, segment_id: int) -> list[Leaf]:
        """Return the segments that only this prefix needs, the deepest first.

        Raises DamagedIndexError if an ancestor is not there.
        """
        freed: list[Leaf] = []
        needed_by: set[str | int] = {key}
        while segment_id != ROOT_ID:
            if self._needed_by.get(segment_id, set()) - needed_by:
                break
            segment = self._by_id.get(segment_id)
            if segment is None or segment in freed:
                raise DamagedIndexError(
                    "the index lacks segments, run `promptcache verify`"
                )
            freed += [*self._loose.get(segment_id, []), segment]
            needed_by = {segment_id}
            segment_id = segment.parent_id
        return freed
