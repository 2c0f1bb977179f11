"""Eviction: which segments to give up, decided on plain values.

Only leaves go, the one unused for the longest time first, as in SGLang's radix
cache: a parent becomes a leaf once its last child went.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable

from promptcache.types import Leaf


def plan_eviction(
    segments: Collection[Leaf],
    *,
    nbytes: int | None = None,
    protected: Iterable[int] = (),
    may_go: Callable[[Leaf], bool] = lambda _: True,
) -> list[Leaf]:
    """Return the segments to evict, each after all its children.

    Args:
        segments: All segments of the store.
        nbytes: Stop when the evicted ones have so many bytes; None: take all.
        protected: Ids of segments to keep besides the pinned ones.
        may_go: Whether a segment may be evicted at all.
    """
    by_id = {segment.id: segment for segment in segments}
    keep = _with_ancestors(by_id, protected)
    keep |= _with_ancestors(by_id, (s.id for s in segments if s.pinned))
    num_children = Counter(segment.parent_id for segment in segments)
    heap = [(s.used_at, s.id) for s in segments if not num_children[s.id]]
    heapq.heapify(heap)
    evicted: list[Leaf] = []
    while heap and (nbytes is None or nbytes > 0):
        segment = by_id[heapq.heappop(heap)[1]]
        if segment.id in keep or not may_go(segment):
            continue
        evicted.append(segment)
        nbytes = None if nbytes is None else nbytes - segment.nbytes
        num_children[segment.parent_id] -= 1
        if segment.parent_id in by_id and not num_children[segment.parent_id]:
            heapq.heappush(heap, (by_id[segment.parent_id].used_at, segment.parent_id))
    return evicted


def _with_ancestors(by_id: dict[int, Leaf], ids: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for start in ids:
        current = start
        while current in by_id and current not in found:
            found.add(current)
            current = by_id[current].parent_id
    return found
