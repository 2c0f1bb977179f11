"""The schema: the tables of the index, and the version they have."""

import sqlite3
from typing import Any

SCHEMA_VERSION = 6
# In place of the first token of a checkpoint, which has no tokens.
NO_TOKEN = -1

CREATE_WRITES = """
    CREATE TABLE IF NOT EXISTS writes
    (day TEXT PRIMARY KEY, nbytes INTEGER NOT NULL) WITHOUT ROWID
"""


def create_tables(connection: sqlite3.Connection) -> None:
    """Create the schema inside the transaction that is open."""
    # Imported here because it costs 0.2 s, which `ls` has not.
    import sqlite_utils

    database = sqlite_utils.Database(connection)
    database["fingerprints"].create(
        {"id": int, "digest": str, "model": str, "source": str, "parts": str},
        pk="id",
        not_null={"digest", "model", "parts"},
    )
    database["fingerprints"].create_index(["digest"], unique=True)
    database["segments"].create(
        {
            "id": int,
            "key": str,
            "parent_id": int,
            "fingerprint_id": int,
            "start": int,
            "end": int,
            "first_token": int,
            "nbytes": int,
            "created_at": float,
            "used_at": float,
            "divisible": int,
            "extendable": int,
            "needs_checkpoint": int,
            "has_logits": int,
            "worth": int,
            "token_ids": bytes,
        },
        pk="id",
        foreign_keys=[("fingerprint_id", "fingerprints", "id")],
    )
    database["segments"].create_index(["key"], unique=True)
    # Finds the child that continues a prompt at a token, the checkpoints of a
    # segment, and whether it has children.
    database["segments"].create_index(["parent_id", "start", "first_token"])
    database.execute(
        "CREATE TABLE blocks (hash INTEGER, segment_id INTEGER,"
        " PRIMARY KEY (hash, segment_id)) WITHOUT ROWID"
    )
    database["blocks"].create_index(["segment_id"])
    database["prefixes"].create(
        {
            "key": str,
            "segment_id": int,
            "num_tokens": int,
            "name": str,
            "created_at": float,
            "used_at": float,
            "hits": int,
            "origin": str,
            "manifest": str,
        },
        pk="key",
        foreign_keys=[("segment_id", "segments", "id")],
    )
    database["prefixes"].create_index(["name"], unique=True)
    database["prefixes"].create_index(["segment_id"])
    _create_history(database)


def _create_history(database: Any) -> None:
    """Create the tables of what happened, which blobs cannot tell again."""
    database.execute(CREATE_WRITES)
    # Apart from the prefixes, so that asking does not take longer with more of them.
    database["configs"].create(
        {"template": str, "config": str}, pk=("template", "config")
    )
    database["speeds"].create(
        {
            "fingerprint_id": int,
            "deed": str,
            "num_tokens": float,
            "seconds": float,
            "measured_at": float,
        },
        pk=("fingerprint_id", "deed"),
    )
    database["usage"].create(
        {
            "fingerprint_id": int,
            "key": str,
            "requests": int,
            "cached_tokens": int,
            "prefilled_tokens": int,
            "load_seconds": float,
            "prefill_seconds": float,
            "saved_seconds": float,
        },
        pk=("fingerprint_id", "key"),
    )
    database["evictions"].create(
        {
            "id": int,
            "key": str,
            "fingerprint_id": int,
            "end": int,
            "reason": str,
            "removed_at": float,
        },
        pk="id",
    )
