"""Matching: the longest cached prefix of a prompt.

The index finds the deepest block boundary it knows by binary search, which is
sound because a segment's ancestors always exist. From there the match is extended
token by token, into the segments that continue from that point, so that neither
the end of a segment nor the fork of two prompts is rounded down to a block.

Rows show how far a prompt is known, not yet where a run can resume: a segment
may have to be taken as a whole, and some models can be resumed only where a
checkpoint was kept.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from promptcache.segments.chain import BLOCK_SIZE, Chain, common_length
from promptcache.segments.types import Match, SegmentSlice
from promptcache.store.index import ROOT_ID, Index
from promptcache.store.index.rows import CheckpointRow, SegmentRow


class _Path(NamedTuple):
    """Segments from the root, and up to which token they agree with the prompt."""

    rows: list[SegmentRow]
    agreed: int

    def stops(self) -> list[int]:
        """Return up to where each segment is followed."""
        stops = [*(row.start for row in self.rows[1:]), self.agreed]
        return stops[: len(self.rows)]

    def usable(self) -> "_Path":
        """Drop a last segment that would have to be cut and cannot be."""
        rows, agreed = self
        while rows and agreed < rows[-1].end and not rows[-1].sliceable:
            agreed = min(agreed, rows[-1].start)
            rows = rows[:-1]
        return _Path(rows, agreed)

    def slices(self) -> tuple[SegmentSlice, ...]:
        """Return the rows to take from each segment, leaving out what gives none."""
        return tuple(
            SegmentSlice(row.key, row.start, stop, row.end)
            for row, stop in zip(self.rows, self.stops(), strict=True)
            if row.start < stop
        )


def longest_stored(index: Index, chain: Chain, *, limit: int) -> Match:
    """Return what is stored of the first `limit` tokens, wherever it ends.

    Args:
        index: The index.
        chain: The prompt.
        limit: How many of its tokens count.

    Raises:
        StoreError: The index cannot be read.
    """
    paths = (path.usable() for path in _paths(index, chain, limit))
    return Match(max(paths, key=lambda path: path.agreed).slices())


def longest_match(
    index: Index,
    chain: Chain,
    *,
    skip: Collection[str] = (),
) -> Match:
    """Return the longest prefix of `chain` that a run can resume.

    Cost: log2(blocks) point queries and a few more, whatever the store's size.

    Args:
        index: The index.
        chain: The prompt.
        skip: Keys of segments to do without.

    Raises:
        StoreError: The index cannot be read.
    """
    best = Match()
    found = _paths(index, chain, len(chain), skip)
    paths = sorted(found, key=lambda path: -path.agreed)
    for path in paths:
        if path.agreed <= best.cached_tokens:
            break
        match = _resumable(index, path.usable(), skip)
        best = max(best, match, key=lambda match: match.cached_tokens)
    return best


def _resumable(index: Index, path: _Path, skip: Collection[str]) -> Match:
    """Return the deepest position of a path at which a run can resume."""
    plain = Match(_plain(path).slices())
    if not any(row.needs_checkpoint for row in path.rows):
        return plain
    checkpoint = _deepest_checkpoint(index, path, skip)
    if checkpoint is None or checkpoint.position < plain.cached_tokens:
        return plain
    depth = [row.id for row in path.rows].index(checkpoint.parent_id) + 1
    position = checkpoint.position
    slices = _Path(path.rows[:depth], position).slices()
    state = SegmentSlice(checkpoint.key, position, position, position)
    return Match((*slices, state))


def _plain(path: _Path) -> _Path:
    """Cut a path to where its rows alone are enough."""
    rows, agreed = path
    while rows:
        cut = _Path(rows, agreed).usable()
        if cut.rows == rows and not rows[-1].needs_checkpoint:
            return cut
        agreed = min(agreed, rows[-1].start)
        rows = rows[:-1]
    return _Path([], 0)


def _deepest_checkpoint(
    index: Index, path: _Path, skip: Collection[str]
) -> CheckpointRow | None:
    stops = {
        row.id: (row, stop) for row, stop in zip(path.rows, path.stops(), strict=True)
    }

    def fits(checkpoint: CheckpointRow) -> bool:
        row, stop = stops[checkpoint.parent_id]
        position = checkpoint.position
        return (
            position <= stop
            and (row.sliceable or position == row.end)
            and checkpoint.key not in skip
        )

    checkpoints = [c for c in index.checkpoints(stops) if fits(c)]
    return max(checkpoints, key=lambda c: c.position, default=None)


def checkpoints_on(index: Index, key: str) -> dict[CheckpointRow, bool]:
    """Return the checkpoints of the segments on the way to a checkpoint.

    In the order of their positions, and with whether they are on the way themselves:
    a segment may go on where the way leaves it.
    """
    segment_id = index.segment_id(key)
    if segment_id is None:
        return {}
    *rows, checkpoint = index.path_to(segment_id)
    stops = dict(
        zip(
            (row.id for row in rows), _Path(rows, checkpoint.start).stops(), strict=True
        )
    )
    checkpoints = sorted(index.checkpoints(stops), key=lambda c: c.position)
    return {c: c.position <= stops[c.parent_id] for c in checkpoints}


def _paths(
    index: Index, chain: Chain, limit: int, skip: Collection[str] = ()
) -> Iterator[_Path]:
    """Yield the paths that share the most with a prompt's start, and the root."""
    yield _Path([], 0)
    num_blocks = _deepest_block(index, chain, limit // BLOCK_SIZE)
    starts = [_Path([], 0)]
    if num_blocks:
        starts = [
            _confirmed(index.path_to(segment_id), chain, limit, skip)
            for segment_id in index.segments_at_block(
                chain.block_hash(num_blocks), chain.fingerprint
            )
        ]
    for path in starts:
        low = num_blocks * BLOCK_SIZE
        yield from _extended(index, chain, path, low, limit, skip)


def _deepest_block(index: Index, chain: Chain, high: int) -> int:
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if index.has_block(chain.block_hash(middle)):
            low = middle
        else:
            high = middle - 1
    return low


def _confirmed(
    rows: list[SegmentRow], chain: Chain, limit: int, skip: Collection[str]
) -> _Path:
    """Cut a path where its token ids first differ from the prompt's."""
    position = 0
    for i, row in enumerate(rows):
        if row.key in skip:
            return _Path(rows[:i], position)
        last = i == len(rows) - 1
        stop = min(row.end if last else rows[i + 1].start, limit)
        position = row.start + common_length(row.token_ids, chain.span(row.start, stop))
        if position < stop:
            return _Path(rows[: i + 1], position)
    return _Path(rows, position)


def _extended(
    index: Index,
    chain: Chain,
    path: _Path,
    low: int,
    limit: int,
    skip: Collection[str],
) -> Iterator[_Path]:
    """Yield a path, and the longer ones through children that continue the prompt."""
    yield path
    parent_id = path.rows[-1].id if path.rows else ROOT_ID
    stop = min(path.agreed + 1, limit)
    starts = {position: chain.token_id(position) for position in range(low, stop)}
    if not starts:
        return
    for child in index.children(parent_id, chain.fingerprint, starts):
        if child.key not in skip:
            shared = common_length(child.token_ids, chain.span(child.start, limit))
            longer = _Path([*path.rows, child], child.start + shared)
            yield from _extended(index, chain, longer, child.start + 1, limit, skip)
