"""The backup of the prefixes: a file from which a lost index gets them back."""

import json
from collections.abc import Collection

from promptcache.errors import StoreError
from promptcache.segments.blob_format import MAX_TOKENS
from promptcache.segments.chain import Chain
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.index.rows import PrefixRow
from promptcache.store.maintenance.cover import Cover

PREFIXES_FILE = "prefixes.json"


def write_prefixes(index: Index, blobs: BlobFolder) -> None:
    """Keep the list of prefixes beside the index, which can be lost.

    Where a blob's own `is_prefix` tells the same, the file may lag behind.
    """
    listed = [entry._asdict() for entry in index.prefixes.listed()]
    try:
        blobs.files.write_file(PREFIXES_FILE, json.dumps(listed, indent=1).encode())
    except OSError as error:
        raise StoreError(f"prefixes cannot be listed ({error.strerror})") from error


def _listed(blobs: BlobFolder) -> list[PrefixRow]:
    """Return the prefixes that the list beside the index has."""
    try:
        entries = json.loads(blobs.files.read_file(PREFIXES_FILE))
    except (OSError, RecursionError, ValueError):
        return []
    if not isinstance(entries, list):
        return []
    return [entry for entry in map(_entry, entries) if entry is not None]


def _entry(fields: object) -> PrefixRow | None:
    """Return what the list says of a prefix, or None if it was never written so."""
    try:
        entry = PrefixRow(**fields)  # type: ignore[arg-type]
        named = [text for text in (entry.name, entry.manifest) if text is not None]
        for text in (entry.key, entry.segment_key, entry.namespace, *named):
            # What is no text, or none that a database takes.
            text.encode()
    except (AttributeError, TypeError, ValueError):
        return None
    is_position = type(entry.num_tokens) is int and 0 < entry.num_tokens < MAX_TOKENS
    return entry if is_position and (entry.name or "").isprintable() else None


def _restore_prefixes(
    index: Index, cover: Cover, listed: Collection[PrefixRow]
) -> None:
    """List and name prefixes again, also those that end inside a segment."""
    known = set(index.prefixes.listed())
    for entry in listed:
        # A split may have been between the list and the rows.
        keys = (str(entry.segment_key), *cover.ends(entry.num_tokens, entry.key))
        ids = (index.segment_id(key) for key in keys)
        segment_id = next((i for i in ids if i and _has_key(index, i, entry)), None)
        if entry in known or segment_id is None:
            continue
        now = index.clock.now()
        index.prefixes.add(entry.key, segment_id, entry.num_tokens, now=now)
        namespace = index.fingerprints.of_segment(segment_id).namespace
        names = {pin.name for pin in index.prefixes.pins(namespace)}
        if entry.name is not None and entry.name not in names:
            index.prefixes.set_name(entry.key, entry.name, manifest=entry.manifest)


def _has_key(index: Index, segment_id: int, entry: PrefixRow) -> bool:
    """Return whether a prefix has the key that the file gives it."""
    rows = index.path_to(segment_id)
    num_tokens = entry.num_tokens
    if not rows[-1].start <= num_tokens:
        return False
    digest = index.fingerprints.of_segment(segment_id).digest
    chain = Chain(digest, index.token_ids(segment_id, num_tokens))
    return len(chain) == num_tokens and chain.key_at(num_tokens) == entry.key
