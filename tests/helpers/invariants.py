"""What must be true of every store at any time, read from its real files."""

import sqlite3
import struct
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from promptcache.segments.types import Priority, ResumeRules
from promptcache.store import PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.segments import expected_digests, expected_key


class Row(NamedTuple):
    """A row of the table of segments."""

    id: int
    key: str
    parent_id: int
    digest: str
    start: int
    end: int
    first_token: int
    nbytes: int
    resumption: ResumeRules
    priority: Priority
    token_ids: bytes

    @property
    def is_checkpoint(self) -> bool:
        return self.start == self.end

    @property
    def tag(self) -> str:
        """Return what tells its key from that of a common segment with its end."""
        return "checkpoint" if self.is_checkpoint else ""


def check_invariants(store: PrefixStore | Path) -> None:
    """Assert what must be true of a store after every operation."""
    folder = store if isinstance(store, Path) else store.path
    rows = read_rows(folder)
    check_modes(folder)
    check_blobs(folder, rows)
    check_tree(rows)
    check_hashes(folder, rows)
    check_prefixes(folder, rows)


def read_rows(folder: Path) -> dict[int, Row]:
    """Return all segments by id."""
    sql = f"""
        SELECT s.id, key, parent_id, digest, start, end, first_token, nbytes,
            {", ".join(ResumeRules._fields)}, priority, token_ids
        FROM segments s JOIN fingerprints f ON f.id = fingerprint_id
    """
    num_segments = query(folder, "SELECT count(*) FROM segments")[0][0]
    rows: dict[int, Row] = {}
    for *fields, priority, token_ids in query(folder, sql):
        resumption = ResumeRules(*map(bool, fields[8:]))
        row = Row._make([*fields[:8], resumption, Priority(priority), token_ids])
        rows[row.id] = row
    assert len(rows) == num_segments, "a segment without a fingerprint"
    return rows


def query(folder: Path, sql: str) -> list[tuple[Any, ...]]:
    """Return what a query finds in the real index."""
    uri = f"file:{folder / 'index.db'}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        return connection.execute(sql).fetchall()


def check_modes(folder: Path) -> None:
    """Assert that nobody else can read anything."""
    for path in [folder, *folder.rglob("*")]:
        # Another process may be at work.
        if path.exists():
            mode = path.stat().st_mode & 0o777
            assert mode == (0o700 if path.is_dir() else 0o600), path


def check_blobs(folder: Path, rows: dict[int, Row]) -> None:
    """Assert that every row has a sound blob that says the same."""
    blobs = BlobFolder(folder)
    for row in rows.values():
        info = blobs.check(row.key).info
        assert info.key == row.key
        # It names its parent by the chain hash that it starts at.
        before = path_token_ids(rows, row.parent_id)[: row.start] if row.start else []
        assert len(before) == row.start
        assert info.start_hash == expected_key(row.digest, before)
        assert (info.start, info.end) == (row.start, row.end)
        assert info.fingerprint.digest == row.digest
        assert (info.resumption, info.priority) == (row.resumption, row.priority)
        assert blobs.path(row.key).stat().st_size == row.nbytes


def check_tree(rows: dict[int, Row]) -> None:
    """Assert that the segments are radix trees, with checkpoints as leaves."""
    for row in rows.values():
        assert len(row.token_ids) == 4 * (row.end - row.start)
        if row.is_checkpoint:
            assert row.first_token == -1
        else:
            assert row.start < row.end
            assert row.first_token == struct.unpack("<I", row.token_ids[:4])[0]
        if row.parent_id:
            parent = rows[row.parent_id]
            assert not parent.is_checkpoint
            assert parent.start < row.start <= parent.end
            assert parent.digest == row.digest
            if row.resumption.sliceable and not row.is_checkpoint:
                # What its parent has of the tokens there is something else.
                place = slice(4 * (row.start - parent.start), None)
                assert parent.token_ids[place][:4] != row.token_ids[:4]
        else:
            assert row.start == 0 < row.end
    edges = Counter(
        (row.parent_id, row.digest, row.start, row.first_token)
        for row in rows.values()
        if row.resumption.sliceable
    )
    assert not edges or max(edges.values()) == 1, "two segments for the same tokens"


def path_token_ids(rows: dict[int, Row], segment_id: int) -> list[int]:
    """Return the token ids from the root to a segment's end."""
    row = rows[segment_id]
    before = path_token_ids(rows, row.parent_id) if row.parent_id else []
    own = struct.unpack(f"<{row.end - row.start}I", row.token_ids)
    return [*before[: row.start], *own]


def check_hashes(folder: Path, rows: dict[int, Row]) -> None:
    """Assert that keys and blocks are the chain hashes of the whole path."""
    wanted: set[tuple[object, ...]] = set()
    for row in rows.values():
        token_ids = path_token_ids(rows, row.id)
        assert row.key == expected_key(row.digest, token_ids, row.tag)
        digests = expected_digests(row.digest, token_ids)
        for i in range(row.start // 32 + 1, row.end // 32 + 1):
            wanted.add((struct.unpack("<q", digests[i][:8])[0], row.id))
    assert set(query(folder, "SELECT hash, segment_id FROM blocks")) == wanted


def check_prefixes(folder: Path, rows: dict[int, Row]) -> None:
    """Assert that every listed prefix ends inside its segment."""
    sql = "SELECT key, segment_id, num_tokens FROM prefixes"
    for key, segment_id, num_tokens in query(folder, sql):
        row = rows[segment_id]
        # A checkpoint has no tokens of its own.
        assert row.start < num_tokens + row.is_checkpoint <= row.end + row.is_checkpoint
        token_ids = path_token_ids(rows, segment_id)[:num_tokens]
        assert key == expected_key(row.digest, token_ids)
