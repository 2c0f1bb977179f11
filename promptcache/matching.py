"""Matching: the longest cached prefix of a prompt.

The index finds the deepest block boundary it knows by binary search, which is
sound because a segment's ancestors always exist. From there the match is extended
token by token, into the segments that continue from that point, so that neither
the end of a segment nor the fork of two prompts is rounded down to a block.
"""

from typing import NamedTuple

from promptcache.chain import BLOCK_SIZE, Chain, common_length
from promptcache.index import ROOT_ID, Index
from promptcache.types import Match, SegmentRow, SegmentSlice


class _Path(NamedTuple):
    """Segments from the root, and up to which token they agree with the prompt."""

    rows: list[SegmentRow]
    agreed: int


def longest_match(index: Index, chain: Chain, *, limit: int) -> Match:
    """Return the longest prefix of `chain`, of at most `limit` tokens, in the index.

    Cost: log2(blocks) point queries and a few more, whatever the store's size.
    Raises StoreError.
    """
    num_blocks = _deepest_block(index, chain, limit // BLOCK_SIZE)
    if num_blocks:
        starts = [
            _confirmed(index.path_to(segment_id), chain, limit)
            for segment_id in index.segments_at_block(
                chain.block_hash(num_blocks), chain.fingerprint
            )
        ]
    else:
        starts = [_Path([], 0)]
    low = num_blocks * BLOCK_SIZE
    paths = [_extended(index, chain, path, low, limit) for path in starts]
    best = max(paths, key=lambda path: path.agreed, default=_Path([], 0))
    return Match(_slices(best))


def _deepest_block(index: Index, chain: Chain, high: int) -> int:
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        if index.has_block(chain.block_hash(middle)):
            low = middle
        else:
            high = middle - 1
    return low


def _confirmed(rows: list[SegmentRow], chain: Chain, limit: int) -> _Path:
    """Cut a path where its token ids first differ from the prompt's."""
    position = 0
    for i, row in enumerate(rows):
        last = i == len(rows) - 1
        stop = min(row.end if last else rows[i + 1].start, limit)
        position = row.start + common_length(row.token_ids, chain.span(row.start, stop))
        if position < stop:
            return _Path(rows[: i + 1], position)
    return _Path(rows, position)


def _extended(index: Index, chain: Chain, path: _Path, low: int, limit: int) -> _Path:
    """Follow the children that continue the prompt and return the deepest path."""
    parent_id = path.rows[-1].id if path.rows else ROOT_ID
    stop = min(path.agreed + 1, limit)
    starts = {position: chain.token_id(position) for position in range(low, stop)}
    best = path
    if starts:
        for child in index.children(parent_id, chain.fingerprint, starts):
            shared = common_length(child.token_ids, chain.span(child.start, limit))
            longer = _Path([*path.rows, child], child.start + shared)
            longer = _extended(index, chain, longer, child.start + 1, limit)
            best = max(best, longer, key=lambda path: path.agreed)
    return best


def _slices(path: _Path) -> tuple[SegmentSlice, ...]:
    """Return the rows to take from each segment, leaving out what gives none."""
    if not path.rows:
        return ()
    stops = [*(row.start for row in path.rows[1:]), path.agreed]
    return tuple(
        SegmentSlice(row.key, row.start, stop, row.end)
        for row, stop in zip(path.rows, stops, strict=True)
        if row.start < stop
    )
