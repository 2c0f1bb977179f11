"""The listing: prefixes as people see them, found by key or name, pinned, removed."""

import time
from dataclasses import replace

from promptcache import pruning, recovery
from promptcache.blobs import BlobFolder
from promptcache.chain import unpack
from promptcache.errors import DamagedBlobError, KeyNotFoundError, UsageError
from promptcache.index import Index
from promptcache.reports import (
    Prefix,
    PrefixReport,
    PruneReport,
    Removal,
    SegmentReport,
)
from promptcache.types import SegmentRow


def prefixes(index: Index, namespace: str | None) -> list[Prefix]:
    """Return what was built or saved, the last used first."""
    with index.database.reading():
        tree = _tree(index)
        return [
            _with_nbytes(prefix, segment_id, tree)
            for prefix, segment_id in index.prefixes.all()
            if namespace in (None, _namespace_of(index, segment_id))
        ]


def _namespace_of(index: Index, segment_id: int) -> str:
    return index.fingerprints.of_segment(segment_id).parts.get("namespace", "")


def _with_nbytes(prefix: Prefix, segment_id: int, tree: pruning.Tree) -> Prefix:
    freed = tree.freed(prefix.key, segment_id)
    return replace(prefix, nbytes=sum(segment.nbytes for segment in freed))


def _tree(index: Index) -> pruning.Tree:
    return pruning.Tree(index.leaves(), index.prefixes.all())


def resolve(index: Index, key_or_name: str) -> Prefix:
    """Return the prefix with a name, a key or an unambiguous start of one.

    Raises KeyNotFoundError.
    """
    with index.database.reading():
        prefix, segment_id = _resolve(index, key_or_name)
        return _with_nbytes(prefix, segment_id, _tree(index))


def _resolve(index: Index, key_or_name: str) -> tuple[Prefix, int]:
    found = [
        (prefix, segment_id)
        for prefix, segment_id in index.prefixes.all()
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


def report(index: Index, blobs: BlobFolder, key_or_name: str) -> PrefixReport:
    """Return all that is known of a prefix.

    Raises KeyNotFoundError, and DamagedBlobError if one of its blobs cannot be read.
    """
    with index.database.reading():
        prefix, segment_id = _resolve(index, key_or_name)
        rows = index.path_to(segment_id)
        return PrefixReport(
            prefix=_with_nbytes(prefix, segment_id, _tree(index)),
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
) -> Prefix:
    """Name a prefix and return it; a name that another one has moves to it.

    Raises KeyNotFoundError and UsageError.
    """
    check_name(name)
    with index.database.writing():
        prefix, segment_id = _resolve(index, key_or_name)
        for checkpoint in index.checkpoints([segment_id]):
            # Without it, rows that are left of an interrupted build are of no use.
            if checkpoint.position == prefix.num_tokens:
                segment_id = index.segment_id(checkpoint.key) or segment_id
        index.prefixes.add(prefix.key, segment_id, prefix.num_tokens, now=time.time())
        index.prefixes.set_name(prefix.key, name, manifest=manifest)
        recovery.write_prefixes(index, blobs)
    return resolve(index, prefix.key)


def check_name(name: str) -> None:
    """Raise UsageError if this cannot name a prefix."""
    if not name.strip() or not name.isprintable():
        raise UsageError(f"{name!r} cannot be a name, use printable characters")


def unpin(index: Index, blobs: BlobFolder, name: str) -> Prefix:
    """Take a name away and return the prefix that had it. Raises KeyNotFoundError."""
    with index.database.writing():
        if name not in index.prefixes.names():
            raise KeyNotFoundError(
                f"no prefix is pinned as {name!r}, `promptcache ls` lists the names"
            )
        key, _ = index.prefixes.names()[name]
        index.prefixes.set_name(key, None)
        recovery.write_prefixes(index, blobs)
    return resolve(index, key)


def remove(index: Index, blobs: BlobFolder, key_or_name: str) -> PruneReport:
    """Remove a prefix, even a pinned one, and the segments only it needs.

    Raises KeyNotFoundError.
    """
    with index.database.writing():
        prefix, segment_id = _resolve(index, key_or_name)
        freed = _tree(index).freed(prefix.key, segment_id)
        for segment in freed:
            pruning.note_eviction(index, segment.key, "removed")
        index.prefixes.remove(prefix.key)
        for segment in freed:
            index.remove_leaf(segment.key)
        if prefix.pinned:
            recovery.write_prefixes(index, blobs)
    removals = [Removal(prefix.key, "removed", sum(s.nbytes for s in freed))]
    pruning.remove_blobs(index, blobs, [s.key for s in freed])
    return pruning.report(index, blobs, removals, [])
