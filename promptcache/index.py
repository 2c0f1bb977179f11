"""The index: which segments and prefixes the store has, in SQLite.

It is derived from the blobs and can be rebuilt from them. Segments form a radix
tree: `parent_id` 0 is the root, and a child starts anywhere inside its parent.
"""

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal

from promptcache.chain import TOKEN_NBYTES, Chain
from promptcache.errors import DamagedIndexError, StoreError, StoreFormatError
from promptcache.types import (
    CheckpointRow,
    Eviction,
    Fingerprint,
    Leaf,
    ListedPrefix,
    Origin,
    Prefix,
    PromptRow,
    Receipt,
    SegmentInfo,
    SegmentRow,
    Usage,
    Worth,
    Written,
)

SCHEMA_VERSION = 5
ROOT_ID = 0
# In place of the first token of a checkpoint, which has no tokens.
NO_TOKEN = -1
# A prompt is tried with so many other arguments of its template.
MOST_CONFIGS = 4
# So many evictions are remembered, to say later why a prompt missed.
MOST_EVICTIONS = 10_000
# Writers queue behind each other; a save holds the lock for milliseconds.
TIMEOUT_SECONDS = 30
# What a measured speed still counts for after the next one.
SPEED_DECAY = 0.5
# What an answer may be delayed by for the sake of its receipt.
BUSY_MILLISECONDS = 100

DAMAGED = "the index holds what was never written, run `promptcache verify`"

Deed = Literal["prefill", "load"]

CREATE_WRITES = """
    CREATE TABLE IF NOT EXISTS writes
    (day TEXT PRIMARY KEY, nbytes INTEGER NOT NULL) WITHOUT ROWID
"""

SEGMENT_COLUMNS = (
    "id, key, parent_id, start, end, nbytes, divisible, extendable, needs_checkpoint, "
    "token_ids"
)


