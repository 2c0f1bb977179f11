"""Eviction: which segments go, decided on plain values.

Only leaves go, the one unused for the longest time first, as in SGLang's radix
cache: a parent becomes a leaf once its last child went. Of those that were used at the
same moment the deepest goes first: a prefix that many share is used as often as they
are. Rows that no run can resume from, because their checkpoints went, go before all
others.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from promptcache.errors import DamagedIndexError
from promptcache.segments.types import Priority
from promptcache.store.index import ROOT_ID
from promptcache.store.index.rows import CheckpointRow, SegmentNode
from promptcache.store.reports import Prefix

# Rows that were stored later may be about to get their checkpoint.
UNFINISHED_SECONDS = 60.0
# Of checkpoints closer to the last one than this, one is enough.
CHECKPOINT_SPACING = 64
CHECKPOINTS_BESIDE = 2


def plan_eviction(
    segments: Collection[SegmentNode],
    *,
    nbytes: int | None = None,
    may_go: Callable[[SegmentNode], bool] = lambda _: True,
    now: float = math.inf,
) -> list[SegmentNode]:
    """Return the segments to evict, each after all its children.

    Args:
        segments: All segments of the store. What is pinned stays, with its ancestors.
        nbytes: Stop when this number of bytes is evicted; None: never.
        may_go: Whether a segment may be evicted at all.
        now: Unix time.
    """

    def rank(segment: SegmentNode) -> tuple[bool, float, int, int]:
        # Only whole leaves without a checkpoint: a split costs more.
        is_rows = segment.cut_at is None and not segment.is_checkpoint
        is_old = segment.used_at < now - UNFINISHED_SECONDS
        is_stranded = segment.needs_checkpoint and is_rows and is_old
        return not is_stranded, segment.used_at, -segment.start, segment.id

    by_id = {segment.id: segment for segment in segments}
    pinned = _pinned_with_ancestors(by_id)
    num_children = Counter(segment.parent_id for segment in segments)
    heap = [rank(s) for s in segments if not num_children[s.id]]
    heapq.heapify(heap)
    evicted: list[SegmentNode] = []
    while heap and (nbytes is None or nbytes > 0):
        segment = by_id[heapq.heappop(heap)[-1]]
        if segment.id in pinned or not may_go(segment):
            continue
        evicted.append(segment)
        nbytes = None if nbytes is None else nbytes - segment.nbytes
        num_children[segment.parent_id] -= 1
        if segment.parent_id in by_id and not num_children[segment.parent_id]:
            heapq.heappush(heap, rank(by_id[segment.parent_id]))
    return evicted


def _pinned_with_ancestors(by_id: dict[int, SegmentNode]) -> set[int]:
    ids: set[int] = set()
    for segment in by_id.values():
        current = segment.id if segment.pinned else ROOT_ID
        while current in by_id and current not in ids:
            ids.add(current)
            current = by_id[current].parent_id
    return ids


def pinned_nbytes(segments: Collection[SegmentNode]) -> int:
    """Return the size of what is pinned, with its ancestors."""
    by_id = {segment.id: segment for segment in segments}
    return sum(by_id[id_].nbytes for id_ in _pinned_with_ancestors(by_id))


def surplus_checkpoints(
    on_way: Sequence[CheckpointRow],
    beside: Sequence[CheckpointRow] = (),
    *,
    next_turn: int | None = None,
) -> list[CheckpointRow]:
    """Return which checkpoints to give up once a new one is there.

    These stay: what was built; the first boundary, which is the end of the system
    prompt, where most prompts part; the last checkpoint before the next turn parts, or
    the last boundary while that is still to come. Of the others at a distance of
    `[2**i, 2**(i + 1))` tokens before the new one, one stays, so that their number
    grows with the logarithm of the length: the end of a prompt rather than a boundary,
    a boundary rather than a plain step, and the first of equals.

    Of those beside the way the last ones stay, of two kinds: where the next turns of
    other conversations part, and what remains of earlier turns whose thinking was
    dropped.

    Args:
        on_way: The checkpoints on the way to the new one, which is the last, in order.
        beside: Others of the same segments, in order.
        next_turn: Where the next turn parts from the one that is saved, if known.
    """
    *older, newest = on_way
    boundaries = [c for c in older if c.is_prefix or c.priority > Priority.STEP]
    staying = {*boundaries[:1], *boundaries[-1:]}
    if next_turn is not None and next_turn < newest.position:
        before = [c for c in older if c.position <= next_turn]
        staying = {*boundaries[:1], *before[-1:]}
    best: dict[int, CheckpointRow] = {}
    for checkpoint in older:
        distance = newest.position - checkpoint.position
        bucket = distance.bit_length() if distance >= CHECKPOINT_SPACING else 0
        rival = best.get(bucket)
        if rival is None or _rank(rival) < _rank(checkpoint):
            best[bucket] = checkpoint
    staying.update(best.values())
    surplus = [c for c in older if c not in staying]
    for is_answer in (True, False):
        alike = [c for c in beside if (c.priority is Priority.ANSWER) is is_answer]
        surplus += alike[:-CHECKPOINTS_BESIDE]
    return [c for c in surplus if c.priority < Priority.BUILT]


def _rank(checkpoint: CheckpointRow) -> tuple[bool, Priority]:
    return checkpoint.is_prefix, checkpoint.priority


class PrefixTree:
    """The stretches of segments and the prefixes that end there: who needs whom."""

    def __init__(
        self, leaves: Iterable[SegmentNode], prefixes: Iterable[tuple[Prefix, int]]
    ) -> None:
        self._by_id = {leaf.id: leaf for leaf in leaves}
        self._by_place = {(s.segment_id, s.end): s.id for s in self._by_id.values()}
        # A segment that cannot be split has only one.
        self._by_segment = {s.segment_id: s.id for s in self._by_id.values()}
        self._needed_by: dict[int, set[str | int]] = {}
        for prefix, segment_id in prefixes:
            self._need(prefix.key, self._leaf_id(prefix, segment_id))
        # Such as checkpoints on the way, and what remains of rows beside it.
        self._unneeded: dict[int, list[SegmentNode]] = {}
        for leaf in self._by_id.values():
            if leaf.id not in self._needed_by:
                self._unneeded.setdefault(leaf.parent_id, []).append(leaf)

    def _leaf_id(self, prefix: Prefix, segment_id: int) -> int:
        place = (segment_id, prefix.num_tokens)
        return self._by_place.get(place, self._by_segment.get(segment_id, -segment_id))

    def _need(self, who: str | int, leaf_id: int) -> None:
        """Add who needs a stretch, and so on up to the root."""
        is_visited = False
        while leaf_id != ROOT_ID and not is_visited:
            is_visited = leaf_id in self._needed_by
            self._needed_by.setdefault(leaf_id, set()).add(who)
            leaf = self._by_id.get(leaf_id)
            who, leaf_id = leaf_id, leaf.parent_id if leaf else ROOT_ID

    def exclusive_segments(self, prefix: Prefix, segment_id: int) -> list[SegmentNode]:
        """Return the stretches that only this prefix needs, the deepest first.

        Raises DamagedIndexError if an ancestor is missing.
        """
        exclusive: list[SegmentNode] = []
        needed_by: set[str | int] = {prefix.key}
        leaf_id = self._leaf_id(prefix, segment_id)
        while leaf_id != ROOT_ID and self._needed_by[leaf_id] <= needed_by:
            leaf = self._by_id.get(leaf_id)
            if leaf is None or leaf in exclusive:
                raise DamagedIndexError(
                    "the index lacks segments, run `promptcache verify`"
                )
            exclusive += [*self._unneeded_below(leaf_id), leaf]
            needed_by = {leaf_id}
            leaf_id = leaf.parent_id
        return exclusive

    def _unneeded_below(self, leaf_id: int) -> Iterator[SegmentNode]:
        for leaf in self._unneeded.get(leaf_id, []):
            yield from self._unneeded_below(leaf.id)
            yield leaf
