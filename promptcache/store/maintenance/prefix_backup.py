"""The backup of the prefixes: a file from which a rebuilt index gets them back."""

import json

from promptcache.errors import StoreError
from promptcache.segments.blob_format import MAX_TOKENS
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.index.rows import PrefixRow

PREFIXES_FILE = "prefixes.json"


def write_prefixes(index: Index, blobs: BlobFolder) -> None:
    """Write all prefixes to the file; those of a blob's `is_prefix` may come later."""
    rows = [row._asdict() for row in index.prefixes.listed()]
    try:
        blobs.files.write_file(PREFIXES_FILE, json.dumps(rows, indent=1).encode())
    except OSError as error:
        raise StoreError(f"prefixes cannot be listed ({error.strerror})") from error


def read_prefixes(blobs: BlobFolder) -> list[PrefixRow]:
    """Return the prefixes in the file, without those that were never written so."""
    try:
        entries = json.loads(blobs.files.read_file(PREFIXES_FILE))
    except (OSError, RecursionError, ValueError):
        return []
    rows = map(_row, entries) if isinstance(entries, list) else ()
    return [row for row in rows if row is not None]


def _row(fields: object) -> PrefixRow | None:
    try:
        row = PrefixRow(**fields)  # type: ignore[arg-type]
        names = [text for text in (row.name, row.manifest) if text is not None]
        for text in (row.key, row.segment_key, row.namespace, *names):
            # Fails if it is not a text, or not one that a database accepts.
            text.encode()
    except (AttributeError, TypeError, ValueError):
        return None
    is_position = type(row.num_tokens) is int and 0 < row.num_tokens < MAX_TOKENS
    return row if is_position and (row.name or "").isprintable() else None
