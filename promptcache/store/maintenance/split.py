"""Splitting: a segment is replaced by its head, up to where others start in it.

The head is written as a segment of its own, crash-safe like a save; then the row is
changed to it, and the old blob is removed. Children do not change: they name their
parent by the chain hash where they start.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.segments.chain import Chain
from promptcache.segments.cut import first_tokens
from promptcache.segments.types import EncodedSegment, SegmentInfo
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.blobs.store_files import StagedFile
from promptcache.store.index import Index
from promptcache.store.reports import Removal


class Head(NamedTuple):
    """The head of a segment, complete in `tmp/`; key and nbytes are the segment's."""

    key: str
    nbytes: int
    info: SegmentInfo
    chain: Chain
    staged: StagedFile

    @property
    def freed_nbytes(self) -> int:
        return self.nbytes - self.staged.nbytes

    def can_replace(self, index: Index) -> bool:
        """Return whether nothing depends on the rows that would go."""
        return index.can_cut(self.key, self.info)

    def replace(self, index: Index) -> None:
        """Replace the segment in the open transaction; its blob is garbage then.

        The file of prefixes may lag behind: prefixes are found by their own keys.
        """
        self.staged.publish()
        index.cut(self.key, self.info, self.chain, nbytes=self.staged.nbytes)
        index.history.add_written(self.staged.nbytes, now=time.time())


@contextlib.contextmanager
def staged_heads(
    index: Index, blobs: BlobFolder, removals: Iterable[Removal]
) -> Iterator[list[Head]]:
    """Write the heads of the segments that removals cut, if still there, to `tmp/`.

    Raises StoreError, which is a DamagedBlobError if a segment is damaged.
    """
    cuts = [(r.key, r.cut_at) for r in removals if r.cut_at is not None]
    try:
        with contextlib.ExitStack() as stack:
            heads = (stack.enter_context(_staged(index, blobs, *cut)) for cut in cuts)
            yield [head for head in heads if head is not None]
    except OSError as error:
        raise StoreError(
            f"what is shared cannot be written to the store {blobs.root} "
            f"({error.strerror})"
        ) from error


@contextlib.contextmanager
def _staged(
    index: Index, blobs: BlobFolder, key: str, position: int
) -> Iterator[Head | None]:
    cut = _find(index, key, position)
    if cut is None:
        yield None
        return
    try:
        header = blobs.read_header(key)
        num_tokens = position - header.info.start
        tensors = blobs.read_tensors(header, lambda t: first_tokens(t, num_tokens))
    except DamagedBlobError:
        if index.segment_id(key) is None:
            yield None
            return
        raise
    chain, nbytes, is_prefix = cut
    info = replace(
        header.info,
        key=chain.tagged_key_at(position, header.info.tag),
        end=position,
        is_prefix=is_prefix,
    )
    segment = EncodedSegment(header.layout, tensors, info.resumption)
    with blobs.staged(info, segment, whole=header) as staged:
        yield Head(key, nbytes, info, chain, staged)


def _find(index: Index, key: str, position: int) -> tuple[Chain, int, bool] | None:
    """Return the chain up to a position of a segment, its size, and if it is listed."""
    with index.database.reading():
        segment_id = index.segment_id(key)
        if segment_id is None:
            return None
        *_, row = index.path_to(segment_id)
        if not row.start < position < row.end:
            return None
        token_ids = index.token_ids(segment_id, position)
        chain = Chain(index.fingerprints.of_segment(segment_id).digest, token_ids)
        ends = index.prefixes.ends()
        is_prefix = any(e[:2] == (segment_id, position) for e in ends)
        return chain, row.nbytes, is_prefix
