"""Prefill: run the model over token ids piece by piece to fill its cache.

Pieces end at multiples of the step counted from the first token, wherever the
prefill starts, so that a run that resumes cuts where a run from nothing does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# As in mlx-lm's generate_step.
DEFAULT_STEP_SIZE = 2048


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

    def quantizes(self, cache: Sequence[Any], num_tokens: int) -> bool:
        """Return whether mlx-lm would now quantize a cache of so many tokens."""
        return (
            self.bits is not None
            and num_tokens >= self.start
            and any(hasattr(layer, "to_quantized") for layer in cache)
        )


def pieces(start: int, end: int, step_size: int) -> Iterator[tuple[int, int]]:
    """Yield the pieces of a prefill of `[start, end)`."""
    while start < end:
        stop = min(start - start % step_size + step_size, end)
        yield start, stop
        start = stop


def prefill(
    model: Any,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    start: int,
    end: int,
    step_size: int = DEFAULT_STEP_SIZE,
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
        step_size: Most tokens in a piece.
        kv: When to quantize keys and values, as mlx-lm does after a piece.
        on_piece: Called with each `[start, end)` done, before it is quantized.
        on_progress: Called with the number of tokens the cache holds, `start` at first,
            and `end`.
    """
    import mlx.core as mx
    from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache

    kv = kv or KVSettings()
    if on_progress:
        on_progress(start, end)
    with mx.stream(generation_stream):
        for first, stop in pieces(start, end, step_size):
            model(mx.array(token_ids[first:stop])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
            if on_piece:
                on_piece(first, stop)
            maybe_quantize_kv_cache(cache, kv.start, kv.group_size, kv.bits)
            if on_progress:
                on_progress(stop, end)
            mx.clear_cache()
