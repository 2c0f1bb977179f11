"""The dtypes of tensors, as safetensors and mlx spell them."""

import functools
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@functools.cache
def bits_of(dtype: str) -> int:
    """Return the size of a value of a dtype in safetensors' spelling."""
    return int("".join(c for c in dtype if c.isdigit())) if dtype != "BOOL" else 8


@functools.lru_cache(maxsize=1024)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * bits_of(dtype) // 8


DTYPE_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}
