"""The rows of the index as values, and how they are read.

SQLite keeps any kind of value in any column, and does not look at the types of a
`STRICT` table when it reads: a file can be damaged or forged. What is read is checked
here, against the annotations of the value that it becomes.
"""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_type_hints

from promptcache.errors import DamagedIndexError
from promptcache.segments.types import Priority, PromptOrigin
from promptcache.store.index.connection import DAMAGED, VALUE_ERRORS
from promptcache.units import MAX_SECONDS

Row = TypeVar("Row")
Decoder = Callable[[Any], Any]


class SegmentRow(NamedTuple):
    """A segment; `token_ids` are little-endian uint32."""

    id: int
    key: str
    parent_id: int
    start: int
    end: int
    nbytes: int
    sliceable: bool
    needs_checkpoint: bool
    token_ids: bytes


class CheckpointRow(NamedTuple):
    """A checkpoint, which is a child of the segment `parent_id`."""

    key: str
    parent_id: int
    position: int
    priority: Priority
    is_prefix: bool


class PrefixRow(NamedTuple):
    """A listed prefix and the segment it ends in.

    `manifest` is the file whose prompt it is pinned for, if any.
    """

    key: str
    segment_key: str
    num_tokens: int
    name: str | None
    manifest: str | None = None
    namespace: str = ""


class PromptRow(NamedTuple):
    """A listed prefix and how it was rendered; `fingerprint` is a digest."""

    key: str
    fingerprint: str
    segment_id: int
    num_tokens: int
    origin: PromptOrigin | None


class SegmentNode(NamedTuple):
    """A stretch of a segment, as eviction sees it.

    Attributes:
        id: The stretch.
        key: The segment's key.
        parent_id: The stretch that it continues, 0 for the root.
        nbytes: What its removal frees.
        used_at: When it was used last.
        pinned: Whether a prefix that ends with it has a name.
        model: The model's name.
        is_checkpoint: Whether it is a checkpoint.
        start: Where it begins.
        end: Where it ends.
        segment_id: The segment.
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
    """A segment without its tokens.

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


def _time(value: Any) -> float:
    """Return a Unix time, or a span of time."""
    if not isinstance(value, int | float) or not 0 <= value < MAX_SECONDS:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    return bool(_plain(int)(value))


def _origin(value: Any) -> PromptOrigin | None:
    if value is None:
        return None
    fields = json.loads(value)
    tools = tuple((name, digest) for name, digest in fields.pop("tools"))
    return PromptOrigin(**fields, tools=tools)


def _parts(value: Any) -> dict[str, str]:
    return dict(json.loads(value))


def _plain(kind: Any) -> Decoder:
    def decode(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return decode


# How a column of an annotation is read, where it is not kept as such a value.
DECODERS: dict[Any, Decoder] = {
    bool: _flag,
    float: _time,
    Priority: Priority,
    PromptOrigin | None: _origin,
    Mapping[str, str]: _parts,
}


@functools.cache
def _decoders(kind: type) -> dict[str, Decoder]:
    return {
        name: DECODERS.get(hint) or _plain(hint)
        for name, hint in get_type_hints(kind).items()
    }


def decoded(
    kind: Callable[..., Row], columns: Sequence[str], rows: Iterable[Sequence[Any]]
) -> list[Row]:
    """Return rows as values of a class, each column as the field of its name.

    Raises DamagedIndexError for values that no promptcache has put there.
    """
    decoders = _decoders(kind)
    # By name, but as fast as by position: 100,000 segments are read to evict.
    assert [*decoders][: len(columns)] == [*columns], (kind, columns)
    checks = [*decoders.values()]
    try:
        return [kind(*[check(v) for check, v in zip(checks, r)]) for r in rows]  # noqa: B905
    except (AttributeError, LookupError, *VALUE_ERRORS):
        raise DamagedIndexError(DAMAGED) from None


def decoded_column(
    kind: Callable[..., Row], rows: Iterable[Sequence[Any]]
) -> list[Row]:
    """Return the only column of rows as values of a type. Raises DamagedIndexError."""
    decode = DECODERS.get(kind) or _plain(kind)
    try:
        return [decode(value) for [value] in rows]
    except (AttributeError, LookupError, *VALUE_ERRORS):
        raise DamagedIndexError(DAMAGED) from None
