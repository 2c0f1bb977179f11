"""The cover: which segments have the places that blobs and prefixes name.

A place is a position with the chain hash there. A blob names its parent by the place
where it starts, so that it stays as it is when its parent is split; what of a segment
has that place is found here when the index is rebuilt.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from promptcache.segments.chain import Chain
from promptcache.segments.types import ResumeRules, SegmentInfo
from promptcache.store.index.rows import SegmentRow

Place = tuple[int, str]


class _Holder(NamedTuple):
    """A segment that has a place."""

    key: str
    extendable: bool
    needs_checkpoint: bool


class Cover:
    """The places that are asked for, and the segments that have them."""

    def __init__(self, places: Iterable[Place]) -> None:
        """Take the places that may be asked for."""
        self._holders: dict[Place, list[_Holder]] = {place: [] for place in places}
        self._positions = sorted({position for position, _ in self._holders})

    def add(
        self,
        chain: Chain,
        key: str,
        start: int,
        end: int,
        resumption: ResumeRules | SegmentRow,
    ) -> None:
        """Note the places that a segment `[start, end)` of a chain has.

        It has those after `start`; one that cannot be cut has only its end.
        """
        first = bisect_right(self._positions, start)
        last = bisect_right(self._positions, end)
        if not resumption.sliceable:
            first = max(first, bisect_left(self._positions, end))
        holder = _Holder(key, resumption.extendable, resumption.needs_checkpoint)
        for position in self._positions[first:last]:
            place = position, chain.key_at(position)
            if place in self._holders:
                self._holders[place].append(holder)

    def parent_of(self, info: SegmentInfo) -> str | None:
        """Return the key of the segment that another one starts in, or None.

        Longer prompts go on from what is extendable; a checkpoint belongs to rows that
        are good for the same prompts as it is.
        """
        extendable = info.resumption.extendable or not info.is_checkpoint
        found = self._holders.get((info.start, info.start_hash), [])
        found = sorted(found, key=lambda holder: holder.extendable != extendable)
        return found[0].key if found else None

    def ends(self, num_tokens: int, key: str) -> list[str]:
        """Return the keys of the segments that a prefix may end in, by its own key."""
        found = self._holders.get((num_tokens, key), [])
        return [holder.key for holder in found if not holder.needs_checkpoint]
