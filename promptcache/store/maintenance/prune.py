"""Pruning: which segments and files go, planned first and executed after.

Blobs are removed under the write lock and after their rows, so that a crash leaves
at worst an orphan, and a blob that somebody publishes again at the same moment is
seen either here or there.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from promptcache.errors import (
    DamagedBlobError,
    StoreError,
    StoreFullError,
    warn,
)
from promptcache.locks import told
from promptcache.segments.chain import Chain
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.index.rows import SegmentNode
from promptcache.store.maintenance import split, verify
from promptcache.store.maintenance.eviction import plan_eviction
from promptcache.store.reports import (
    ForeignFile,
    Garbage,
    PrunePlan,
    PrunePolicy,
    PruneReport,
    Removal,
    describe_foreign,
)
from promptcache.units import format_age, format_size

# In one transaction, rows that share a page are written to the WAL once, and the WAL
# counts for the size limit. Other writers wait for it, 8 ms.
EVICTION_BATCH = 100
# What a WAL may take beyond the limit while it cannot be emptied: what SQLite lets it
# have at any time, 1,000 pages, or a part of a large store.
WAL_NBYTES, WAL_SHARE = 4 * 1024**2, 10
# For so small a part of the limit prefixes go that are in the way of foreign files,
# such as what a file manager leaves in every folder.
FOREIGN_SHARE = 20


def plan_prune(
    index: Index, blobs: BlobFolder, policy: PrunePolicy, *, now: float
) -> PrunePlan:
    """Return what a prune by a policy would remove; nothing is changed."""
    garbage = find_garbage(index, blobs)
    leaves = index.leaves()
    reasons = _unwanted(leaves, policy, now)
    total = blobs.files.total_nbytes()
    over, foreign = 0, tuple(blobs.files.foreign())
    if policy.max_nbytes is not None:
        # What the WAL holds makes the database larger once it is folded in.
        over = total - blobs.files.wal_nbytes() + index.database.growth_nbytes()
        over -= policy.max_nbytes
        over -= _nbytes(reasons) + _nbytes(garbage)
        needed = over - _beyond_reach(foreign, over, policy.max_nbytes)
        reason = f"over the size limit of {format_size(policy.max_nbytes)}"
        rest = _without(leaves, reasons) if needed > 0 else []
        evicted = plan_eviction(rest, nbytes=needed, now=now)
        reasons |= dict.fromkeys(evicted, reason)
        over -= _nbytes(evicted)
    return PrunePlan(
        tuple(_removals(reasons)),
        tuple(garbage),
        total,
        over_nbytes=max(over, 0),
        foreign=foreign,
    )


def _unwanted(
    leaves: Collection[SegmentNode], policy: PrunePolicy, now: float
) -> dict[SegmentNode, str]:
    """Return what goes by model and by age, with the reasons."""
    reasons: dict[SegmentNode, str] = {}
    if policy.model is not None:
        of_model = plan_eviction(leaves, may_go=lambda s: s.model == policy.model)
        reasons = dict.fromkeys(of_model, f"of model {policy.model}")
    if policy.older_than is not None:
        rest = _without(leaves, reasons)
        oldest = now - policy.older_than
        unused = plan_eviction(rest, may_go=lambda s: s.used_at < oldest)
        reasons |= {
            leaf: f"not used for {format_age(now - leaf.used_at)}" for leaf in unused
        }
    return reasons


def _without(
    leaves: Iterable[SegmentNode], gone: Collection[SegmentNode]
) -> list[SegmentNode]:
    return [leaf for leaf in leaves if leaf not in gone]


def _removals(reasons: Mapping[SegmentNode, str]) -> list[Removal]:
    """Return what becomes of each segment that stretches of go, the last ones first."""
    removals: dict[str, Removal] = {}
    for leaf, reason in reasons.items():
        after = removals.pop(leaf.key, None)
        nbytes = leaf.nbytes + (after.nbytes if after else 0)
        removals[leaf.key] = Removal(leaf.key, reason, nbytes, leaf.cut_at)
    return list(removals.values())


def removals_of(leaves: Iterable[SegmentNode], reason: str) -> list[Removal]:
    """Return what becomes of each segment that stretches of go for one reason."""
    return _removals(dict.fromkeys(leaves, reason))


def _nbytes(items: Iterable[Removal | Garbage | SegmentNode | ForeignFile]) -> int:
    return sum(item.nbytes for item in items)


def find_garbage(index: Index, blobs: BlobFolder) -> list[Garbage]:
    """Return the files that nothing refers to."""
    known = index.segment_keys()
    orphans = [
        Garbage(str(blobs.path(key).relative_to(blobs.root)), nbytes)
        for key, nbytes in blobs.stored()
        if key not in known
    ]
    return [*orphans, *blobs.files.garbage()]


def execute(index: Index, blobs: BlobFolder, plan: PrunePlan) -> PruneReport:
    """Do what a plan says, except for what got used, pinned or adopted meanwhile."""
    swept = [g for g in plan.garbage if _sweep(index, blobs, g)]
    removals: list[Removal] = []
    # What goes as a whole comes first: it makes room for the heads of the others.
    whole = [removal for removal in plan.removals if removal.cut_at is None]
    for start in range(0, len(whole), EVICTION_BATCH):
        evicted = _evict(index, whole[start : start + EVICTION_BATCH])
        remove_blobs(index, blobs, [removal.key for removal in evicted])
        removals += evicted
    for removal in plan.removals:
        if removal.cut_at is not None:
            removals += _cut(index, blobs, removal)
    return report(index, blobs, removals, swept)


def _cut(index: Index, blobs: BlobFolder, removal: Removal) -> list[Removal]:
    """Split a segment, remembering why, unless something came to hang on its end."""
    cut: list[Removal] = []
    try:
        with (
            split.staged_heads(index, blobs, [removal]) as heads,
            index.database.writing(),
        ):
            for head in heads:
                if head.can_replace(index):
                    note_eviction(index, removal.key, removal.reason, removal.cut_at)
                    head.replace(index)
                    cut.append(removal._replace(nbytes=head.freed_nbytes))
    except DamagedBlobError as error:
        _give_up(index, blobs, removal.key, error)
    remove_blobs(index, blobs, [removal.key for removal in cut])
    return cut


def _give_up(index: Index, blobs: BlobFolder, key: str, error: StoreError) -> None:
    """Forget a segment that cannot be split, since nobody can use it either."""
    names = verify.give_up(index, blobs, key)
    lost = f", and {', '.join(names)} is no longer pinned" if names else ""
    warn(f"cached segment {key[:12]} cannot be used and is removed: {error}{lost}")


def _evict(index: Index, removals: Sequence[Removal]) -> list[Removal]:
    """Remove segments' rows, remembering why, and return those that went."""
    evicted = []
    with index.database.writing():
        for removal in removals:
            note_eviction(index, removal.key, removal.reason)
            if index.remove_leaf(removal.key):
                evicted.append(removal)
    return evicted


