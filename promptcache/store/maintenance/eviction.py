"""Eviction: which segments to give up, decided on plain values.

Only leaves go, the one unused for the longest time first, as in SGLang's radix
cache: a parent becomes a leaf once its last child went. Of those that were used at the
same moment the deepest goes first: what many go through is used as often as they are.
Before all others go rows that no run can resume from, as their checkpoints have gone.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from promptcache.errors import (
    DamagedIndexError,
)
from promptcache.segments.types import Priority
from promptcache.store.index import ROOT_ID
from promptcache.store.index.rows import CheckpointRow, SegmentNode
from promptcache.store.reports import (
    Prefix,
)

# Rows that were stored later may be about to get their checkpoint.
UNFINISHED_SECONDS = 60.0
# Of checkpoints closer to the last one than this, one is enough.
CHECKPOINT_SPACING = 64
CHECKPOINTS_BESIDE = 2


def plan_eviction(
    segments: Collection[SegmentNode],
    *,
    nbytes: int | None = None,
    protected: Iterable[int] = (),
    may_go: Callable[[SegmentNode], bool] = lambda _: True,
    now: float = math.inf,
) -> list[SegmentNode]:
    """Return the segments to evict, each after all its children.

    Args:
        segments: All segments of the store.
        nbytes: Stop when the evicted ones have so many bytes; None: take all.
        protected: Ids of segments to keep besides the pinned ones.
        may_go: Whether a segment may be evicted at all.
        now: Unix time.
    """

    def rank(segment: SegmentNode) -> tuple[bool, float, int, int]:
        # Of whole leaves only, on which no checkpoint hangs: a split costs more.
        is_rows = segment.cut_at is None and not segment.is_checkpoint
        is_old = segment.used_at < now - UNFINISHED_SECONDS
        is_stranded = segment.needs_checkpoint and is_rows and is_old
        return not is_stranded, segment.used_at, -segment.start, segment.id

    by_id = {segment.id: segment for segment in segments}
    keep = _with_ancestors(by_id, protected)
    keep |= _with_ancestors(by_id, (s.id for s in segments if s.pinned))
    num_children = Counter(segment.parent_id for segment in segments)
    heap = [rank(s) for s in segments if not num_children[s.id]]
    heapq.heapify(heap)
    evicted: list[SegmentNode] = []
    while heap and (nbytes is None or nbytes > 0):
        segment = by_id[heapq.heappop(heap)[-1]]
        if segment.id in keep or not may_go(segment):
            continue
        evicted.append(segment)
        nbytes = None if nbytes is None else nbytes - segment.nbytes
        num_children[segment.parent_id] -= 1
        if segment.parent_id in by_id and not num_children[segment.parent_id]:
            heapq.heappush(heap, rank(by_id[segment.parent_id]))
    return evicted


def surplus_checkpoints(
    on_way: Sequence[CheckpointRow],
    beside: Sequence[CheckpointRow] = (),
    *,
    next_turn: int | None = None,
) -> list[CheckpointRow]:
    """Return which checkpoints to give up once a new one is there.

    What was built stays. So does the first boundary: it is the end of the system
    prompt, where most prompts part; and the last checkpoint up to where the next turn
    parts, or the last boundary while that is still to come. Of the others at a
    distance of `[2**i, 2**(i + 1))` tokens before the new one, one stays, so that
    their number grows with the logarithm of the length: the end of a prompt rather
    than a boundary, that rather than a plain step, and the first of equals.

    Of those beside the way the last ones stay: of the places where the next turns of
    other conversations part, and of what is left of earlier turns whose thinking was
    dropped.

    Args:
        on_way: The checkpoints on the way to the new one, which is the last, in order.
        beside: Others of the same segments, in order.
        next_turn: Where the next turn parts from the one that is saved, if known.
    """
    *older, newest = on_way
    boundaries = [c for c in older if c.is_prefix or c.priority > Priority.STEP]
    kept = {*boundaries[:1], *boundaries[-1:]}
    if next_turn is not None and next_turn < newest.position:
        before = [c for c in older if c.position <= next_turn]
        kept = {*boundaries[:1], *before[-1:]}
    best: dict[int, CheckpointRow] = {}
    for checkpoint in older:
        distance = newest.position - checkpoint.position
        bucket = distance.bit_length() if distance >= CHECKPOINT_SPACING else 0
        rival = best.get(bucket)
        if rival is None or _rank(rival) < _rank(checkpoint):
            best[bucket] = checkpoint
    kept.update(best.values())
    surplus = [c for c in older if c not in kept]
    for is_answer in (True, False):
        alike = [c for c in beside if (c.priority is Priority.ANSWER) is is_answer]
        surplus += alike[:-CHECKPOINTS_BESIDE]
    return [
        checkpoint for checkpoint in surplus if checkpoint.priority < Priority.BUILT
    ]


def _rank(checkpoint: CheckpointRow) -> tuple[bool, Priority]:
    return checkpoint.is_prefix, checkpoint.priority


def _with_ancestors(by_id: dict[int, SegmentNode], ids: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for start in ids:
        current = start
        while current in by_id and current not in found:
            found.add(current)
            current = by_id[current].parent_id
    return found


class PrefixTree:
    """The stretches of segments and the prefixes that end there: who needs whom."""

    def __init__(
        self, leaves: Iterable[SegmentNode], prefixes: Iterable[tuple[Prefix, int]]
    ) -> None:
        """Take all stretches, and all prefixes with their segments' ids."""
        self._by_id = {leaf.id: leaf for leaf in leaves}
        self._by_place = {(s.segment_id, s.end): s.id for s in self._by_id.values()}
        # Of a segment that cannot be split, its only one.
        self._by_segment = {s.segment_id: s.id for s in self._by_id.values()}
        self._needed_by: dict[int, set[str | int]] = {}
        for prefix, segment_id in prefixes:
            self._need(prefix.key, self._leaf_id(prefix, segment_id))
        # Such as checkpoints on the way, and what is left of rows beside it.
        self._loose: dict[int, list[SegmentNode]] = {}
        for leaf in self._by_id.values():
            if leaf.id not in self._needed_by:
                self._loose.setdefault(leaf.parent_id, []).append(leaf)

    def _leaf_id(self, prefix: Prefix, segment_id: int) -> int:
        place = (segment_id, prefix.num_tokens)
        return self._by_place.get(place, self._by_segment.get(segment_id, -segment_id))

    def _need(self, who: str | int, leaf_id: int) -> None:
        """Note who needs a stretch, and so on up to the root."""
        is_known = False
        while leaf_id != ROOT_ID and not is_known:
            is_known = leaf_id in self._needed_by
            self._needed_by.setdefault(leaf_id, set()).add(who)
            leaf = self._by_id.get(leaf_id)
            who, leaf_id = leaf_id, leaf.parent_id if leaf else ROOT_ID

    def freed(self, prefix: Prefix, segment_id: int) -> list[SegmentNode]:
        """Return the stretches that only this prefix needs, the deepest first.

        Raises DamagedIndexError if an ancestor is not there.
        """
        freed: list[SegmentNode] = []
        needed_by: set[str | int] = {prefix.key}
        leaf_id = self._leaf_id(prefix, segment_id)
        while leaf_id != ROOT_ID and self._needed_by[leaf_id] <= needed_by:
            leaf = self._by_id.get(leaf_id)
            if leaf is None or leaf in freed:
                raise DamagedIndexError(
                    "the index lacks segments, run `promptcache verify`"
                )
            freed += [*self._without_need(leaf_id), leaf]
            needed_by = {leaf_id}
            leaf_id = leaf.parent_id
        return freed

    def _without_need(self, leaf_id: int) -> Iterator[SegmentNode]:
        """Yield what hangs on a stretch and nobody needs, the deepest first."""
        for leaf in self._loose.get(leaf_id, []):
            yield from self._without_need(leaf.id)
            yield leaf
