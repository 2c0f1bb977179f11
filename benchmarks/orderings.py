"""Orderings: which leaves of a store could go first."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from promptcache.store.index.rows import SegmentNode

# At this position a token of Qwen3-8B costs twice as much as the first: its attention
# then takes as many operations (4 × 36 layers × 32 heads × 128 each) as its 8.2 billion
# weights (2 each).
ATTENTION_DEPTH = 28_000


@dataclass(slots=True)
class Past:
    """What is known of a segment; times are numbers of requests.

    Attributes:
        start: First token of its range.
        end: The token after the last.
        asked_at: The requests that go on into it, also those to come.
        created_at: When it was saved.
        used_at: When it was used last.
        used_before: When it was used last before that, -1 if never.
        num_uses: How often it was saved or reused.
        floor: What the best segment ranked that had gone when it was used last.
    """

    start: int
    end: int
    asked_at: Sequence[int]
    created_at: int
    used_at: int
    used_before: int = -1
    num_uses: int = 1
    floor: float = 0.0

    def note_use(self, now: int, floor: float) -> None:
        """Note that it was reused."""
        self.used_before, self.used_at = self.used_at, now
        self.num_uses += 1
        self.floor = floor


# Ranks a segment at a time; of all leaves the one with the least rank goes first.
Ordering = Callable[[SegmentNode, Past, int], float]
# More than there are requests: weighs the first of two criteria.
FIRST = 1e9


def lru(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by the last use, as the store does."""
    return leaf.used_at


def fifo(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by age."""
    return past.created_at


def lfu(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by the number of uses, then by the last."""
    return past.num_uses * FIRST + past.used_at


def lru_2(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by the last use but one (O'Neil et al., 1993), then by the last."""
    return past.used_before * FIRST + past.used_at


def twice(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by the last use, but those never reused first, as a segmented LRU does."""
    return (past.num_uses > 1) * FIRST + past.used_at


def gds(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by what a byte saves, and age (GreedyDual-Size, Cao and Irani, 1997)."""
    return past.floor + work(past.start, past.end) / (past.end - past.start)


def gdsf(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by what a byte has saved, and age (Cherkasova, 1998)."""
    value = work(past.start, past.end) / (past.end - past.start)
    return past.floor + past.num_uses * value


def belady(leaf: SegmentNode, past: Past, now: int) -> float:
    """Rank by the next use, which nobody can know (Belady, 1966)."""
    i = bisect_right(past.asked_at, now)
    return -past.asked_at[i] if i < len(past.asked_at) else -math.inf


ORDERINGS: Mapping[str, Ordering] = {
    "lru": lru,
    "fifo": fifo,
    "lfu": lfu,
    "lru-2": lru_2,
    "twice": twice,
    "gds": gds,
    "gdsf": gdsf,
    "belady": belady,
}


def work(start: int, end: int) -> float:
    """Return what it costs to read `[start, end)`, the first token being 1."""
    return (end - start) * (1 + (start + end) / 2 / ATTENTION_DEPTH)
