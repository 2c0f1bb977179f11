"""The schema: the tables of the index, and the version they have."""

import sqlite3

SCHEMA_VERSION = 9
# In place of the first token of a checkpoint, which has no tokens.
NO_TOKEN = -1
# Plain SQL: an index is compared with it whenever it is opened, so the text must not
# depend on the release of a library.
TABLES = """
CREATE TABLE fingerprints (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL,
    model TEXT NOT NULL,
    source TEXT,
    parts TEXT NOT NULL,
    namespace TEXT NOT NULL
);
CREATE UNIQUE INDEX fingerprints_by_digest ON fingerprints (digest);
-- With this one, and others by namespace and fingerprint, what is asked in a namespace
-- takes no longer with others beside it.
CREATE INDEX fingerprints_by_namespace ON fingerprints (namespace);

CREATE TABLE segments (
    id INTEGER PRIMARY KEY,
    key TEXT,
    parent_id INTEGER,
    fingerprint_id INTEGER REFERENCES fingerprints (id),
    start INTEGER,
    end INTEGER,
    first_token INTEGER,
    nbytes INTEGER,
    token_nbytes INTEGER,
    created_at REAL,
    used_at REAL,
    sliceable INTEGER,
    needs_checkpoint INTEGER,
    priority INTEGER,
    token_ids BLOB
);
CREATE UNIQUE INDEX segments_by_key ON segments (key);
-- Finds the child that continues a prompt at a token, the checkpoints of a segment,
-- and whether it has children.
CREATE INDEX segments_by_parent ON segments (parent_id, start, first_token);
CREATE INDEX segments_by_fingerprint ON segments (fingerprint_id);

CREATE TABLE blocks (
    hash INTEGER,
    segment_id INTEGER,
    PRIMARY KEY (hash, segment_id)
) WITHOUT ROWID;
CREATE INDEX blocks_by_segment ON blocks (segment_id);

-- Up to where a segment was used when: the later, the less far.
-- One row: the last time that was noted.
CREATE TABLE clock (
    id INTEGER PRIMARY KEY,
    noted_at REAL
);

CREATE TABLE uses (
    segment_id INTEGER,
    position INTEGER,
    used_at REAL,
    PRIMARY KEY (segment_id, position)
) WITHOUT ROWID;

CREATE TABLE prefixes (
    key TEXT PRIMARY KEY,
    segment_id INTEGER REFERENCES segments (id),
    num_tokens INTEGER,
    name TEXT,
    created_at REAL,
    used_at REAL,
    hits INTEGER,
    origin TEXT,
    manifest TEXT,
    namespace TEXT NOT NULL
);
-- Most have none, and each page more that removing writes needs room on a full disk.
CREATE UNIQUE INDEX prefixes_by_name ON prefixes (namespace, name)
    WHERE name IS NOT NULL;
CREATE INDEX prefixes_by_segment ON prefixes (segment_id);

-- What happened, which blobs cannot tell again.
CREATE TABLE writes (
    day TEXT PRIMARY KEY,
    nbytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE speeds (
    fingerprint_id INTEGER,
    deed TEXT,
    num_tokens REAL,
    seconds REAL,
    measured_at REAL,
    PRIMARY KEY (fingerprint_id, deed)
);
CREATE TABLE usage (
    fingerprint_id INTEGER,
    key TEXT,
    requests INTEGER,
    cached_tokens INTEGER,
    prefilled_tokens INTEGER,
    load_seconds REAL,
    prefill_seconds REAL,
    saved_seconds REAL,
    PRIMARY KEY (fingerprint_id, key)
);
CREATE TABLE evictions (
    fingerprint_id INTEGER,
    number INTEGER,
    key TEXT,
    end INTEGER,
    reason TEXT,
    removed_at REAL,
    PRIMARY KEY (fingerprint_id, number)
) WITHOUT ROWID;
"""


def create_tables(connection: sqlite3.Connection) -> None:
    """Create the schema inside the transaction that is open."""
    # Imported here because it costs 0.2 s, which `ls` has not.
    import sqlite_utils

    database = sqlite_utils.Database(connection)
    for statement in _statements():
        database.execute(statement)


def has_tables(connection: sqlite3.Connection) -> bool:
    """Return whether a database has this schema, and nothing else.

    A view or a trigger would run as part of our statements.
    """
    statements = _statements()
    # What comes with a primary key has no text.
    rows = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")
    tables = [sql for [sql] in rows.fetchmany(len(statements) + 1)]
    return len(tables) == len(statements) and set(tables) == set(statements)


def _statements() -> list[str]:
    """Return the statements without comments, as SQLite keeps their text."""
    lines = (line for line in TABLES.splitlines() if not line.startswith("--"))
    *statements, _ = "\n".join(lines).split(";")
    return [statement.strip() for statement in statements]


def within(namespace: str | None, table: str) -> tuple[str, list[str]]:
    """Return the condition that rows of a table are in a namespace, and its values.

    Without a namespace all of them are.
    """
    if namespace is None:
        return "1", []
    return f"{table}.namespace = ?", [namespace]


def segment_within(namespace: str | None) -> tuple[str, list[str]]:
    """Return the condition that a `segment_id` is in a namespace, and its values."""
    if namespace is None:
        return "1", []
    condition = """
        segment_id IN (
            SELECT s.id FROM segments s JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE f.namespace = ?
        )
    """
    return condition, [namespace]
