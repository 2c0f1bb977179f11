"""The dtypes of tensors, as safetensors and mlx spell them."""

import functools
import math

# safetensors' spelling: the attribute of `mlx.core`, whose `str` has no underscore.
MLX_DTYPES = {
    "BOOL": "bool_",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
DTYPE_NAMES = {mlx.rstrip("_"): name for name, mlx in MLX_DTYPES.items()}
# Of keys and values that are not quantized, by safetensors' name.
FLOAT_DTYPES = {name: MLX_DTYPES[name] for name in ("F16", "BF16", "F32")}


@functools.cache
def bits_of(dtype: str) -> int:
    """Return the size of a value of a dtype in safetensors' spelling."""
    return int("".join(c for c in dtype if c.isdigit())) if dtype != "BOOL" else 8


@functools.lru_cache(maxsize=1024)
def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor."""
    return math.prod(shape) * bits_of(dtype) // 8
