"""The index: segments are added, used, cut and removed, and prefixes with them.

It is derived from the blobs and can be rebuilt from them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from promptcache.errors import StoreError
from promptcache.locks import Patience
from promptcache.segments.chain import Chain
from promptcache.segments.types import Priority, SegmentInfo
from promptcache.store.index.clock import Clock, Uses
from promptcache.store.index.connection import Opener
from promptcache.store.index.database import Database
from promptcache.store.index.events import DEEDS, History
from promptcache.store.index.fingerprints import Fingerprints
from promptcache.store.index.prefixes import Prefixes
from promptcache.store.index.rows import HeldEnd, SegmentNode
from promptcache.store.index.schema import NO_TOKEN
from promptcache.store.index.segments import ROOT_ID, SegmentTree, leaves_of
from promptcache.units import MAX_SECONDS


class Index(SegmentTree):
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
            DamagedIndexError: It is not a database.
            StoreError: It cannot be opened.
        """
        super().__init__(Database(path, opener, patience))
        self.fingerprints = Fingerprints(self.database)
        self.prefixes = Prefixes(self.database)
        self.uses = Uses(self.database)
        self.clock = Clock(self.database)
        self.history = History(self.database, self.fingerprints)
        self.database.open(lambda: populate(self))

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
            segments, ends = self.held(namespace), self.prefixes.ends(namespace)
            positions = protect or {}
            ends += [
                HeldEnd(segment.id, positions[segment.key], True)
                for segment in segments
                if segment.key in positions
            ]
            return leaves_of(segments, ends, self.uses.all(namespace))

    def is_sound(self) -> bool:
        """Return whether SQLite finds its file sound, and so do those who read it."""
        reads = (self.leaves, self.prefixes.all, self.clock.time)
        history_reads = (self.history.usage, self.history.written)
        sql = "SELECT namespace FROM fingerprints UNION SELECT namespace FROM prefixes"
        try:
            for act in (*reads, *history_reads):
                act()
            for namespace in self.database.column(str, sql):
                self.prefixes.prompts(namespace)
                for fingerprint in self.fingerprints.of_namespace(namespace):
                    list(self.history.evictions(fingerprint.digest))
                    for deed in DEEDS:
                        self.history.speed(fingerprint.digest, deed, now=MAX_SECONDS)
        except StoreError:
            return False
        sql = "SELECT 1 FROM blocks WHERE segment_id NOT IN (SELECT id FROM segments)"
        return self.database.is_sound() and not self.database.exists(sql)

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
            row = {
                "key": info.key,
                "parent_id": parent_id,
                "fingerprint_id": self.fingerprints.add(info.fingerprint),
                "start": info.start,
                "end": info.end,
                "first_token": (
                    NO_TOKEN if info.is_checkpoint else chain.token_id(info.start)
                ),
                "nbytes": nbytes,
                "token_nbytes": token_nbytes,
                "created_at": created_at,
                "used_at": created_at,
                **info.resumption._asdict(),
                "priority": info.priority,
                "token_ids": chain.span(info.start, info.end),
            }
            segment_id = self.database.insert("segments", row)
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
        """Return whether a segment has no child or pin after the end of its head."""
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
        """End a segment where its head does, whose blob is in place.

        The prefixes that end after that are removed. See `can_cut`.
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
        """Remove a segment with its descendants; return the keys."""
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
        """Return how many children a segment has."""
        sql = "SELECT count(*) FROM segments WHERE parent_id = ?"
        return sum(self.database.column(int, sql, [segment_id]))

    def _is_pinned(self, segment_id: int) -> bool:
        sql = "SELECT 1 FROM prefixes WHERE segment_id = ? AND name IS NOT NULL"
        return self.database.exists(sql, [segment_id])