class Index:
    """The rows of one store.

    Invariants:
        Every write happens inside `writing()`.
        A segment's parent exists as long as the segment does.
    """

    def __init__(
        self, path: Path, *, populate: Callable[["Index"], object] = lambda index: None
    ) -> None:
        """Open the index, creating it where there is none.

        Args:
            path: The database.
            populate: Called with a new index before anybody else sees it.

        Raises:
            StoreFormatError: A newer promptcache wrote it.
            DamagedIndexError: It is no database.
            StoreError: It cannot be opened.
        """
        self.path = path
        self.read_only = False
        self._lock = threading.RLock()
        with _translated():
            self._connection = self._connect()
            try:
                self._prepare(populate)
            except BaseException:
                self._connection.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        try:
            # Created by hand, because SQLite would follow the umask.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            if os.access(self.path.parent, os.W_OK):
                return _open(self.path, "mode=rw")
        except (OSError, sqlite3.OperationalError) as error:
            if not os.path.exists(self.path):
                raise StoreError(f"the index {self.path} cannot be created") from error
        self.read_only = True
        # `immutable` reads where no -shm file can be made; it must not be used
        # while a WAL holds rows that it would not see.
        wal = self.path.with_name(f"{self.path.name}-wal")
        has_rows = os.path.exists(wal) and wal.stat().st_size
        return _open(self.path, "mode=ro" if has_rows else "immutable=1")

    def _prepare(self, populate: Callable[["Index"], object]) -> None:
        """Check the schema's version, or create the tables."""
        version = self._version()
        if version == SCHEMA_VERSION:
            return
        if version:
            raise DamagedIndexError(f"the index has the older format {version}")
        if self.read_only:
            raise StoreError(f"the index {self.path} is empty and cannot be written")
        # Both have an effect before the first table only. Freed pages can then be
        # given back, and readers never wait for a writer.
        self._execute("PRAGMA auto_vacuum=INCREMENTAL")
        _switch_to_wal(self._connection)
        with self.writing():
            if self._version() < SCHEMA_VERSION:
                _create_tables(self._connection)
                populate(self)
                self._execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def _version(self) -> int:
        """Return the schema's version, 0 before there is one."""
        version = int(self._execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise StoreFormatError(
                f"the store {self.path.parent} has format {version} and this "
                f"promptcache reads up to {SCHEMA_VERSION}, upgrade promptcache"
            )
        return version

    def close(self) -> None:
        """Close the connection; the last one to do so folds the WAL back in."""
        with self._lock:
            self._connection.close()

    def shrink(self) -> None:
        """Give the room of deleted rows and of the WAL back to the disk."""
        with self._lock, contextlib.suppress(StoreError), _translated():
            # `execute` would take one step, which frees one page.
            self._connection.executescript("PRAGMA incremental_vacuum")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def writing(self) -> AbstractContextManager[None]:
        """Hold the write lock for a transaction. Raises StoreError."""
        return self._transaction("BEGIN IMMEDIATE")

    @contextlib.contextmanager
    def impatient(self) -> Iterator[None]:
        """Fail soon where another process writes, rather than wait for it."""
        with self._lock:
            self._execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
            try:
                yield
            finally:
                self._execute(f"PRAGMA busy_timeout={TIMEOUT_SECONDS * 1000}")

    def reading(self) -> AbstractContextManager[None]:
        """See one state of the store until the end, whatever others do."""
        return self._transaction("BEGIN")

    @contextlib.contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        """Commit at the end, or roll back; inside another one, be part of it."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._execute(begin)
            try:
                yield
            except BaseException:
                self._connection.rollback()
                raise
            with _translated():
                self._connection.commit()

    def _execute(self, sql: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        with self._lock, _translated():
            return self._connection.execute(sql, parameters)

    def _all(
        self, sql: str, parameters: Sequence[object] = ()
    ) -> list[tuple[Any, ...]]:
        with self._lock, _translated():
            return self._connection.execute(sql, parameters).fetchall()

    def is_sound(self) -> bool:
        """Return whether SQLite finds its own file sound."""
        try:
            return self._all("PRAGMA quick_check") == [("ok",)]
        except StoreError:
            return False

    # Looking things up

    def has_block(self, block_hash: int) -> bool:
        """Return whether some segment covers the block boundary of this hash."""
        sql = "SELECT 1 FROM blocks WHERE hash = ? LIMIT 1"
        return self._execute(sql, [block_hash]).fetchone() is not None

    def segments_at_block(self, block_hash: int, fingerprint: str) -> list[int]:
        """Return the ids of the segments that cover the boundary of this hash."""
        sql = """
            SELECT segment_id FROM blocks JOIN segments s ON s.id = segment_id
            JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE hash = ? AND f.digest = ?
        """
        return [_int(row[0]) for row in self._all(sql, [block_hash, fingerprint])]

    def path_to(self, segment_id: int) -> list[SegmentRow]:
        """Return a segment with its ancestors, the root's child first."""
        sql = f"""
            WITH RECURSIVE path(id) AS (
                VALUES (?)
                UNION -- which ends where a damaged parent_id leads in a circle
                SELECT parent_id FROM segments JOIN path USING (id) WHERE parent_id
            )
            SELECT {SEGMENT_COLUMNS} FROM segments JOIN path USING (id)
            ORDER BY start
        """
        path = [_segment(row) for row in self._all(sql, [segment_id])]
        # Rows that are left out would be taken for zeros.
        for parent, child in pairwise(path):
            if child.parent_id != parent.id or not parent.start < child.start:
                raise DamagedIndexError(DAMAGED)
        if path and (path[0].parent_id != ROOT_ID or path[0].start != 0):
            raise DamagedIndexError(DAMAGED)
        return path

    def token_ids(self, segment_id: int, num_tokens: int) -> bytes:
        """Return the first packed token ids of a segment with its ancestors."""
        data = b""
        for row in self.path_to(segment_id):
            data = data[: row.start * TOKEN_NBYTES] + row.token_ids
        return data[: num_tokens * TOKEN_NBYTES]

    def children(
        self, parent_id: int, fingerprint: str, token_id_by_start: Mapping[int, int]
    ) -> list[SegmentRow]:
        """Return the children at given starts that begin with given token ids."""
        wanted = ", ".join("(?, ?)" for _ in token_id_by_start)
        sql = f"""
            WITH wanted(start, first_token) AS (VALUES {wanted})
            SELECT {SEGMENT_COLUMNS} FROM wanted
            JOIN segments USING (start, first_token)
            WHERE parent_id = ? AND fingerprint_id =
                (SELECT id FROM fingerprints WHERE digest = ?)
        """
        pairs = [value for pair in token_id_by_start.items() for value in pair]
        rows = self._all(sql, [*pairs, parent_id, fingerprint])
        return [_segment(row) for row in rows]

    def checkpoints(self, parent_ids: Iterable[int]) -> list[CheckpointRow]:
        """Return the checkpoints that hang on given segments."""
        ids = list(parent_ids)
        marks = ", ".join("?" for _ in ids)
        sql = f"""
            SELECT key, parent_id, start, extendable, has_logits, worth,
                id IN (SELECT segment_id FROM prefixes)
            FROM segments WHERE parent_id IN ({marks}) AND first_token = ?
        """
        rows = _checked(self._all(sql, [*ids, NO_TOKEN]), str, *[int] * 6)
        with _translated():
            return [
                CheckpointRow._make(
                    [*row[:3], *map(bool, row[3:5]), Worth(row[5]), bool(row[6])]
                )
                for row in rows
            ]

    def segment_id(self, key: str) -> int | None:
        """Return the id of a segment, or None."""
        row = self._execute("SELECT id FROM segments WHERE key = ?", [key]).fetchone()
        return row and _int(row[0])

    def nbytes_of(self, keys: Sequence[str]) -> int:
        """Return the size of the blobs of some segments."""
        marks = ", ".join("?" for _ in keys)
        sql = f"SELECT coalesce(sum(nbytes), 0) FROM segments WHERE key IN ({marks})"
        return _int(self._execute(sql, keys).fetchone()[0])

    def segment_keys(self) -> set[str]:
        """Return the keys of all segments."""
        return {str(row[0]) for row in self._all("SELECT key FROM segments")}

    def leaves(self) -> list[Leaf]:
        """Return all segments as eviction sees them."""
        sql = """
            SELECT s.id, s.key, s.parent_id, s.nbytes, s.used_at, EXISTS (
                SELECT 1 FROM prefixes p
                WHERE p.segment_id = s.id AND p.name IS NOT NULL
            ), f.model, s.first_token = ?
            FROM segments s JOIN fingerprints f ON f.id = s.fingerprint_id
        """
        kinds = (int, str, int, int, int | float, int, str, int)
        return [
            Leaf._make([*row[:5], bool(row[5]), row[6], bool(row[7])])
            for row in _checked(self._all(sql, [NO_TOKEN]), *kinds)
        ]

    def fingerprint_of(self, segment_id: int) -> Fingerprint:
        """Return the fingerprint that a segment was computed under."""
        sql = """
            SELECT digest, model, source, parts FROM fingerprints
            WHERE id = (SELECT fingerprint_id FROM segments WHERE id = ?)
        """
        return _fingerprint(*self._execute(sql, [segment_id]).fetchone())

    def fingerprints(self) -> list[Fingerprint]:
        """Return all fingerprints that something was computed under."""
        rows = self._all("SELECT digest, model, source, parts FROM fingerprints")
        return [_fingerprint(*row) for row in rows]

    # Prefixes

    def prefixes(self) -> list[tuple[Prefix, int]]:
        """Return all prefixes, the last used first, each with its segment's id.

        The end of rows that no prefix needs, left by an interrupted build, counts as
        one. `nbytes` is not known here and 0.
        """
        sql = """
            SELECT p.key, p.name, f.model, p.num_tokens, p.created_at, p.used_at,
                p.hits, p.segment_id
            FROM prefixes p JOIN segments s ON s.id = p.segment_id
            JOIN fingerprints f ON f.id = s.fingerprint_id
            UNION ALL
            SELECT s.key, NULL, f.model, s.end, s.created_at, s.used_at, 0, s.id
            FROM segments s JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE s.first_token != ?
            AND NOT EXISTS (
                SELECT 1 FROM segments c WHERE c.parent_id = s.id
                AND (c.first_token != ? OR c.id IN (SELECT segment_id FROM prefixes))
            )
            AND NOT EXISTS (SELECT 1 FROM prefixes p WHERE p.segment_id = s.id)
            ORDER BY 6 DESC, 1
        """
        kinds = (str, str | None, str, int, int | float, int | float, int, int)
        rows = _checked(self._all(sql, [NO_TOKEN, NO_TOKEN]), *kinds)
        return [(_prefix(*row[:-1]), row[-1]) for row in rows]

    def add_prefix(
        self, key: str, segment_id: int, num_tokens: int, *, now: float
    ) -> bool:
        """List a prefix, and return whether it was not listed already."""
        sql = """
            INSERT INTO prefixes
                (key, segment_id, num_tokens, created_at, used_at, hits)
            VALUES (?, ?, ?, ?, ?, 0)
            ON CONFLICT (key) DO NOTHING
        """
        with self.writing():
            cursor = self._execute(sql, [key, segment_id, num_tokens, now, now])
            return cursor.rowcount > 0

    def move_prefixes(self, segment_id: int, to: int) -> None:
        """Let the prefixes that end in a segment end in another one."""
        with self.writing():
            sql = "UPDATE prefixes SET segment_id = ? WHERE segment_id = ?"
            self._execute(sql, [to, segment_id])

    def remove_prefix(self, key: str) -> None:
        """Stop listing a prefix; its segments stay."""
        with self.writing():
            self._execute("DELETE FROM prefixes WHERE key = ?", [key])

    def set_name(
        self, key: str, name: str | None, *, manifest: str | None = None
    ) -> None:
        """Name a listed prefix, or take its name away; a name moves to it.

        `manifest` is the file that wants it so, if any.
        """
        with self.writing():
            if name is not None:
                sql = "UPDATE prefixes SET name = NULL, manifest = NULL WHERE name = ?"
                self._execute(sql, [name])
            sql = "UPDATE prefixes SET name = ?, manifest = ? WHERE key = ?"
            self._execute(sql, [name, manifest, key])

    def names(self) -> dict[str, tuple[str, int]]:
        """Return the key and the number of tokens of each pin by its name."""
        sql = "SELECT name, key, num_tokens FROM prefixes WHERE name IS NOT NULL"
        return {str(n): (str(k), _int(t)) for n, k, t in self._all(sql)}

    def set_origin(self, key: str, origin: Origin) -> None:
        """Note how a listed prefix was rendered."""
        with self.writing():
            sql = "UPDATE prefixes SET origin = ? WHERE key = ?"
            self._execute(sql, [json.dumps(asdict(origin)), key])
            sql = "INSERT OR REPLACE INTO configs (template, config) VALUES (?, ?)"
            self._execute(sql, [origin.template, json.dumps(dict(origin.config))])

    def configs(self, template: str) -> list[dict[str, Any]]:
        """Return with which arguments of a template prompts were rendered last."""
        sql = f"""
            SELECT config FROM configs WHERE template = ?
            ORDER BY rowid DESC LIMIT {MOST_CONFIGS}
        """
        return [json.loads(row[0]) for row in self._all(sql, [template])]

    def forget_configs(self) -> None:
        """Forget arguments of templates that no prompt is listed with any more."""
        sql = """
            DELETE FROM configs WHERE NOT EXISTS (
                SELECT 1 FROM prefixes
                WHERE json_extract(origin, '$.template') = configs.template
                AND json_extract(origin, '$.config') = json(configs.config)
            )
        """
        with self.writing():
            self._execute(sql)

    def created_at(self, key: str) -> float | None:
        """Return when a prefix was listed, or None if it is not."""
        sql = "SELECT created_at FROM prefixes WHERE key = ?"
        row = self._execute(sql, [key]).fetchone()
        return None if row is None else float(row[0])

    def prompts(self) -> list[PromptRow]:
        """Return what was built or saved, the last used first."""
        sql = """
            SELECT p.key, f.digest, p.segment_id, p.num_tokens, p.origin
            FROM prefixes p JOIN segments s ON s.id = p.segment_id
            JOIN fingerprints f ON f.id = s.fingerprint_id
            ORDER BY p.used_at DESC, p.key
        """
        rows = _checked(self._all(sql), str, str, int, int, str | None)
        return [PromptRow._make([*row[:-1], _origin(row[-1])]) for row in rows]

    def subtree(self, key: str) -> dict[int, str]:
        """Return a segment and all that hangs on it: keys by ids."""
        sql = """
            WITH RECURSIVE tree(id) AS (
                SELECT id FROM segments WHERE key = ?
                UNION
                SELECT s.id FROM segments s JOIN tree ON s.parent_id = tree.id
            )
            SELECT id, key FROM segments JOIN tree USING (id)
        """
        return {_int(row[0]): str(row[1]) for row in self._all(sql, [key])}

    def listed(self) -> list[ListedPrefix]:
        """Return the prefixes that were built or saved, by key."""
        sql = """
            SELECT p.key, s.key, p.num_tokens, p.name, p.manifest
            FROM prefixes p JOIN segments s ON s.id = p.segment_id ORDER BY p.key
        """
        kinds = (str, str, int, str | None, str | None)
        return [ListedPrefix(*row) for row in _checked(self._all(sql), *kinds)]

    def touch(
        self, segment_keys: Sequence[str], cached_tokens: int, *, now: float
    ) -> str | None:
        """Note a hit on a path of segments that reused so many tokens.

        It counts for the longest prefix that was reused in full, else for the
        shortest one that was reused in part; return its key, if there is one.
        """
        marks = ", ".join("?" for _ in segment_keys)
        with self.writing():
            self._execute(
                f"UPDATE segments SET used_at = ? WHERE key IN ({marks})",
                [now, *segment_keys],
            )
            sql = f"""
                UPDATE prefixes SET hits = hits + 1, used_at = ? WHERE key = (
                    SELECT p.key FROM prefixes p JOIN segments s ON s.id = p.segment_id
                    WHERE s.key IN ({marks})
                    ORDER BY p.num_tokens > ?, abs(? - p.num_tokens) LIMIT 1
                ) RETURNING key
            """
            hit = [now, *segment_keys, cached_tokens, cached_tokens]
            return next((str(row[0]) for row in self._all(sql, hit)), None)

    # Usage

    def add_speed(
        self,
        fingerprint: Fingerprint,
        deed: Deed,
        num_tokens: int,
        seconds: float,
        *,
        now: float,
    ) -> None:
        """Note how long it took to do something to so many tokens at once.

        What was noted before counts half as much each time.
        """
        sql = f"""
            INSERT INTO speeds (fingerprint_id, deed, num_tokens, seconds, measured_at)
            VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (fingerprint_id, deed) DO UPDATE SET
                num_tokens = num_tokens * {SPEED_DECAY} + excluded.num_tokens,
                seconds = seconds * {SPEED_DECAY} + excluded.seconds,
                measured_at = excluded.measured_at
        """
        with self.writing():
            fingerprint_id = self._fingerprint_id(fingerprint)
            self._execute(sql, [fingerprint_id, deed, num_tokens, seconds, now])

    def speed(
        self, fingerprint: str, deed: Deed, *, since: float = 0.0
    ) -> float | None:
        """Return how many tokens a second it takes, or None if that is not known.

        Args:
            fingerprint: What the tokens' KV values depend on.
            deed: What is done to them.
            since: Measured before, it counts as not known.
        """
        sql = """
            SELECT num_tokens / seconds FROM speeds
            JOIN fingerprints f ON f.id = fingerprint_id
            WHERE digest = ? AND deed = ? AND measured_at >= ?
        """
        row = self._execute(sql, [fingerprint, deed, since]).fetchone()
        return None if row is None else float(row[0])

    def add_receipt(
        self, receipt: Receipt, key: str | None, saved_seconds: float
    ) -> None:
        """Add what a request got to what is known of a prefix, or of misses."""
        columns = (
            "requests, cached_tokens, prefilled_tokens, load_seconds, prefill_seconds, "
            "saved_seconds"
        )
        sums = ", ".join(f"{c} = {c} + excluded.{c}" for c in columns.split(", "))
        sql = f"""
            INSERT INTO usage (fingerprint_id, key, {columns})
            VALUES (?, ?, 1, ?, ?, ?, ?, ?)
            ON CONFLICT (fingerprint_id, key) DO UPDATE SET {sums}
        """
        figures = [
            receipt.cached_tokens,
            receipt.prefilled_tokens,
            receipt.load_seconds,
            receipt.prefill_seconds,
            saved_seconds,
        ]
        with self.writing():
            fingerprint_id = self._fingerprint_id(receipt.fingerprint)
            self._execute(sql, [fingerprint_id, key or "", *figures])

    def usage(self) -> list[Usage]:
        """Return what requests got, by prefix, the most saved first."""
        sql = """
            SELECT f.model, NULLIF(u.key, ''), p.name, u.requests, u.cached_tokens,
                u.prefilled_tokens, u.load_seconds, u.prefill_seconds, u.saved_seconds
            FROM usage u JOIN fingerprints f ON f.id = u.fingerprint_id
            LEFT JOIN prefixes p ON p.key = u.key
            ORDER BY u.saved_seconds DESC, u.key
        """
        seconds = [int | float] * 3
        kinds = (str, str | None, str | None, int, int, int, *seconds)
        return [Usage(*row) for row in _checked(self._all(sql), *kinds)]

    def add_written(self, nbytes: int, *, now: float) -> None:
        """Note that so many bytes of a blob were written."""
        sql = """
            INSERT INTO writes (day, nbytes) VALUES (?, ?)
            ON CONFLICT (day) DO UPDATE SET nbytes = nbytes + excluded.nbytes
        """
        with self.writing():
            # Stores that were made before have no such table.
            self._execute(CREATE_WRITES)
            self._execute(sql, [_day(now), nbytes])

    def written(self) -> Written:
        """Return how many bytes of blobs were written, in all and today."""
        is_there = "SELECT 1 FROM sqlite_master WHERE name = 'writes'"
        if not self._all(is_there):
            return Written(0, 0)
        sql = """
            SELECT coalesce(sum(nbytes), 0),
                coalesce(sum(nbytes) FILTER (WHERE day = ?), 0) FROM writes
        """
        rows = self._all(sql, [_day(time.time())])
        return Written(*_checked(rows, int, int)[0])

    # Evictions

    def heads(self, segment_key: str) -> set[int]:
        """Return where the first users' texts begin in the prompts that end there."""
        sql = """
            SELECT DISTINCT json_extract(origin, '$.head') FROM prefixes
            WHERE segment_id = (SELECT id FROM segments WHERE key = ?)
        """
        return {_int(row[0]) for row in self._all(sql, [segment_key]) if row[0]}

    def note_eviction(
        self, segment_key: str, keys: Mapping[int, str], reason: str, *, now: float
    ) -> None:
        """Remember that a segment is being taken away, and why.

        `keys` are those of the prefixes that it is needed for, by their ends.
        """
        sql = """
            INSERT INTO evictions (key, fingerprint_id, end, reason, removed_at)
            SELECT ?, fingerprint_id, ?, ?, ? FROM segments WHERE key = ?
        """
        with self.writing():
            for end, key in keys.items():
                self._execute(sql, [key, end, reason, now, segment_key])
            oldest = "(SELECT max(id) FROM evictions) - ?"
            self._execute(
                f"DELETE FROM evictions WHERE id <= {oldest}", [MOST_EVICTIONS]
            )

    def evictions(self, fingerprint: str) -> Iterator[tuple[str, Eviction]]:
        """Yield the keys of what was taken away, the longest prefixes first."""
        sql = """
            SELECT e.key, e.end, e.reason, e.removed_at FROM evictions e
            JOIN fingerprints f ON f.id = e.fingerprint_id
            WHERE f.digest = ? ORDER BY e.end DESC, e.id DESC
        """
        for key, *eviction in self._all(sql, [fingerprint]):
            yield str(key), Eviction(*eviction)

    # Adding and removing segments

    def add_segment(self, info: SegmentInfo, chain: Chain, *, nbytes: int) -> None:
        """Add a segment of a chain whose blob and parent are in place."""
        with self.writing():
            parent_id = self.segment_id(info.parent_key) if info.parent_key else ROOT_ID
            assert parent_id is not None
            cursor = self._execute(
                """
                INSERT INTO segments (key, parent_id, fingerprint_id, start, end,
                    first_token, nbytes, created_at, used_at, divisible, extendable,
                    needs_checkpoint, has_logits, worth, token_ids)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                """,
                [
                    info.key,
                    parent_id,
                    self._fingerprint_id(info.fingerprint),
                    info.start,
                    info.end,
                    NO_TOKEN if info.is_checkpoint else chain.token_id(info.start),
                    nbytes,
                    info.created_at,
                    info.created_at,
                    *info.resumption,
                    info.worth,
                    chain.span(info.start, info.end),
                ],
            )
            segment_id = _int(cursor.lastrowid)
            with _translated():
                self._connection.executemany(
                    "INSERT INTO blocks (hash, segment_id) VALUES (?, ?)",
                    [(h, segment_id) for h in chain.block_hashes(info.start, info.end)],
                )
            if info.is_prefix:
                key = chain.key_at(info.end)
                self.add_prefix(key, segment_id, info.end, now=info.created_at)

    def _fingerprint_id(self, fingerprint: Fingerprint) -> int:
        self._execute(
            """
            INSERT INTO fingerprints (digest, model, source, parts)
            VALUES (?, ?, ?, ?)
            ON CONFLICT (digest) DO UPDATE
            SET model = excluded.model, source = excluded.source
            """,
            [
                fingerprint.digest,
                fingerprint.model,
                fingerprint.source,
                json.dumps(dict(fingerprint.parts), sort_keys=True),
            ],
        )
        sql = "SELECT id FROM fingerprints WHERE digest = ?"
        return _int(self._execute(sql, [fingerprint.digest]).fetchone()[0])

    def remove_leaf(self, key: str) -> bool:
        """Remove a segment without children and the prefixes that end in it.

        Return whether it went: one that got children or a pin meanwhile stays.
        """
        with self.writing():
            segment_id = self.segment_id(key)
            if segment_id is None or self.num_children(segment_id):
                return False
            if self._is_pinned(segment_id):
                return False
            self._delete([segment_id])
        return True

    def remove_subtree(self, key: str) -> list[str]:
        """Remove a segment with all that hangs on it; return the keys."""
        with self.writing():
            tree = self.subtree(key)
            self._delete(tree)
        return list(tree.values())

    def _delete(self, segment_ids: Iterable[int]) -> None:
        for segment_id in segment_ids:
            self._execute("DELETE FROM blocks WHERE segment_id = ?", [segment_id])
            self._execute("DELETE FROM prefixes WHERE segment_id = ?", [segment_id])
            self._execute("DELETE FROM segments WHERE id = ?", [segment_id])

    def num_children(self, segment_id: int) -> int:
        """Return how many segments hang on a segment."""
        sql = "SELECT count(*) FROM segments WHERE parent_id = ?"
        return _int(self._execute(sql, [segment_id]).fetchone()[0])

    def _is_pinned(self, segment_id: int) -> bool:
        sql = """
            SELECT count(*) FROM prefixes
            WHERE segment_id = ? AND name IS NOT NULL
        """
        return bool(self._execute(sql, [segment_id]).fetchone()[0])


def _create_tables(connection: sqlite3.Connection) -> None:
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


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sqlite3.OperationalError, sqlite3.ProgrammingError) as error:
        # The latter after `close`.
        raise StoreError(f"the index cannot be used ({error})") from error
    except (sqlite3.DatabaseError, ArithmeticError, TypeError, ValueError) as error:
        # The others come from values that no promptcache has written.
        raise DamagedIndexError(
            f"the index is damaged ({error}), run `promptcache verify`"
        ) from error
    except sqlite3.Error as error:
        raise StoreError(f"the index cannot be used ({error})") from error


