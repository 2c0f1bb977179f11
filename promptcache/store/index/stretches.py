"""Stretches: segments divided where others continue them, as eviction sees them.

A stretch ends where children or listed prefixes do, or the segment itself. It goes
when nothing continues it any more: the segment is split there, and its head stays.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from promptcache.store.index.rows import HeldEnd, HeldSegment, SegmentNode, Use

Places = Mapping[int, Sequence[int]]


def leaves_of(
    segments: Sequence[HeldSegment], ends: Sequence[HeldEnd], uses: Iterable[Use]
) -> list[SegmentNode]:
    """Return all stretches of segments.

    Args:
        segments: All segments of the store.
        ends: Where the listed prefixes end.
        uses: Up to where segments were used when.
    """
    places = _places(segments, ends)
    starts = {segment.id: segment.start for segment in segments}
    order = ((segment_id, end) for segment_id in places for end in places[segment_id])
    ids = {place: i for i, place in enumerate(order, start=1)}

    def stretch_at(segment_id: int, position: int) -> int:
        """Return the id of the stretch that ends at a position, or holds it."""
        if segment_id not in places:
            # A damaged index names what is not there.
            return -segment_id
        found = places[segment_id]
        return ids[segment_id, found[min(bisect_left(found, position), len(found) - 1)]]

    used_by_id: dict[int, list[Use]] = defaultdict(list)
    for use in uses:
        used_by_id[use.segment_id].append(use)
    pinned = {stretch_at(e.segment_id, e.position) for e in ends if e.pinned}
    leaves = []
    for segment in segments:
        stretches = pairwise([starts[segment.id], *places[segment.id]])
        parent_id = stretch_at(segment.parent_id, segment.start)
        for start, end in stretches:
            id_ = ids[segment.id, end]
            leaves.append(
                SegmentNode(
                    id=id_,
                    key=segment.key,
                    parent_id=parent_id,
                    nbytes=_nbytes(segment, start, end),
                    used_at=_used_at(segment, start, used_by_id[segment.id]),
                    pinned=id_ in pinned,
                    model=segment.model,
                    is_checkpoint=segment.is_checkpoint,
                    start=start,
                    end=end,
                    segment_id=segment.id,
                    cut_at=start if start > segment.start else None,
                    needs_checkpoint=segment.needs_checkpoint,
                )
            )
            parent_id = id_
    return leaves


def _places(segments: Sequence[HeldSegment], ends: Iterable[HeldEnd]) -> Places:
    """Return where the stretches of each segment end, in order."""
    places = {segment.id: {segment.end} for segment in segments}
    sliceable = {s.id: range(s.start + 1, s.end) for s in segments if _is_divisible(s)}
    hung = ((segment.parent_id, segment.start) for segment in segments)
    ended = ((end.segment_id, end.position) for end in ends)
    for segment_id, position in (*hung, *ended):
        if position in sliceable.get(segment_id, ()):
            places[segment_id].add(position)
    return {segment_id: sorted(found) for segment_id, found in places.items()}


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
