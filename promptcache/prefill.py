"""Prefill: run the model over token ids piece by piece to fill its cache.

Where pieces end depends on the prompt alone: at multiples of the step counted from
the first token, and at boundaries such as the end of the system prompt. A run that
resumes at one of them repeats the arithmetic of a run from nothing, to the bit.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from promptcache.errors import UsageError

# As in mlx-lm's generate_step.
DEFAULT_STEP_SIZE = 2048
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

    def quantizes(self, cache: Sequence[Any], num_tokens: int) -> bool:
        """Return whether mlx-lm would now quantize a cache of so many tokens."""
        return (
            self.bits is not None
            and num_tokens >= self.start
            and any(hasattr(layer, "to_quantized") for layer in cache)
        )


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where the pieces of a prompt end.

    Attributes:
        step_size: Most tokens in a piece.
        boundaries: Positions to cut at besides the multiples of `step_size`.
    """

    step_size: int = DEFAULT_STEP_SIZE
    boundaries: tuple[int, ...] = ()

    def after(self, position: int) -> int:
        """Return the first cut after a position."""
        step = (position // self.step_size + 1) * self.step_size
        return min([step, *(b for b in self.boundaries if b > position)])

    def last_before(self, position: int) -> int:
        """Return the last cut before a position, 0 if there is none."""
        step = (position - 1) // self.step_size * self.step_size
        return max([step, *(b for b in self.boundaries if b < position)])

    def quantized_from(self, kv: KVSettings) -> int | None:
        """Return the cut at which a run from nothing quantizes, None for never."""
        return None if kv.bits is None else self.after(max(kv.start, 1) - 1)

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the pieces of a prefill of `[start, end)`."""
        while start < end:
            stop = min(self.after(start), end)
            yield start, stop
            start = stop


def prefill(
    model: Any,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    start: int,
    end: int,
    cuts: Cuts = Cuts(),
    kv: KVSettings | None = None,
    on_piece: Callable[[int, int], object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Process the token ids `[start, end)`; the cache holds `[0, start)` before.

    Args:
        model: An mlx-lm model.
        cache: Its cache, which is modified; layers may be replaced by quantized ones.
        token_ids: The whole prompt.
        start: Where to begin.
        end: Where to stop.
        cuts: Where pieces end.
        kv: When to quantize keys and values, as mlx-lm does after a piece.
        on_piece: Called with each `[start, end)` done, before it is quantized.
        on_progress: Called with the number of tokens the cache holds, `start` at first,
            and `end`.
    """
    import mlx.core as mx
    from mlx_lm.generate import generation_stream

    kv = kv or KVSettings()
    if on_progress:
        on_progress(start, end)
    with mx.stream(generation_stream):
        for first, stop in cuts.pieces(start, end):
            model(mx.array(token_ids[first:stop])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
            if on_piece:
                on_piece(first, stop)
            quantize(cache, stop, kv)
            if on_progress:
                on_progress(stop, end)
            mx.clear_cache()


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
        reason = str(error).rstrip(".")
        raise UsageError(f"this model's cache cannot be quantized: {reason}") from error