def _open(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{_quoted(path)}?{options}",
        uri=True,
        timeout=TIMEOUT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Turn WAL on, waiting for others: SQLite does not wait for this by itself."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _quoted(path: Path) -> str:
    return (
        str(path.absolute()).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    )


def _prefix(
    key: str,
    name: str | None,
    model: str,
    num_tokens: int,
    created_at: float,
    used_at: float,
    hits: int,
) -> Prefix:
    return Prefix(key, name, model, num_tokens, 0, created_at, used_at, hits)


def _checked(
    rows: list[tuple[Any, ...]], *kinds: type | UnionType
) -> list[tuple[Any, ...]]:
    """Return rows whose values are of the kinds that were put there.

    SQLite keeps any kind of value in any column. Raises DamagedIndexError.
    """
    for row in rows:
        if not all(map(isinstance, row, kinds)):
            raise DamagedIndexError(DAMAGED)
    return rows


def _segment(row: tuple[Any, ...]) -> SegmentRow:
    [checked] = _checked([row], int, str, *[int] * 7, bytes)
    segment = SegmentRow(*checked)
    nbytes = (segment.end - segment.start) * TOKEN_NBYTES
    if segment.start < 0 or len(segment.token_ids) != nbytes:
        raise DamagedIndexError(DAMAGED)
    return segment


def _fingerprint(
    digest: str, model: str, source: str | None, parts: str
) -> Fingerprint:
    with _translated():
        bytes.fromhex(digest)
        decoded = dict(json.loads(parts))
    _checked([(digest, model, source)], str, str, str | None)
    return Fingerprint(digest, model, source, decoded)


def _origin(text: str | None) -> Origin | None:
    if text is None:
        return None
    try:
        fields = json.loads(text)
        tools = tuple((name, digest) for name, digest in fields.pop("tools"))
        return Origin(**fields, tools=tools)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        raise DamagedIndexError(DAMAGED) from None


def _day(now: float) -> str:
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def _int(value: object) -> int:
    with _translated():
        if not isinstance(value, int):
            raise TypeError(f"{type(value).__name__} in place of a number")
    return value
