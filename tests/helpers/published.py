"""Blobs of a cache, written and read as a store does."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from promptcache.kvcache.loading import segment_loader
from promptcache.segments.blob_format import BlobHeader
from promptcache.segments.chain import pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import (
    EncodedSegment,
    SegmentInfo,
    SegmentSlice,
)
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.blobs import write_blob

TOKEN_IDS = list(range(1000, 1100))


class Published(NamedTuple):
    """A blob on disk."""

    path: Path
    header: BlobHeader
    start: int
    end: int


def publish(
    blobs: BlobFolder, segment: EncodedSegment, start: int, end: int
) -> Published:
    info = SegmentInfo(
        key=f"{start:016x}{end:016x}",
        start_hash="0" * 32,
        fingerprint=Fingerprint("0" * 32, "tiny"),
        start=start,
        end=end,
        is_prefix=True,
        created_at=1.0,
    )
    write_blob(blobs, info, segment)
    return Published(blobs.path(info.key), blobs.read_header(info.key), start, end)


def load(
    published: Published, stop: int | None = None, token_ids: Sequence[int] = TOKEN_IDS
) -> segment_loader.LoadedSegment:
    stop = published.end if stop is None else stop
    key = published.header.info.key
    part = SegmentSlice(key, published.start, stop, published.end)
    expected = pack(token_ids[published.start : stop])
    return segment_loader.load(published.path, published.header, part, expected)
