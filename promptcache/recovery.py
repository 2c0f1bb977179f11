"""Recovery: find damage, and rebuild the index from the blobs."""

import json
import time
from collections.abc import Callable, Collection, Iterable

from promptcache.blobs import BlobFolder
from promptcache.chain import Chain, pack, unpack
from promptcache.errors import DamagedBlobError, StoreError, StoreFormatError
from promptcache.index import Index
from promptcache.types import BlobHeader, Damage, SegmentRow, VerifyReport

PINS_FILE = "pins.json"


def joined(rows: Iterable[SegmentRow], num_tokens: int) -> bytes:
    """Return the first packed token ids of a path of segments."""
    token_ids: tuple[int, ...] = ()
    for row in rows:
        token_ids = (*token_ids[: row.start], *unpack(row.token_ids))
    return pack(token_ids[:num_tokens])


def verify(
    index: Index,
    blobs: BlobFolder,
    *,
    fix: bool,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Compare every blob with its checksums and with the index."""
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
    rebuilt = 0 if index.read_only else rebuild(index, blobs, skip=damaged)
    return VerifyReport(
        checked=len(keys),
        damaged=tuple(Damage(key, reason) for key, reason in damaged.items()),
        quarantined=tuple(blobs.quarantined()),
        orphans=len(set(keys) - known - set(damaged)),
        missing=tuple(missing),
        rebuilt=rebuilt,
        fixed=fix,
    )


def _damage(blobs: BlobFolder, key: str) -> str | None:
    try:
        blobs.check(key)
    except StoreFormatError:
        return None
    except DamagedBlobError as error:
        return str(error)
    return None


def give_up(index: Index, blobs: BlobFolder, key: str) -> None:
    """Forget a segment and all that hangs on it; its blob moves to `quarantine/`."""
    num_names = len(index.names())
    index.remove_subtree(key)
    if len(index.names()) < num_names:
        write_pins(index, blobs)
    try:
        blobs.set_aside(blobs.path(key))
    except OSError as error:
        raise StoreError(
            f"blob {key} cannot be set aside ({error.strerror})"
        ) from error


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
    with index.writing():
        known = index.segment_keys() | set(skip)
        headers = _headers(blobs, [k for k, _ in blobs.stored() if k not in known])
        added = sum(_adopt(index, blobs, header) for header in headers)
        if added:
            _restore_pins(index, blobs)
    return added


def _headers(blobs: BlobFolder, keys: Iterable[str]) -> list[BlobHeader]:
    """Return the headers that can be read, in an order in which parents come first."""
    headers = []
    for key in keys:
        try:
            headers.append(blobs.read_header(key))
        except (DamagedBlobError, StoreFormatError):
            continue
    return sorted(headers, key=lambda header: header.info.start)


def _adopt(index: Index, blobs: BlobFolder, header: BlobHeader) -> bool:
    """Add the row of a blob whose ancestors are there and whose key is right."""
    info = header.info
    ancestors: list[SegmentRow] = []
    if info.parent_key:
        parent_id = index.segment_id(info.parent_key)
        if parent_id is None:
            return False
        ancestors = index.path_to(parent_id)
    try:
        token_ids = blobs.read_token_ids(header)
    except OSError:
        # It went away meanwhile.
        return False
    chain = Chain(info.fingerprint.digest, joined(ancestors, info.start) + token_ids)
    if len(chain) != info.end or chain.key_at(info.end) != info.key:
        return False
    index.add_segment(info, chain, nbytes=blobs.nbytes(info.key))
    return True


def write_pins(index: Index, blobs: BlobFolder) -> None:
    """Keep the pins beside the index, which can be lost."""
    pins = {
        name: {"key": key, "num_tokens": num_tokens}
        for name, (key, num_tokens) in sorted(index.names().items())
    }
    try:
        blobs.write_file(PINS_FILE, json.dumps(pins, indent=1).encode())
    except OSError as error:
        raise StoreError(f"pins cannot be written ({error.strerror})") from error


def _restore_pins(index: Index, blobs: BlobFolder) -> None:
    """Name prefixes again, also those that end inside a segment."""
    try:
        pins = json.loads((blobs.root / PINS_FILE).read_bytes())
        wanted = {str(n): (p["key"], int(p["num_tokens"])) for n, p in pins.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    for name in wanted.keys() - index.names().keys():
        key, num_tokens = wanted[name]
        for segment_id in index.segments_over(num_tokens):
            chain = Chain(
                index.fingerprint_of(segment_id).digest,
                joined(index.path_to(segment_id), num_tokens),
            )
            if chain.key_at(num_tokens) == key:
                index.add_prefix(key, segment_id, num_tokens, now=time.time())
                index.set_name(key, name)
                break
