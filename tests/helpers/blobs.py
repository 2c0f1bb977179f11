"""Blobs written as a store writes them."""

from promptcache.segments.types import EncodedSegment, SegmentInfo
from promptcache.store.blobs.folder import BlobFolder


def write_blob(blobs: BlobFolder, info: SegmentInfo, segment: EncodedSegment) -> int:
    """Write a blob durably under its key and return its size in bytes."""
    with blobs.staged(info, segment) as staged:
        staged.publish()
    return staged.nbytes
