"""Rows at rest: keys and values of floats, stored in fewer bits than they are used in.

Rows are quantized one by one, so that a segment can still be cut at any token. What
is stored where is the codec's business.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from promptcache.segments.dtypes import FLOAT_DTYPES

if TYPE_CHECKING:
    import mlx.core as mx

STORE_BITS = (8, 4)
# The larger takes fewer bytes; mlx has kernels for these, and models such widths.
GROUP_SIZES = (64, 32)
# What a tensor is taken apart into; the names are mlx's.
PIECES = ("weight", "scales", "biases")


class QuantizedFormat(NamedTuple):
    """How a tensor of rows is kept in fewer bits.

    Attributes:
        bits: Bits a value.
        group_size: Values that share a scale and a bias.
        dtype: The dtype to restore.
    """

    bits: int
    group_size: int
    dtype: str

    @classmethod
    def of(cls, value: Any) -> "QuantizedFormat":
        """Return what a blob says. Raises ValueError for what is never written."""
        kept = cls(*value)
        is_known = (
            kept.bits in STORE_BITS
            and kept.group_size in GROUP_SIZES
            and kept.dtype in FLOAT_DTYPES.values()
        )
        if not is_known:
            raise ValueError(f"rows are never kept as {list(kept)}")
        return kept


def quantized_format(rows: "mx.array", bits: int) -> QuantizedFormat | None:
    """Return how to keep rows in so many bits, or None if only as they are.

    Keys and values of no width, of a width that no group divides, and of integers
    stay as they are.
    """
    dtype = str(rows.dtype).removeprefix("mlx.core.")
    width = rows.shape[-1]
    group_size = next((g for g in GROUP_SIZES if width and width % g == 0), None)
    if group_size is None or dtype not in FLOAT_DTYPES.values() or not rows.size:
        return None
    return QuantizedFormat(bits, group_size, dtype)


def quantize_rows(rows: "mx.array", kept: QuantizedFormat) -> dict[str, "mx.array"]:
    """Return rows in fewer bits, by the names of the pieces.

    Scales and biases are of float16, also for bfloat16: with its eight bits they would
    make half as much error again as the rounding to eight bits itself does.
    """
    import mlx.core as mx

    weight, scales, biases = mx.quantize(
        rows.astype(mx.float32), group_size=kept.group_size, bits=kept.bits
    )
    pieces = (weight, scales.astype(mx.float16), biases.astype(mx.float16))
    return dict(zip(PIECES, pieces, strict=True))


def is_finite(rows: "mx.array", pieces: Mapping[str, "mx.array"]) -> "mx.array":
    """Return whether packed rows can be restored, as an array that is not computed.

    They cannot where a value is no finite number, or too large for scales of float16.
    """
    import mlx.core as mx

    arrays = (rows, pieces["scales"], pieces["biases"])
    return mx.all(mx.stack([mx.all(mx.isfinite(array)) for array in arrays]))


def unpacked_rows(
    pieces: Mapping[str, "mx.array"], kept: QuantizedFormat
) -> "mx.array":
    """Return rows in their own dtype. Raises ValueError if the pieces do not fit."""
    import mlx.core as mx

    rows = mx.dequantize(
        pieces["weight"],
        pieces["scales"].astype(mx.float32),
        pieces["biases"].astype(mx.float32),
        group_size=kept.group_size,
        bits=kept.bits,
    )
    return rows.astype(getattr(mx, kept.dtype))
