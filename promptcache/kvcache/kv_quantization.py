"""mlx-lm's quantized caches: when they begin, and whether a model can have one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from promptcache.errors import UsageError

# What mlx's affine quantization takes.
KV_BITS = (2, 3, 4, 5, 6, 8)
KV_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class KVSettings:
    """How keys and values are quantized; names and defaults are mlx-lm's.

    Attributes:
        bits: Bits a value, or None for the model's own dtype.
        group_size: Values that share a scale.
        start: Quantize once the cache holds so many tokens.
    """

    bits: int | None = None
    group_size: int = 64
    start: int = 5000

    def __post_init__(self) -> None:
        """Raise UsageError for what mlx cannot quantize to."""
        if self.bits is not None and self.bits not in KV_BITS:
            raise UsageError(f"kv_bits must be one of {KV_BITS}, not {self.bits}")
        if self.group_size not in KV_GROUP_SIZES:
            raise UsageError(
                f"kv_group_size must be one of {KV_GROUP_SIZES}, not {self.group_size}"
            )

    def starts_within(self, num_cached: int, num_tokens: int) -> bool:
        """Return whether reading the rest of so many tokens begins to quantize."""
        return self.bits is not None and num_cached <= self.start < num_tokens

    def quantizes(self, cache: Sequence[Any], num_tokens: int) -> bool:
        """Return whether mlx-lm would now quantize a cache of so many tokens."""
        return (
            self.bits is not None
            and num_tokens >= self.start
            and any(hasattr(layer, "to_quantized") for layer in cache)
        )


def quantize(cache: list[Any], num_tokens: int, kv: KVSettings) -> None:
    """Quantize the layers of a cache of so many tokens, if mlx-lm would now.

    Raises:
        UsageError: The model's head dimension is no multiple of the group size.
    """
    from mlx_lm.generate import maybe_quantize_kv_cache

    if not kv.quantizes(cache, num_tokens):
        return
    try:
        maybe_quantize_kv_cache(cache, kv.start, kv.group_size, kv.bits)
    except (ValueError, NotImplementedError) as error:
        raise _cannot_quantize(str(error)) from error


def check_quantizable(model: Any, kv: KVSettings, max_kv_size: int | None) -> None:
    """Read two tokens with a quantized cache, to see that mlx-lm and the model can.

    mlx-lm fails in the middle of a prompt where they cannot, or leaves the cache as
    it is without a word.

    Raises:
        UsageError: They cannot.
    """
    import mlx.core as mx
    from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model, max_kv_size)
    if not any(hasattr(layer, "to_quantized") for layer in cache):
        classes = ", ".join(sorted({type(layer).__name__ for layer in cache}))
        raise _cannot_quantize(f"mlx-lm has no way to quantize {classes}")
    try:
        with mx.stream(generation_stream):
            for _ in range(2):
                mx.eval(model(mx.array([[0]]), cache=cache))
                maybe_quantize_kv_cache(cache, 0, kv.group_size, kv.bits)
    except (NotImplementedError, ValueError) as error:
        raise _cannot_quantize(str(error)) from error
    except Exception as error:
        # The model's code raises whatever it likes.
        raise _cannot_quantize("mlx-lm's code of it does not read one") from error


def _cannot_quantize(reason: str) -> UsageError:
    line = reason.splitlines()[0].rstrip(".")
    return UsageError(
        f"this model's cache cannot be quantized ({line}), leave kv_bits out"
    )
