"""Pruning: which segments and files go, planned first and executed after.

Blobs are removed under the write lock and after their rows, so that a crash leaves
at worst an orphan, and a blob that is published again at the same moment is found
either here or there.
"""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from promptcache.errors import DamagedBlobError, StoreError, warn
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
)
from promptcache.units import format_age, format_size

# In one transaction, rows that share a page are written to the WAL once, and the WAL
# counts for the size limit. Other writers wait for it, 8 ms.
EVICTION_BATCH = 100
# Up to this part of the limit, prefixes go to make room for foreign files, such as
# what a file manager leaves in every folder.
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
        over -= policy.max_nbytes + sum_nbytes(reasons) + sum_nbytes(garbage)
        excess = over - foreign_excess(foreign, over, policy.max_nbytes)
        rest = _without(leaves, reasons) if excess > 0 else []
        evicted = plan_eviction(rest, nbytes=excess, now=now)
        reason = f"over the size limit of {format_size(policy.max_nbytes)}"
        reasons |= dict.fromkeys(evicted, reason)
        over -= sum_nbytes(evicted)
    return PrunePlan(
        tuple(removals_of(reasons)),
        tuple(garbage),
        total,
        over_nbytes=max(over, 0),
        foreign=foreign,
    )


def find_garbage(index: Index, blobs: BlobFolder) -> list[Garbage]:
    """Return the files that nothing refers to."""
    indexed = index.segment_keys()
    orphans = [
        Garbage(str(blobs.path(key).relative_to(blobs.root)), nbytes)
        for key, nbytes in blobs.stored()
        if key not in indexed
    ]
    return [*orphans, *blobs.files.garbage()]


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


def foreign_excess(foreign: Sequence[ForeignFile], over: int, limit: int) -> int:
    """Return how many bytes over a limit are foreign, for which no prefix goes."""
    nbytes = min(sum_nbytes(foreign), over)
    return nbytes if nbytes > limit // FOREIGN_SHARE else 0


def sum_nbytes(items: Iterable[Removal | Garbage | SegmentNode | ForeignFile]) -> int:
    """Return the size of some items."""
    return sum(item.nbytes for item in items)


def removals_of(reasons: Mapping[SegmentNode, str]) -> list[Removal]:
    """Return one removal a segment for stretches and their reasons, in order."""
    removals: dict[str, Removal] = {}
    for leaf, reason in reasons.items():
        after = removals.pop(leaf.key, None)
        nbytes = leaf.nbytes + (after.nbytes if after else 0)
        removals[leaf.key] = Removal(leaf.key, reason, nbytes, leaf.cut_at)
    # Whole segments go first: that makes room for the heads of the others.
    return sorted(removals.values(), key=lambda removal: removal.cut_at is not None)


def execute(index: Index, blobs: BlobFolder, plan: PrunePlan) -> PruneReport:
    """Do what a plan says, except for what got used, pinned or adopted meanwhile."""
    swept = [g for g in plan.garbage if _sweep(index, blobs, g)]
    removals: list[Removal] = []
    whole = [removal for removal in plan.removals if removal.cut_at is None]
    for start in range(0, len(whole), EVICTION_BATCH):
        evicted = _evict(index, whole[start : start + EVICTION_BATCH])
        remove_blobs(index, blobs, [removal.key for removal in evicted])
        removals += evicted
    for removal in plan.removals:
        if removal.cut_at is not None:
            removals += _cut(index, blobs, removal)
    return report(index, blobs, removals, swept)


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


def _evict(index: Index, removals: Sequence[Removal]) -> list[Removal]:
    """Remove segments' rows and return those that went."""
    evicted = []
    with index.database.writing():
        for removal in removals:
            note_eviction(index, removal)
            if index.remove_leaf(removal.key):
                evicted.append(removal)
    return evicted


def _cut(index: Index, blobs: BlobFolder, removal: Removal) -> list[Removal]:
    """Split a segment, unless a child was added to its end meanwhile."""
    cut: list[Removal] = []
    try:
        with (
            split.staged_heads(index, blobs, [removal]) as heads,
            index.database.writing(),
        ):
            for head in heads:
                if head.can_replace(index):
                    note_eviction(index, removal)
                    head.replace(index)
                    cut.append(removal._replace(nbytes=head.freed_nbytes))
    except DamagedBlobError as error:
        # Nobody can use it either.
        names = verify.quarantine_segment(index, blobs, removal.key)
        lost = f", and {', '.join(names)} is no longer pinned" if names else ""
        warn(
            f"cached segment {removal.key[:12]} cannot be used and is removed: "
            f"{error}{lost}"
        )
    remove_blobs(index, blobs, [removal.key for removal in cut])
    return cut


def note_eviction(index: Index, removal: Removal) -> None:
    """Record why a segment goes, or what is after a position of it.

    This counts also for other prompts with the same beginning as those that end there.
    """
    key, cut_at = removal.key, removal.cut_at
    segment_id = index.segment_id(key)
    if segment_id is None:
        return
    *_, last = index.path_to(segment_id)
    keys = {last.end: key}
    if heads := index.prefixes.heads(key):
        digest = index.fingerprints.of_segment(segment_id).digest
        chain = Chain(digest, index.token_ids(segment_id, max(heads)))
        start = last.start if cut_at is None else cut_at
        positions = (head for head in heads if start < head < last.end)
        keys |= {position: chain.key_at(position) for position in positions}
    index.history.note_eviction(key, keys, removal.reason, now=time.time())


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
    """Shrink the index too, and return what was removed."""
    index.database.shrink()
    return PruneReport(
        removals=tuple(removals),
        garbage=tuple(garbage),
        freed_nbytes=sum_nbytes(removals) + sum_nbytes(garbage),
        kept_nbytes=blobs.files.total_nbytes(),
    )
