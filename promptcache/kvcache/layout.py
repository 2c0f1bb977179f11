"""Layouts: how each part of a cache is kept in a blob, as JSON.

A class name in a layout is data: it is compared, never called.
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from promptcache.errors import DamagedBlobError
from promptcache.kvcache.classes import LayerKind, tensor_names
from promptcache.kvcache.row_quantization import QuantizedFormat

# A tensor of a blob that belongs to no part of the cache.
TOKEN_IDS = "token_ids"


@dataclass(frozen=True, slots=True)
class PartLayout:
    """How one part of a cache is kept.

    Attributes:
        class_name: Its cache class.
        kind: How it is treated.
        group_size: Of a quantized part, else None.
        bits: Of a quantized part, else None.
        state: In a checkpoint, the part's state as JSON, or by how many rows a window
            is out of temporal order.
        at_rest: How those of its tensors are kept that are stored in fewer bits.
    """

    class_name: str
    kind: LayerKind
    group_size: int | None = None
    bits: int | None = None
    state: Any = None
    at_rest: Mapping[str, QuantizedFormat] = field(default_factory=dict)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of the tensors that hold its rows."""
        has_rows = self.kind in (LayerKind.ROWS, LayerKind.WINDOW)
        return tensor_names(self.class_name) if has_rows else ()


Layout = Mapping[str, PartLayout]


def layout_of(part: Any, kind: LayerKind, state: Any = None) -> PartLayout:
    """Return how a part of a cache is kept."""
    return PartLayout(
        type(part).__name__,
        kind,
        getattr(part, "group_size", None),
        getattr(part, "bits", None),
        state,
    )


def name_in_blob(part: str, tensor: str) -> str:
    """Return what a tensor of a part is called in blobs."""
    return f"layers.{part}.{tensor}"


def without_state(part: PartLayout) -> PartLayout:
    """Return how the part is kept where only rows are."""
    return PartLayout(part.class_name, part.kind, part.group_size, part.bits)


def encode_layout(layout: Layout) -> str:
    """Return a layout as JSON."""
    return json.dumps(
        {
            name: [
                *(p.class_name, p.kind, p.group_size, p.bits, p.state),
                *([p.at_rest] if p.at_rest else []),
            ]
            for name, p in layout.items()
        }
    )


@functools.lru_cache(maxsize=8)
def decode_layout(layout: str) -> Layout:
    """Return a blob's layout; a class name in it is compared, never called."""
    try:
        return {
            name: _decode_part(class_name, kind, *rest)
            for name, (class_name, kind, *rest) in json.loads(layout).items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedBlobError(f"layout cannot be read ({error})") from error


def _decode_part(
    class_name: str,
    kind: str,
    group_size: int | None = None,
    bits: int | None = None,
    state: Any = None,
    at_rest: Mapping[str, Any] = MappingProxyType({}),
) -> PartLayout:
    formats = {tensor: QuantizedFormat.of(f) for tensor, f in at_rest.items()}
    return PartLayout(class_name, LayerKind(kind), group_size, bits, state, formats)


def is_quantized(layout: str) -> bool:
    """Return whether some part of a blob's layout is quantized in the cache."""
    return any(part.bits for part in decode_layout(layout).values())


def describe(layout: str) -> str:
    """Return a blob's layout for people: `30 × KVCache`."""
    kinds = Counter(_kind_name(part) for part in decode_layout(layout).values())
    return ", ".join(f"{count} × {kind}" for kind, count in kinds.items())


def _kind_name(part: PartLayout) -> str:
    if part.bits:
        return f"{part.class_name} ({part.bits} bits)"
    if part.at_rest:
        bits = next(iter(part.at_rest.values())).bits
        return f"{part.class_name} (stored in {bits} bits)"
    return part.class_name
