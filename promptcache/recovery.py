"""Recovery: find damage, and rebuild the index from the blobs."""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterable

from promptcache.blobs import BlobFolder
from promptcache.chain import Chain
from promptcache.errors import DamagedBlobError, StoreError
from promptcache.index import Index
from promptcache.reports import Damage, VerifyReport
from promptcache.types import BlobHeader, ListedPrefix

PREFIXES_FILE = "prefixes.json"


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
    )


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
    names = index.prefixes.names().keys()
    index.remove_subtree(key)
    lost = sorted(names - index.prefixes.names().keys())
    if lost:
        write_prefixes(index, blobs)
    try:
        # Where a link is in the way, it is no file of the store.
        with contextlib.suppress(DamagedBlobError):
            blobs.set_aside(blobs.path(key))
    except OSError as error:
        raise StoreError(
            f"blob {key} cannot be set aside ({error.strerror})"
        ) from error
    return lost


def set_index_aside(blobs: BlobFolder) -> None:
    """Move a damaged index into `quarantine/`. Raises StoreError."""
    try:
        for suffix in ("", "-wal", "-shm"):
            blobs.set_aside(blobs.root / f"index.db{suffix}")
    except OSError as error:
        raise StoreError(
            f"the damaged index cannot be set aside ({error.strerror})"
        ) from error


def rebuild(index: Index, blobs: BlobFolder, *, skip: Collection[str] = ()) -> int:
    """Add the blobs that the index does not know; return how many it added."""
    with index.database.writing():
        known = index.segment_keys() | set(skip)
        headers = _headers(blobs, [k for k, _ in blobs.stored() if k not in known])
        added = sum(_adopt(index, blobs, header) for header in headers)
        if added:
            _restore_prefixes(index, blobs)
    return added


def _headers(blobs: BlobFolder, keys: Iterable[str]) -> list[BlobHeader]:
    """Return the headers that can be read, in an order in which parents come first."""
    headers = []
    for key in keys:
        try:
            headers.append(blobs.read_header(key))
        except StoreError:
            continue
    return sorted(headers, key=lambda header: header.info.start)


def _adopt(index: Index, blobs: BlobFolder, header: BlobHeader) -> bool:
    """Add the row of a blob whose ancestors are there and whose key is right."""
    info = header.info
    before = b""
    if info.parent_key:
        parent_id = index.segment_id(info.parent_key)
        if parent_id is None:
            return False
        before = index.token_ids(parent_id, info.start)
    try:
        token_ids = blobs.read_token_ids(header)
    except OSError:
        # It went away meanwhile.
        return False
    chain = Chain(info.fingerprint.digest, before + token_ids)
    if len(chain) != info.end or chain.tagged_key_at(info.end, info.tag) != info.key:
        return False
    index.add_segment(info, chain, nbytes=blobs.nbytes(info.key))
    return True


def write_prefixes(index: Index, blobs: BlobFolder) -> None:
    """Keep the list of prefixes beside the index, which can be lost.

    Where a blob's own `is_prefix` tells the same, the file may lag behind.
    """
    listed = [entry._asdict() for entry in index.prefixes.listed()]
    try:
        blobs.write_file(PREFIXES_FILE, json.dumps(listed, indent=1).encode())
    except OSError as error:
        raise StoreError(f"prefixes cannot be listed ({error.strerror})") from error


def _restore_prefixes(index: Index, blobs: BlobFolder) -> None:
    """List and name prefixes again, also those that end inside a segment."""
    try:
        entries = json.loads(blobs.read_file(PREFIXES_FILE))
        wanted = [ListedPrefix(**entry) for entry in entries]
    except (OSError, ValueError, TypeError):
        return
    known = set(index.prefixes.listed())
    for entry in wanted:
        segment_id = index.segment_id(str(entry.segment_key))
        if entry in known or segment_id is None:
            continue
        if not _has_key(index, segment_id, entry):
            continue
        index.prefixes.add(entry.key, segment_id, entry.num_tokens, now=time.time())
        if entry.name is not None and entry.name not in index.prefixes.names():
            index.prefixes.set_name(entry.key, entry.name, manifest=entry.manifest)


def _has_key(index: Index, segment_id: int, entry: ListedPrefix) -> bool:
    """Return whether a prefix has the key that the file gives it."""
    rows = index.path_to(segment_id)
    num_tokens = entry.num_tokens
    if not isinstance(num_tokens, int) or not rows[-1].start <= num_tokens:
        return False
    digest = index.fingerprints.of_segment(segment_id).digest
    chain = Chain(digest, index.token_ids(segment_id, num_tokens))
    return len(chain) == num_tokens and chain.key_at(num_tokens) == entry.key
