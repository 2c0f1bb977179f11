"""Recovery: find damage, and rebuild the index from the blobs."""

import contextlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from promptcache.errors import DamagedBlobError, DamagedIndexError, StoreError
from promptcache.files import locked_folder
from promptcache.segments.blob_format import BlobHeader
from promptcache.segments.chain import Chain
from promptcache.segments.cut import token_nbytes
from promptcache.segments.types import SegmentInfo
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import ROOT_ID, Database, Index
from promptcache.store.index.database import BESIDE
from promptcache.store.index.rows import PrefixRow
from promptcache.store.maintenance.cover import Cover
from promptcache.store.maintenance.prefix_backup import (
    _has_key,
    _listed,
    _restore_prefixes,
    write_prefixes,
)
from promptcache.store.names import full_name
from promptcache.store.reports import Damage, VerifyReport


def verify(
    index: Index,
    blobs: BlobFolder,
    *,
    fix: bool,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare every blob with its checksums and with the index."""
    quarantined = tuple(blobs.quarantined())
    known = index.segment_keys()
    keys = sorted(key for key, _ in blobs.stored())
    damaged: dict[str, str] = {}
    for i, key in enumerate(keys):
        if reason := _damage(blobs, key):
            damaged[key] = reason
        if progress:
            progress(i + 1, len(keys))
    # Others save and remove meanwhile: damage is what is there still.
    damaged = {k: reason for k, reason in damaged.items() if blobs.exists(k)}
    known &= index.segment_keys()
    missing = sorted(key for key in known if not blobs.exists(key))
    if fix:
        for key in [*damaged, *missing]:
            give_up(index, blobs, key)
    rebuilt = 0 if index.database.read_only else rebuild(index, blobs, skip=damaged)
    return VerifyReport(
        checked=len(keys),
        damaged=tuple(Damage(key, reason) for key, reason in damaged.items()),
        quarantined=quarantined,
        orphans=len(set(keys) - known - set(damaged)),
        missing=tuple(missing),
        rebuilt=rebuilt,
        fixed=fix,
        foreign=tuple(blobs.files.foreign()),
    )


def is_sound(index: Index, blobs: BlobFolder) -> bool:
    """Return whether an index can be read, and says what the blobs say."""
    try:
        with index.database.reading():
            return (
                index.is_sound()
                and all(_agrees(index, blobs, key) for key in index.segment_keys())
                and all(_is_listed(index, entry) for entry in index.prefixes.listed())
            )
    except StoreError:
        return False


def _agrees(index: Index, blobs: BlobFolder, key: str) -> bool:
    """Return whether the row of a segment is what its blob would have it be."""
    segment_id = index.segment_id(key)
    if segment_id is None:
        return False
    try:
        info = blobs.read_header(key).info
    except StoreError:
        # Whatever it says, it is the blob that is wrong.
        return True
    chain = Chain(info.fingerprint.digest, index.token_ids(segment_id, info.end))
    is_whole = len(chain) == info.end
    return (
        is_whole
        and chain.tagged_key_at(info.end, info.tag) == key
        and index.agrees(segment_id, info, chain, nbytes=blobs.nbytes(key))
    )


def _is_listed(index: Index, entry: PrefixRow) -> bool:
    segment_id = index.segment_id(entry.segment_key)
    if segment_id is None or not _has_key(index, segment_id, entry):
        return False
    return entry.namespace == index.fingerprints.of_segment(segment_id).namespace


def _damage(blobs: BlobFolder, key: str) -> str | None:
    try:
        blobs.check(key)
    except DamagedBlobError as error:
        return str(error)
    except StoreError:
        # Of a newer format, or not readable just now: no damage.
        return None
    return None


def give_up(index: Index, blobs: BlobFolder, key: str) -> list[str]:
    """Forget a segment and all that hangs on it; return the names that went.

    Its blob moves to `quarantine/`.
    """
    names = _full_names(index)
    index.remove_subtree(key)
    lost = sorted(names - _full_names(index))
    if lost:
        write_prefixes(index, blobs)
    try:
        # Where a link is in the way, it is no file of the store.
        with contextlib.suppress(DamagedBlobError):
            blobs.files.quarantine_file(blobs.path(key))
    except OSError as error:
        raise StoreError(
            f"blob {key} cannot be set aside ({error.strerror})"
        ) from error
    return lost


def _full_names(index: Index) -> set[str]:
    return {str(full_name(pin.namespace, pin.name)) for pin in index.prefixes.pins()}


def create_index(database: Database, blobs: BlobFolder) -> None:
    """Create the file of an index where there is none. Raises StoreError.

    What another one has left beside it, which a process may still use, is not its own.
    """
    try:
        with locked_folder(blobs.root, blobs.files.patience):
            if database.is_missing():
                _set_aside(database, blobs, BESIDE)
                database.create()
    except OSError as error:
        raise StoreError(f"the index cannot be created ({error.strerror})") from error


def set_index_aside(database: Database, blobs: BlobFolder) -> None:
    """Move a damaged index into `quarantine/`. Raises StoreError.

    Others may have it open: what they write is written before, and SQLite does not
    remove the files of an index that has its name no more.
    """
    try:
        with locked_folder(blobs.root, blobs.files.patience), database.frozen():
            _set_aside(database, blobs, ["", *BESIDE])
    except OSError as error:
        raise StoreError(
            f"the damaged index cannot be set aside ({error.strerror})"
        ) from error


def _set_aside(database: Database, blobs: BlobFolder, suffixes: Iterable[str]) -> None:
    for suffix in suffixes:
        blobs.files.quarantine_file(Path(f"{database.path}{suffix}"))


def rebuild(index: Index, blobs: BlobFolder, *, skip: Collection[str] = ()) -> int:
    """Add the blobs that the index does not know; return how many it added."""
    with index.database.writing():
        known = index.segment_keys()
        unknown = [k for k, _ in blobs.stored() if k not in known and k not in skip]
        headers = _headers(blobs, unknown)
        if not headers:
            return 0
        listed = _listed(blobs)
        cover = Cover(
            [
                *((header.info.start, header.info.start_hash) for header in headers),
                *((entry.num_tokens, entry.key) for entry in listed),
            ]
        )
        for key in known:
            # A row that is damaged has nothing that can be relied on.
            with contextlib.suppress(DamagedIndexError):
                _note(index, cover, key)
        added = sum(_adopt(index, blobs, cover, header) for header in headers)
        if added:
            _restore_prefixes(index, cover, listed)
    return added


def _headers(blobs: BlobFolder, keys: Iterable[str]) -> list[BlobHeader]:
    """Return the headers that can be read, in an order in which parents come first.

    Of a segment and the head that it was about to be cut to, the longer one does.
    """
    headers = []
    for key in keys:
        try:
            headers.append(blobs.read_header(key))
        except StoreError:
            continue
    return sorted(headers, key=lambda header: (header.info.start, -header.info.end))


def _note(index: Index, cover: Cover, key: str) -> None:
    """Tell what a segment covers that the index knows already."""
    segment_id = index.segment_id(key)
    if segment_id is None:
        return
    *_, row = index.path_to(segment_id)
    digest = index.fingerprints.of_segment(segment_id).digest
    chain = Chain(digest, index.token_ids(segment_id, row.end))
    cover.add(chain, key, row.start, row.end, row)


def _adopt(index: Index, blobs: BlobFolder, cover: Cover, header: BlobHeader) -> bool:
    """Add the row of a blob whose ancestors are there and whose key is right."""
    info = header.info
    parent_key = cover.parent_of(info)
    parent_id = index.segment_id(parent_key) if parent_key else ROOT_ID
    if parent_id is None or (parent_id == ROOT_ID) != (info.start == 0):
        return False
    before = index.token_ids(parent_id, info.start) if parent_id else b""
    try:
        token_ids = blobs.read_token_ids(header)
    except OSError:
        # It went away meanwhile.
        return False
    chain = Chain(info.fingerprint.digest, before + token_ids)
    if len(chain) != info.end or chain.tagged_key_at(info.end, info.tag) != info.key:
        return False
    if chain.key_at(info.start) != info.start_hash:
        return False
    if _is_double(index, parent_id, info, chain):
        return False
    index.add_segment(
        info,
        chain,
        parent_key=parent_key,
        nbytes=blobs.nbytes(info.key),
        token_nbytes=token_nbytes(info, header.tensors),
        created_at=info.created_at,
    )
    cover.add(chain, info.key, info.start, info.end, info.resumption)
    return True


def _is_double(index: Index, parent_id: int, info: SegmentInfo, chain: Chain) -> bool:
    """Return whether the same tokens are in a segment that a split made of it, or was.

    A process that is killed while it splits one leaves both.
    """
    if info.is_checkpoint or not info.resumption.sliceable:
        return False
    wanted = {info.start: chain.token_id(info.start)}
    children = index.children(parent_id, chain.fingerprint, wanted)
    return any(child.sliceable for child in children)
