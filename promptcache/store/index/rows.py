"""The rows of the index, as values."""

from typing import NamedTuple

from promptcache.segments.types import Priority, PromptOrigin


class SegmentRow(NamedTuple):
    """A segment as the index knows it; `token_ids` are little-endian uint32."""

    id: int
    key: str
    parent_id: int
    start: int
    end: int
    nbytes: int
    sliceable: bool
    extendable: bool
    needs_checkpoint: bool
    token_ids: bytes


class CheckpointRow(NamedTuple):
    """A checkpoint as the index knows it; it hangs on the segment `parent_id`."""

    key: str
    parent_id: int
    position: int
    extendable: bool
    has_logits: bool
    priority: Priority
    is_prefix: bool


class PrefixRow(NamedTuple):
    """A prefix and the segment it ends in, as the index lists it.

    `manifest` is the file whose prompt it is pinned for, if any.
    """

    key: str
    segment_key: str
    num_tokens: int
    name: str | None
    manifest: str | None = None
    namespace: str = ""


class SegmentNode(NamedTuple):
    """What eviction has to know of a stretch of a segment.

    Attributes:
        id: Of the stretch.
        key: Of the segment.
        parent_id: The stretch that it goes on from, 0 for the root.
        nbytes: What its removal frees.
        used_at: When it was used last.
        pinned: Whether a prefix that ends with it has a name.
        model: The model's name.
        is_checkpoint: Whether it is a checkpoint.
        start: Where it begins.
        end: Where it ends.
        segment_id: Of the segment.
        cut_at: Where its segment ends once it is gone, None if nothing is left.
        needs_checkpoint: Whether rows are of use only up to a checkpoint.
    """

    id: int
    key: str
    parent_id: int
    nbytes: int
    used_at: float
    pinned: bool
    model: str
    is_checkpoint: bool = False
    start: int = 0
    end: int = 0
    segment_id: int = 0
    cut_at: int | None = None
    needs_checkpoint: bool = False


class HeldSegment(NamedTuple):
    """A segment as the index knows it, without its tokens.

    `token_nbytes` is what each of its tokens takes, 0 if it cannot be split.
    """

    id: int
    key: str
    parent_id: int
    start: int
    end: int
    nbytes: int
    token_nbytes: int
    created_at: float
    used_at: float
    model: str
    is_checkpoint: bool
    needs_checkpoint: bool


class HeldEnd(NamedTuple):
    """Where a listed prefix ends, and whether it has a name."""

    segment_id: int
    position: int
    pinned: bool


class Use(NamedTuple):
    """Up to where a segment was used at a time."""

    segment_id: int
    position: int
    used_at: float


class PromptRow(NamedTuple):
    """A listed prefix as the index knows it; `fingerprint` is a digest."""

    key: str
    fingerprint: str
    segment_id: int
    num_tokens: int
    origin: PromptOrigin | None