def note_eviction(
    index: Index, key: str, reason: str, cut_at: int | None = None
) -> None:
    """Remember that a segment is being taken away, or what is after a position of it.

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
        start = last.start if cut_at is None else cut_at
        begins = (head for head in heads if start < head < last.end)
        keys |= {head: chain.key_at(head) for head in begins}
    index.history.note_eviction(key, keys, reason, now=time.time())


def _sweep(index: Index, blobs: BlobFolder, garbage: Garbage) -> bool:
    """Remove a file and return whether it is gone now."""
    path = Path(garbage.path)
    try:
        if path.parts[0] == "blobs":
            return bool(remove_blobs(index, blobs, [path.stem]))
        blobs.files.sweep(garbage)
        return not (blobs.root / path).exists()
    except OSError as error:
        raise StoreError(f"{path} cannot be removed ({error.strerror})") from error


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
        kept_nbytes=blobs.files.total_nbytes(),
    )


def make_room(
    index: Index,
    blobs: BlobFolder,
    *,
    nbytes: int,
    limit: int,
    protect: Mapping[str, int] | None,
) -> int:
    """Sweep garbage, then evict, until so many bytes more fit; return how many went.

    Args:
        nbytes: Room that is needed.
        limit: Size limit of all files in bytes.
        protect: Keys of segments that must stay, with their ancestors, and up to
            which position.

    Raises:
        StoreFullError: It cannot be had; nothing was evicted then.
    """
    if blobs.files.total_nbytes() + nbytes <= limit:
        return 0
    index.database.refresh()
    index.clock.settle()
    index.database.shrink()
    garbage = find_garbage(index, blobs)
    total = blobs.files.total_nbytes() - _nbytes(garbage)
    _check_foreign(blobs, total - limit, limit)
    over = total - _stuck_nbytes(index, blobs, limit) + nbytes - limit
    if over <= 0 and not garbage:
        return 0
    leaves = index.leaves(protect=protect)
    evicted = plan_eviction(leaves, nbytes=max(over, 0), now=index.clock.time())
    if _nbytes(evicted) < over:
        raise StoreFullError(_full_message(index.leaves(), nbytes, limit))
    removals = removals_of(evicted, "makes room")
    execute(index, blobs, PrunePlan(tuple(removals), tuple(garbage), 0))
    if evicted and index.leaves(protect=protect) == leaves:
        # It would be tried for ever.
        raise StoreFullError(_full_message(index.leaves(), nbytes, limit))
    # Once more, because a blob that is gone already gives less room than its row says.
    more = make_room(index, blobs, nbytes=nbytes, limit=limit, protect=protect)
    return len(removals) + more


def _stuck_nbytes(index: Index, blobs: BlobFolder, limit: int) -> int:
    """Return the size of a WAL that cannot be emptied now, because somebody reads it.

    It makes nothing else go: evicting would make it larger. Raises StoreFullError
    before it takes too much.
    """
    nbytes = blobs.files.wal_nbytes()
    if nbytes > max(limit // WAL_SHARE, WAL_NBYTES):
        raise StoreFullError(
            f"the index has {format_size(nbytes)} in its WAL, which is kept by "
            f"{told(index.database.reader())}, end it"
        )
    return nbytes


def _check_foreign(blobs: BlobFolder, over: int, limit: int) -> None:
    """Raise StoreFullError where foreign files take the store beyond its limit.

    Then nothing more is saved; what is there stays.
    """
    if over <= limit // FOREIGN_SHARE:
        # As in every full store: there is no need to look for them.
        return
    foreign = blobs.files.foreign()
    if _beyond_reach(foreign, over, limit):
        raise StoreFullError(
            f"the store is over its limit of {format_size(limit)}: "
            f"{describe_foreign(foreign)}"
        )


def _beyond_reach(foreign: Sequence[ForeignFile], over: int, limit: int) -> int:
    """Return how many of the bytes over a limit no prefix is to go for."""
    nbytes = min(_nbytes(foreign), over)
    return nbytes if nbytes > limit // FOREIGN_SHARE else 0


def _full_message(leaves: Collection[SegmentNode], nbytes: int, limit: int) -> str:
    room = f"{format_size(nbytes)} do not fit into the limit of {format_size(limit)}"
    pinned = pinned_nbytes(leaves)
    if pinned:
        return f"{room} because {format_size(pinned)} are pinned, unpin some of it"
    return f"{room}, raise it with --max-size or PROMPTCACHE_MAX_SIZE"


def pinned_nbytes(segments: Collection[SegmentNode]) -> int:
    """Return the size of what eviction keeps: what is pinned, with its ancestors."""
    return _nbytes(segments) - _nbytes(plan_eviction(segments))
