"""The segments: which ones the index has, and how they continue one another.

They form a radix tree: `parent_id` 0 is the root, and a child starts anywhere inside
its parent.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from promptcache.errors import DamagedIndexError
from promptcache.segments.chain import TOKEN_NBYTES, Chain
from promptcache.segments.types import SegmentInfo
from promptcache.store.index.connection import DAMAGED
from promptcache.store.index.database import Database
from promptcache.store.index.rows import CheckpointRow, HeldSegment, SegmentRow
from promptcache.store.index.schema import NO_TOKEN, within

ROOT_ID = 0
SEGMENT_COLUMNS = (
    "id, key, parent_id, start, end, nbytes, sliceable, needs_checkpoint, token_ids"
)


class _Node(NamedTuple):
    id: int
    key: str


class SegmentTree:
    """The rows of segments, read only."""

    def __init__(self, database: Database) -> None:
        self.database = database

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
        """Return the checkpoints that are children of given segments."""
        ids = list(parent_ids)
        marks = ", ".join("?" for _ in ids)
        sql = f"""
            SELECT key, parent_id, start AS position, priority,
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

    def held(self, namespace: str | None) -> list[HeldSegment]:
        """Return the segments of a namespace, or all, without their tokens."""
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
        """Return a segment and its descendants: keys by ids."""
        sql = """
            WITH RECURSIVE tree(id) AS (
                SELECT id FROM segments WHERE key = ?
                UNION
                SELECT s.id FROM segments s JOIN tree ON s.parent_id = tree.id
            )
            SELECT id, key FROM segments JOIN tree USING (id)
        """
        return dict(self.database.select(_Node, sql, [key]))

    def agrees(
        self, segment_id: int, info: SegmentInfo, chain: Chain, *, nbytes: int
    ) -> bool:
        """Return whether a row is the one that `add_segment` would add."""
        sql = """
            SELECT digest, namespace, start, end, first_token, nbytes, sliceable,
                needs_checkpoint, priority, token_ids
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
