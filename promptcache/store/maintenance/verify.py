"""Verification: find damage, and quarantine what is damaged."""

import contextlib
from collections.abc import Callable, Sequence

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.segments.chain import Chain
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.index.rows import PrefixRow
from promptcache.store.maintenance.prefix_backup import write_prefixes
from promptcache.store.maintenance.rebuild import has_key, rebuild
from promptcache.store.reports import Damage, VerifyReport, full_name

Progress = Callable[[int, int], None]


def verify(
    index: Index, blobs: BlobFolder, *, fix: bool, progress: Progress | None = None
) -> VerifyReport:
    """Compare every blob with its checksums and with the index."""
    quarantined = tuple(blobs.quarantined())
    indexed = index.segment_keys()
    keys = sorted(key for key, _ in blobs.stored())
    damaged = _damaged(blobs, keys, progress)
    # Others save and remove meanwhile: only what is still there can be missing.
    indexed &= index.segment_keys()
    missing = sorted(key for key in indexed if not blobs.exists(key))
    if fix:
        for key in [*damaged, *missing]:
            quarantine_segment(index, blobs, key)
    rebuilt = 0 if index.database.read_only else rebuild(index, blobs, skip=damaged)
    return VerifyReport(
        checked=len(keys),
        damaged=tuple(Damage(key, reason) for key, reason in damaged.items()),
        quarantined=quarantined,
        orphans=len(set(keys) - indexed - set(damaged)),
        missing=tuple(missing),
        rebuilt=rebuilt,
        fixed=fix,
        foreign=tuple(blobs.files.foreign()),
    )


def _damaged(
    blobs: BlobFolder, keys: Sequence[str], progress: Progress | None
) -> dict[str, str]:
    """Return the reasons by key of damaged blobs that are still there in the end."""
    reasons: dict[str, str] = {}
    for num_checked, key in enumerate(keys, start=1):
        try:
            blobs.check(key)
        except DamagedBlobError as error:
            reasons[key] = str(error)
        except StoreError:
            # It has a newer format, or cannot be read just now: not damage.
            pass
        if progress:
            progress(num_checked, len(keys))
    return {key: reason for key, reason in reasons.items() if blobs.exists(key)}


def is_sound(index: Index, blobs: BlobFolder) -> bool:
    """Return whether an index can be read, and agrees with the blobs."""
    try:
        with index.database.reading():
            return (
                index.is_sound()
                and all(_agrees(index, blobs, key) for key in index.segment_keys())
                and all(_is_right(index, row) for row in index.prefixes.listed())
            )
    except StoreError:
        return False


def _agrees(index: Index, blobs: BlobFolder, key: str) -> bool:
    """Return whether the row of a segment is the one that its blob would get."""
    segment_id = index.segment_id(key)
    if segment_id is None:
        return False
    try:
        info = blobs.read_header(key).info
    except StoreError:
        # Whatever the row says, it is the blob that is wrong.
        return True
    chain = Chain(info.fingerprint.digest, index.token_ids(segment_id, info.end))
    return (
        len(chain) == info.end
        and chain.tagged_key_at(info.end, info.tag) == key
        and index.agrees(segment_id, info, chain, nbytes=blobs.nbytes(key))
    )


def _is_right(index: Index, row: PrefixRow) -> bool:
    segment_id = index.segment_id(row.segment_key)
    if segment_id is None or not has_key(index, segment_id, row):
        return False
    return row.namespace == index.fingerprints.of_segment(segment_id).namespace


def quarantine_segment(index: Index, blobs: BlobFolder, key: str) -> list[str]:
    """Remove a segment's rows with its descendants'; return the names that went.

    Its blob moves to `quarantine/`.
    """
    names = _full_names(index)
    index.remove_subtree(key)
    lost = sorted(names - _full_names(index))
    if lost:
        write_prefixes(index, blobs)
    try:
        # Behind a link, it is not a file of the store.
        with contextlib.suppress(DamagedBlobError):
            blobs.files.quarantine_file(blobs.path(key))
    except OSError as error:
        raise StoreError(
            f"blob {key} cannot be set aside ({error.strerror})"
        ) from error
    return lost


def _full_names(index: Index) -> set[str]:
    return {str(full_name(pin.namespace, pin.name)) for pin in index.prefixes.pins()}
