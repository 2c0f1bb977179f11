"""The index: which segments the store has, and what it knows of them.

It is derived from the blobs and can be rebuilt from them. Segments form a radix
tree: `parent_id` 0 is the root, and a child starts anywhere inside its parent.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from promptcache.errors import DamagedIndexError, StoreError
from promptcache.locks import Patience
from promptcache.segments.chain import TOKEN_NBYTES, Chain
from promptcache.segments.types import Priority, SegmentInfo
from promptcache.store.index.clock import Clock
from promptcache.store.index.connection import DAMAGED
from promptcache.store.index.database import Database, Opener, within
from promptcache.store.index.events import History
from promptcache.store.index.fingerprints import Fingerprints
from promptcache.store.index.prefixes import Prefixes
from promptcache.store.index.rows import (
    CheckpointRow,
    HeldEnd,
    HeldSegment,
    SegmentNode,
    SegmentRow,
)
from promptcache.store.index.schema import NO_TOKEN
from promptcache.store.index.stretches import leaves_of
from promptcache.store.index.uses import Uses

ROOT_ID = 0
SEGMENT_COLUMNS = (
    "id, key, parent_id, start, end, nbytes, sliceable, extendable, needs_checkpoint, "
    "token_ids"
)


class _Node(NamedTuple):
    id: int
    key: str


class Index:
    """The rows of one store.

    Attributes:
        database: The file and its transactions, which all of these share.
        fingerprints: What segments were computed under.
        prefixes: What was built or saved.
        uses: Up to where segments were used when.
        clock: What time it is.
        history: What happened to it.

    Invariants:
        A segment's parent exists as long as the segment does.
    """

    def __init__(
        self,
        path: Path,
        *,
        populate: Callable[["Index"], object] = lambda index: None,
        opener: Opener | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Open the index, creating it where there is none.

        Args:
            path: The database.
            populate: Called with a new index before anybody else sees it.
            opener: Called to open the database, see `Database`.
            patience: How long to wait for other processes.

        Raises:
            StoreFormatError: A newer promptcache wrote it.
            DamagedIndexError: It is no database.
            StoreError: It cannot be opened.
        """
        self.database = Database(path, opener, patience)
        self.fingerprints = Fingerprints(self.database)
        self.prefixes = Prefixes(self.database)
        self.uses = Uses(self.database)
        self.clock = Clock(self.database)
        self.history = History(self.database, self.fingerprints)
        self.database.open(lambda: populate(self))

    # Looking things up

    def has_block(self, block_hash: int) -> bool:
        """Return whether some segment covers the block boundary of this hash."""
        sql = "SELECT 1 FROM blocks WHERE hash = ? LIMIT 1"
        return self.database.exists(sql, [block_hash])

    def segments_at_block(self, block_hash: int, fingerprint: str) -> list[int]:
        """Return the ids of the segments that cover the boundary of this hash."""
        sql = """
            SELECT segment_id FROM blocks JOIN segments s ON s.id = segment_id
            JOIN fingerprints f ON f.id = +s.fingerprint_id -- not all of a model's
            WHERE hash = ? AND f.digest = ?
        """
        return self.database.column(int, sql, [block_hash, fingerprint])

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
        path = self._segments(sql, [segment_id])
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
        return self._segments(sql, [*pairs, parent_id, fingerprint])

    def _segments(self, sql: str, parameters: Sequence[object]) -> list[SegmentRow]:
        rows = self.database.select(SegmentRow, sql, parameters)
        for row in rows:
            nbytes = (row.end - row.start) * TOKEN_NBYTES
            if row.start < 0 or len(row.token_ids) != nbytes:
                raise DamagedIndexError(DAMAGED)
        return rows

    def checkpoints(self, parent_ids: Iterable[int]) -> list[CheckpointRow]:
        """Return the checkpoints that hang on given segments."""
        ids = list(parent_ids)
        marks = ", ".join("?" for _ in ids)
        sql = f"""
            SELECT key, parent_id, start AS position, extendable, has_logits, priority,
                id IN (SELECT segment_id FROM prefixes) AS is_prefix
            FROM segments WHERE parent_id IN ({marks}) AND first_token = ?
        """
        return self.database.select(CheckpointRow, sql, [*ids, NO_TOKEN])

    def segment_id(self, key: str) -> int | None:
        """Return the id of a segment, or None."""
        sql = "SELECT id FROM segments WHERE key = ?"
        return next(iter(self.database.column(int, sql, [key])), None)

    def has_segment(self, key: str, start: int, end: int) -> bool:
        """Return whether there is a segment with a key and a range."""
        sql = "SELECT 1 FROM segments WHERE key = ? AND start = ? AND end = ?"
        return self.database.exists(sql, [key, start, end])

    def nbytes_of(self, keys: Sequence[str]) -> int:
        """Return the size of the blobs of some segments."""
        marks = ", ".join("?" for _ in keys)
        sql = f"SELECT coalesce(sum(nbytes), 0) FROM segments WHERE key IN ({marks})"
        return sum(self.database.column(int, sql, keys))

    def segment_keys(self) -> set[str]:
        """Return the keys of all segments."""
        return set(self.database.column(str, "SELECT key FROM segments"))

    def leaves(
        self,
        namespace: str | None = None,
        *,
        protect: Mapping[str, int] | None = None,
    ) -> list[SegmentNode]:
        """Return the segments of a namespace, or all, as eviction sees them.

        Args:
            namespace: The namespace.
            protect: Keys of segments that are to count as pinned, and up to which
                position.
        """
        with self.database.reading():
            segments, ends = self._held(namespace), self.prefixes.ends(namespace)
            positions = protect or {}
            ends += [
                HeldEnd(segment.id, positions[segment.key], True)
                for segment in segments
                if segment.key in positions
            ]
            return leaves_of(segments, ends, self.uses.all(namespace))

    def _held(self, namespace: str | None) -> list[HeldSegment]:
        condition, values = within(namespace, "f")
        sql = f"""
            SELECT s.id, s.key, s.parent_id, s.start, s.end, s.nbytes, s.token_nbytes,
                s.created_at, s.used_at, f.model, s.first_token = ? AS is_checkpoint,
                s.needs_checkpoint
            FROM segments s JOIN fingerprints f ON f.id = s.fingerprint_id
            WHERE {condition}
        """
        return self.database.select(HeldSegment, sql, [NO_TOKEN, *values])

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
        return dict(self.database.select(_Node, sql, [key]))

    def is_sound(self) -> bool:
        """Return whether SQLite finds its file sound, and so do those who read it."""
        read = (self.leaves, self.prefixes.all)
        read_history = (self.history.usage, self.history.written)
        sql = "SELECT namespace FROM fingerprints UNION SELECT namespace FROM prefixes"
        try:
            for act in (*read, *read_history):
                act()
            for namespace in self.database.column(str, sql):
                self.prefixes.prompts(namespace)
                for fingerprint in self.fingerprints.of_namespace(namespace):
                    list(self.history.evictions(fingerprint.digest))
        except StoreError:
            return False
        sql = "SELECT 1 FROM blocks WHERE segment_id NOT IN (SELECT id FROM segments)"
        return self.database.is_sound() and not self.database.exists(sql)

    def agrees(
        self, segment_id: int, info: SegmentInfo, chain: Chain, *, nbytes: int
    ) -> bool:
        """Return whether a row is the one that `add_segment` would add."""
        sql = """
            SELECT digest, namespace, start, end, first_token, nbytes, sliceable,
                extendable, needs_checkpoint, has_logits, priority, token_ids
            FROM segments JOIN fingerprints f ON f.id = fingerprint_id
            WHERE segments.id = ?
        """
        first_token = NO_TOKEN if info.is_checkpoint else chain.token_id(info.start)
        span = chain.span(info.start, info.end)
        wanted = (
            *(info.fingerprint.digest, info.fingerprint.namespace),
            *(info.start, info.end, first_token, nbytes),
            *(*info.resumption, info.priority, span),
        )
        blocks = "SELECT hash FROM blocks WHERE segment_id = ?"
        hashes = set(self.database.column(int, blocks, [segment_id]))
        return self.database.execute(sql, [segment_id]).fetchall() == [
            wanted
        ] and hashes == set(chain.block_hashes(info.start, info.end))

    # Adding, using and removing segments

    def touch(
        self, segment_keys: Sequence[str], cached_tokens: int, *, now: float
    ) -> str | None:
        """Note a hit on a path of segments that reused so many tokens.

        It counts for the longest prefix that was reused in full, else for the
        shortest one that was reused in part; return its key, if there is one.
        """
        marks = ", ".join("?" for _ in segment_keys)
        with self.database.writing():
            self.database.execute(
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
            return next(iter(self.database.column(str, sql, hit)), None)

    def touch_passed(self, way: Sequence[tuple[str, int]], *, now: float) -> None:
        """Note that prompts go on through checkpoints, past which they are resumed.

        Those are what was built or listed, and the first boundary, where conversations
        part. Others on the way are of use to their own conversation only.

        Args:
            way: The keys of segments, and up to where each is followed.
            now: Unix time.
        """
        marks = ", ".join("(?, ?)" for _ in way)
        sql = f"""
            WITH way(key, stop) AS (VALUES {marks}),
            passed AS (
                SELECT c.id, c.start, c.priority,
                    c.id IN (SELECT segment_id FROM prefixes) AS is_prefix
                FROM way JOIN segments s USING (key)
                JOIN segments c ON c.parent_id = s.id
                WHERE c.first_token = ? AND c.start <= way.stop
            )
            UPDATE segments SET used_at = ? WHERE id IN (
                SELECT id FROM passed WHERE is_prefix OR priority = ?
                UNION SELECT * FROM (
                    SELECT id FROM passed WHERE priority > ? ORDER BY start LIMIT 1
                )
            )
        """
        ends = [value for pair in way for value in pair]
        with self.database.writing():
            self.database.execute(
                sql, [*ends, NO_TOKEN, now, Priority.BUILT, Priority.STEP]
            )

    def add_segment(
        self,
        info: SegmentInfo,
        chain: Chain,
        *,
        parent_key: str | None,
        nbytes: int,
        token_nbytes: int = 0,
        created_at: float | None = None,
    ) -> None:
        """Add a segment of a chain whose blob and parent are in place.

        Args:
            info: The segment.
            chain: Its tokens, and those before.
            parent_key: The segment that it goes on from, None for a root.
            nbytes: The size of its blob.
            token_nbytes: What each of its tokens takes, 0 if it cannot be split.
            created_at: Unix time, if it is not new.
        """
        with self.database.writing():
            now = self.clock.now()
            created_at = now if created_at is None else min(created_at, now)
            parent_id = self.segment_id(parent_key) if parent_key else ROOT_ID
            assert parent_id is not None
            cursor = self.database.execute(
                """
                INSERT INTO segments (key, parent_id, fingerprint_id, start, end,
                    first_token, nbytes, token_nbytes, created_at, used_at, sliceable,
                    extendable, needs_checkpoint, has_logits, priority, token_ids)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
                """,
                [
                    info.key,
                    parent_id,
                    self.fingerprints.add(info.fingerprint),
                    info.start,
                    info.end,
                    NO_TOKEN if info.is_checkpoint else chain.token_id(info.start),
                    nbytes,
                    token_nbytes,
                    created_at,
                    created_at,
                    *info.resumption,
                    info.priority,
                    chain.span(info.start, info.end),
                ],
            )
            segment_id = cursor.lastrowid
            assert segment_id is not None
            self._add_blocks(segment_id, chain, info.start, info.end)
            if info.is_prefix:
                key = chain.key_at(info.end)
                self.prefixes.add(key, segment_id, info.end, now=created_at)

    def _add_blocks(self, segment_id: int, chain: Chain, start: int, end: int) -> None:
        self.database.execute_many(
            "INSERT INTO blocks (hash, segment_id) VALUES (?, ?)",
            [(hash_, segment_id) for hash_ in chain.block_hashes(start, end)],
        )

    def can_cut(self, key: str, head: SegmentInfo) -> bool:
        """Return whether nothing hangs on a segment after the end of its head."""
        sql = """
            SELECT 1 FROM segments s WHERE s.key = ? AND s.start = ? AND s.end > ?3
            AND NOT EXISTS (
                SELECT 1 FROM segments c WHERE c.parent_id = s.id AND c.start > ?3
            ) AND NOT EXISTS (
                SELECT 1 FROM prefixes p WHERE p.segment_id = s.id
                AND p.num_tokens > ?3 AND p.name IS NOT NULL
            )
        """
        is_free = self.database.exists(sql, [key, head.start, head.end])
        return is_free and self.segment_id(head.key) is None

    def cut(self, key: str, head: SegmentInfo, chain: Chain, *, nbytes: int) -> None:
        """Let a segment end where its head does, whose blob is in place.

        The prefixes that end after that go. Nothing else may hang there.
        """
        with self.database.writing():
            segment_id, end = self.segment_id(key), head.end
            assert segment_id is not None and self.can_cut(key, head)
            token_ids = chain.span(head.start, end)
            self.database.execute(
                "UPDATE segments SET key = ?, end = ?, nbytes = ?, token_ids = ?"
                " WHERE id = ?",
                [head.key, end, nbytes, token_ids, segment_id],
            )
            self.database.execute(
                "DELETE FROM prefixes WHERE segment_id = ? AND num_tokens > ?",
                [segment_id, end],
            )
            self.database.execute(
                "DELETE FROM blocks WHERE segment_id = ?", [segment_id]
            )
            self._add_blocks(segment_id, chain, head.start, end)
            self.uses.cut(segment_id, end)

    def remove_leaf(self, key: str) -> bool:
        """Remove a segment without children and the prefixes that end in it.

        Return whether it went: one that got children or a pin meanwhile stays.
        """
        with self.database.writing():
            segment_id = self.segment_id(key)
            if segment_id is None or self.num_children(segment_id):
                return False
            if self._is_pinned(segment_id):
                return False
            self._delete([segment_id])
        return True

    def remove_subtree(self, key: str) -> list[str]:
        """Remove a segment with all that hangs on it; return the keys."""
        with self.database.writing():
            tree = self.subtree(key)
            self._delete(tree)
        return list(tree.values())

    def _delete(self, segment_ids: Iterable[int]) -> None:
        for segment_id in segment_ids:
            for table in ("blocks", "uses", "prefixes"):
                self.database.execute(
                    f"DELETE FROM {table} WHERE segment_id = ?", [segment_id]
                )
            self.database.execute("DELETE FROM segments WHERE id = ?", [segment_id])

    def num_children(self, segment_id: int) -> int:
        """Return how many segments hang on a segment."""
        sql = "SELECT count(*) FROM segments WHERE parent_id = ?"
        return sum(self.database.column(int, sql, [segment_id]))

    def _is_pinned(self, segment_id: int) -> bool:
        sql = "SELECT 1 FROM prefixes WHERE segment_id = ? AND name IS NOT NULL"
        return self.database.exists(sql, [segment_id])
