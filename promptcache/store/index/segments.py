"""The segments: which ones the index has, and how they continue one another.

They form a radix tree: `parent_id` 0 is the root, and a child starts anywhere inside
its parent.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from promptcache.errors import DamagedIndexError
from promptcache.segments.chain import TOKEN_NBYTES, Chain
from promptcache.segments.types import SegmentInfo
from promptcache.store.index.connection import DAMAGED
from promptcache.store.index.database import Database
from promptcache.store.index.rows import (
    CheckpointRow,
    HeldEnd,
    HeldSegment,
    SegmentNode,
    SegmentRow,
    Use,
)
from promptcache.store.index.schema import NO_TOKEN, within

ROOT_ID = 0
Places = Mapping[int, Sequence[int]]
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
        places = ", ".join("(?, ?)" for _ in token_id_by_start)
        sql = f"""
            WITH wanted(start, first_token) AS (VALUES {places})
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
        condition = (
            *(info.fingerprint.digest, info.fingerprint.namespace),
            *(info.start, info.end, first_token, nbytes),
            *(*info.resumption, info.priority, span),
        )
        blocks = "SELECT hash FROM blocks WHERE segment_id = ?"
        hashes = set(self.database.column(int, blocks, [segment_id]))
        return self.database.execute(sql, [segment_id]).fetchall() == [
            condition
        ] and hashes == set(chain.block_hashes(info.start, info.end))


def leaves_of(
    segments: Sequence[HeldSegment], ends: Sequence[HeldEnd], uses: Iterable[Use]
) -> list[SegmentNode]:
    """Return the stretches of segments: divided where others continue them.

    A stretch ends where children or listed prefixes do, or the segment itself. It goes
    when nothing continues it any more: the segment is split there, and its head stays.

    Args:
        segments: All segments of the store.
        ends: Where the listed prefixes end.
        uses: Up to where segments were used when.
    """
    places = _places(segments, ends)
    order = ((segment_id, end) for segment_id in places for end in places[segment_id])
    ids = {place: i for i, place in enumerate(order, start=1)}

    def stretch_at(segment_id: int, position: int) -> int:
        """Return the id of the stretch that ends at a position, or holds it."""
        if segment_id not in places:
            # A damaged index names what is not there.
            return -segment_id
        stops = places[segment_id]
        return ids[segment_id, stops[min(bisect_left(stops, position), len(stops) - 1)]]

    used_by_id: dict[int, list[Use]] = defaultdict(list)
    for use in uses:
        used_by_id[use.segment_id].append(use)
    pinned = {stretch_at(e.segment_id, e.position) for e in ends if e.pinned}
    nodes = []
    for segment in segments:
        parent_id = stretch_at(segment.parent_id, segment.start)
        for start, end in pairwise([segment.start, *places[segment.id]]):
            id_ = ids[segment.id, end]
            used_at = _used_at(segment, start, used_by_id[segment.id])
            node = _node(segment, start, end, id_, parent_id, used_at, id_ in pinned)
            nodes.append(node)
            parent_id = id_
    return nodes


def _node(
    segment: HeldSegment,
    start: int,
    end: int,
    id_: int,
    parent_id: int,
    used_at: float,
    pinned: bool,
) -> SegmentNode:
    # By position: it is made for every segment of a store.
    return SegmentNode(
        id_,
        segment.key,
        parent_id,
        _nbytes(segment, start, end),
        used_at,
        pinned,
        segment.model,
        segment.is_checkpoint,
        start,
        end,
        segment.id,
        start if start > segment.start else None,
        segment.needs_checkpoint,
    )


def _places(segments: Sequence[HeldSegment], ends: Iterable[HeldEnd]) -> Places:
    """Return where the stretches of each segment end, in order."""
    places = {segment.id: {segment.end} for segment in segments}
    sliceable = {s.id: range(s.start + 1, s.end) for s in segments if _is_divisible(s)}
    forks = ((segment.parent_id, segment.start) for segment in segments)
    stops = ((end.segment_id, end.position) for end in ends)
    for segment_id, position in (*forks, *stops):
        if position in sliceable.get(segment_id, ()):
            places[segment_id].add(position)
    return {id_: sorted(positions) for id_, positions in places.items()}


def _is_divisible(segment: HeldSegment) -> bool:
    rows_nbytes = segment.token_nbytes * (segment.end - segment.start)
    return 0 < rows_nbytes <= segment.nbytes


def _nbytes(segment: HeldSegment, start: int, end: int) -> int:
    """Return what is freed once all that is after a stretch has gone."""
    if start > segment.start:
        return (end - start) * segment.token_nbytes
    return segment.nbytes - (segment.end - end) * segment.token_nbytes


def _used_at(segment: HeldSegment, start: int, uses: Iterable[Use]) -> float:
    """Return when more of a segment than what is before a position was used."""
    if segment.is_checkpoint or not _is_divisible(segment):
        return segment.used_at
    used_at = (use.used_at for use in uses if use.position > start)
    return max([segment.created_at, *used_at])
