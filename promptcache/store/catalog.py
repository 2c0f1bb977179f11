"""The listing: prefixes as people see them, found by key or name, pinned, removed."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from promptcache.errors import DamagedBlobError, KeyNotFoundError, QuotaError
from promptcache.segments.chain import unpack
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.index.rows import PrefixRow, SegmentRow
from promptcache.store.maintenance import eviction, prefix_backup, prune, split
from promptcache.store.reports import (
    PinQuota,
    Prefix,
    PrefixReport,
    PruneReport,
    Removal,
    SegmentReport,
    check_name,
    full_name,
)
from promptcache.units import format_size


def prefixes(index: Index, namespace: str | None) -> list[Prefix]:
    """Return what was built or saved, the last used first."""
    with index.database.reading():
        tree = _tree(index, namespace)
        return [
            _with_nbytes(prefix, segment_id, tree)
            for prefix, segment_id in index.prefixes.all(namespace)
        ]


def _with_nbytes(prefix: Prefix, segment_id: int, tree: eviction.PrefixTree) -> Prefix:
    freed = tree.exclusive_segments(prefix, segment_id)
    return replace(prefix, nbytes=sum(leaf.nbytes for leaf in freed))


def _tree(index: Index, namespace: str | None) -> eviction.PrefixTree:
    """Return the segments of a namespace; others are in trees of their own."""
    return eviction.PrefixTree(index.leaves(namespace), index.prefixes.all(namespace))


def resolve(index: Index, key_or_name: str, namespace: str | None) -> Prefix:
    """Return the prefix with a name, a key or an unambiguous start of one.

    Raises KeyNotFoundError.
    """
    with index.database.reading():
        prefix, segment_id = _resolve(index, key_or_name, namespace)
        return _with_nbytes(prefix, segment_id, _tree(index, prefix.namespace))


def _name_of(entry: Prefix | PrefixRow, namespace: str | None) -> str | None:
    """Return what a prefix is called in a namespace, or in the whole store."""
    if namespace is None:
        return full_name(entry.namespace, entry.name)
    return entry.name


def _resolve(
    index: Index, key_or_name: str, namespace: str | None
) -> tuple[Prefix, int]:
    matches = [
        (prefix, segment_id)
        for prefix, segment_id in index.prefixes.all(namespace)
        if (key_or_name and prefix.key.startswith(key_or_name))
        or key_or_name == _name_of(prefix, namespace)
    ]
    exact = [f for f in matches if key_or_name in (_name_of(f[0], namespace), f[0].key)]
    # A name with a `/` may be one in two ways: the default namespace comes first.
    exact.sort(key=lambda f: f[0].namespace)
    if len(matches) > 1 and not exact:
        raise KeyNotFoundError(
            f"key {key_or_name!r} is ambiguous, {len(matches)} keys begin with it: "
            f"{', '.join(prefix.key[:12] for prefix, _ in matches[:4])}"
        )
    if not matches:
        raise KeyNotFoundError(
            f"no prefix has the key or name {key_or_name!r}, "
            "`promptcache ls` lists them"
        )
    return (exact or matches)[0]


def report(
    index: Index, blobs: BlobFolder, key_or_name: str, namespace: str | None
) -> PrefixReport:
    """Return all that is known of a prefix.

    Raises KeyNotFoundError, and DamagedBlobError if one of its blobs cannot be read.
    """
    with index.database.reading():
        prefix, segment_id = _resolve(index, key_or_name, namespace)
        rows = index.path_to(segment_id)
        tree = _tree(index, prefix.namespace)
        return PrefixReport(
            prefix=_with_nbytes(prefix, segment_id, tree),
            fingerprint=index.fingerprints.of_segment(segment_id),
            segments=tuple(_segment_report(blobs, row) for row in rows),
            token_ids=unpack(index.token_ids(segment_id, prefix.num_tokens)),
        )


def _segment_report(blobs: BlobFolder, row: SegmentRow) -> SegmentReport:
    try:
        layout = blobs.read_header(row.key).layout
    except DamagedBlobError as error:
        raise DamagedBlobError(
            f"segment {row.key[:12]}: {error}, run `promptcache verify --fix`"
        ) from error
    return SegmentReport(row.key, row.start, row.end, row.nbytes, layout)


def pin(
    index: Index,
    blobs: BlobFolder,
    key_or_name: str,
    name: str,
    *,
    manifest: str | None,
    namespace: str | None,
    quota: PinQuota | None,
) -> Prefix:
    """Name a prefix and return it; a name that another one has moves to it.

    Raises KeyNotFoundError, QuotaError and UsageError.
    """
    check_name(name)
    with index.database.writing():
        prefix, segment_id = _resolve(index, key_or_name, namespace)
        for checkpoint in index.checkpoints([segment_id]):
            # Without it, rows that are left of an interrupted build are of no use.
            if checkpoint.position == prefix.num_tokens:
                segment_id = index.segment_id(checkpoint.key) or segment_id
        now = index.clock.now()
        index.prefixes.add(prefix.key, segment_id, prefix.num_tokens, now=now)
        index.prefixes.set_name(prefix.key, name, manifest=manifest)
        if quota is not None:
            # One that is exceeded takes the name back, with the transaction.
            _check_quota(index, prefix.namespace, quota)
        prefix_backup.write_prefixes(index, blobs)
    return resolve(index, prefix.key, prefix.namespace)


def _check_quota(index: Index, namespace: str, quota: PinQuota) -> None:
    """Raise QuotaError if more is pinned in a namespace than may be."""
    if len(index.prefixes.pins(namespace)) > quota.num_pins:
        raise QuotaError(
            f"no more than {quota.num_pins} prefixes may be pinned, unpin one first"
        )
    nbytes = eviction.pinned_nbytes(index.leaves(namespace))
    if nbytes > quota.nbytes:
        raise QuotaError(
            f"{format_size(nbytes)} would be pinned and {format_size(quota.nbytes)} "
            "may be, unpin something first"
        )


def unpin(
    index: Index, blobs: BlobFolder, name: str, *, namespace: str | None
) -> Prefix:
    """Take a name away and return the prefix that had it. Raises KeyNotFoundError."""
    with index.database.writing():
        pins = [
            pin
            for pin in index.prefixes.pins(namespace)
            if name == _name_of(pin, namespace)
        ]
        if not pins:
            raise KeyNotFoundError(
                f"no prefix is pinned as {name!r}, `promptcache ls` lists the names"
            )
        pin = min(pins, key=lambda pin: pin.namespace)
        index.prefixes.set_name(pin.key, None)
        prefix_backup.write_prefixes(index, blobs)
    return resolve(index, pin.key, pin.namespace)


def remove(index: Index, blobs: BlobFolder, key_or_name: str) -> PruneReport:
    """Remove a prefix, even a pinned one, and what only it needs of the segments.

    Raises KeyNotFoundError.
    """
    removals: list[Removal] | None = None
    while removals is None:
        prefix, plan = _plan_removal(index, key_or_name)
        removals = _remove(index, blobs, prefix, plan)
    prune.remove_blobs(index, blobs, [removal.key for removal in removals])
    nbytes = sum(removal.nbytes for removal in removals)
    removal = Removal(prefix.key, "removed", nbytes)
    return prune.report(index, blobs, [removal], [])


def _plan_removal(index: Index, key_or_name: str) -> tuple[Prefix, list[Removal]]:
    with index.database.reading():
        prefix, segment_id = _resolve(index, key_or_name, None)
        freed = _tree(index, prefix.namespace).exclusive_segments(prefix, segment_id)
        return prefix, prune.removals_of(dict.fromkeys(freed, "removed"))


def _remove(
    index: Index, blobs: BlobFolder, prefix: Prefix, plan: list[Removal]
) -> list[Removal] | None:
    """Do what is planned; return what went, or None if the plan is of no use now."""
    with (
        _told(plan),
        split.staged_heads(index, blobs, plan) as heads,
        index.database.writing(),
    ):
        if _plan_removal(index, prefix.key)[1] != plan:
            return None
        for removal in plan:
            prune.note_eviction(index, removal)
        index.prefixes.remove(prefix.key)
        for removal in plan:
            if removal.cut_at is None:
                index.remove_leaf(removal.key)
        replacing = [head for head in heads if head.can_replace(index)]
        for head in replacing:
            head.replace(index)
        if prefix.pinned:
            prefix_backup.write_prefixes(index, blobs)
    whole = [removal for removal in plan if removal.cut_at is None]
    cut = [Removal(h.key, "removed", h.freed_nbytes, h.info.end) for h in replacing]
    return [*whole, *cut]


@contextlib.contextmanager
def _told(plan: list[Removal]) -> Iterator[None]:
    """Say what to do where a segment that is to be split is damaged."""
    try:
        yield
    except DamagedBlobError as error:
        keys = ", ".join(r.key[:12] for r in plan if r.cut_at is not None)
        raise DamagedBlobError(
            f"segment {keys}: {error}, run `promptcache verify --fix`"
        ) from error
