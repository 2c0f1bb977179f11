"""Prefill: run the model over token ids piece by piece to fill its cache.

Where pieces end depends on the prompt alone: at multiples of the step counted from
the first token, and at boundaries such as the end of the system prompt. A run that
resumes at one of them repeats the arithmetic of a run from nothing, to the bit.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from promptcache.errors import UsageError

# As in mlx-lm's generate_step.
DEFAULT_STEP_SIZE = 2048
# A rest of the prompt up to this long is read in one go with the last token, which
# saves a pass through the model; longer ones as mlx-lm does, because the logits of
# all their tokens would be computed.
JOINED_TOKENS = 64
# Templates open an answer with fewer: the role, the start of its thinking.
MOST_OPENING_TOKENS = 64
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


@dataclass(frozen=True, slots=True)
class Cuts:
    """Where the pieces of a prompt end, and so where another run can take over.

    From `exact_from` on a run repeats plain mlx-lm's arithmetic: pieces end at
    multiples of the step only, and only there can another prompt take over.

    Attributes:
        step_size: Most tokens in a piece.
        boundaries: Positions to cut at besides the multiples of `step_size`.
        exact_from: Position after which boundaries do not count, None for never.
        answer: Where the prompt's answer begins in history, None if not known.
    """

    step_size: int = DEFAULT_STEP_SIZE
    boundaries: tuple[int, ...] = ()
    exact_from: int | None = None
    answer: int | None = None

    def is_divisible(self, end: int) -> bool:
        """Return whether rows up to `end` may be cut at any token."""
        return self.exact_from is None or end <= self.exact_from

    def can_resume(self, position: int) -> bool:
        """Return whether other prompts may take over at a position."""
        return self.is_divisible(position) or position % self.step_size == 0

    def last_resumable(self, end: int) -> int:
        """Return the last position up to `end` at which other prompts may take over."""
        if self.can_resume(end):
            return end
        return max(end - end % self.step_size, self.exact_from or 0)

    def is_cut(self, position: int) -> bool:
        """Return whether a piece of every longer prompt ends at a position."""
        return position % self.step_size == 0 or self.is_boundary(position)

    def is_boundary(self, position: int) -> bool:
        """Return whether it is a cut because other prompts are likely to part there."""
        return position in self._places()

    def _places(self) -> list[int]:
        return [b for b in self.boundaries if self.is_divisible(b)]

    def next_turn(self, end: int) -> int:
        """Return where the next turn is likely to part from a prompt read up to `end`.

        That is where its answer begins in history: a template may drop what was
        thought, and the tokens that open it. Where nobody knows, it is at a boundary
        just before the end, or at the end.
        """
        if self.answer is not None:
            return min(self.answer, end)
        near = (b for b in self._places() if end - MOST_OPENING_TOKENS <= b < end)
        return max(near, default=end)

    def segment_ends(self, end: int, kv: "KVSettings") -> tuple[int, ...]:
        """Return where segments of `[0, end)` have to end."""
        if self.exact_from is None:
            ends = {*range(DEFAULT_STEP_SIZE, end, DEFAULT_STEP_SIZE)}
        else:
            # Where `can_resume` is to hold.
            ends = {self.exact_from, *range(self.step_size, end, self.step_size)}
        quantized_from = self.quantized_from(kv)
        return tuple(sorted(ends | ({quantized_from} if quantized_from else set())))

    def after(self, position: int) -> int:
        """Return the first cut after a position."""
        step = (position // self.step_size + 1) * self.step_size
        return min([step, *(b for b in self._places() if b > position)])

    def last_before(self, position: int) -> int:
        """Return the last cut before a position, 0 if there is none."""
        step = (position - 1) // self.step_size * self.step_size
        return max([step, *(b for b in self._places() if b < position)])

    def end_of_prefill(
        self, num_tokens: int, cached_tokens: int, kv: "KVSettings"
    ) -> int:
        """Return where to stop a prefill, so that the rest can be read in one go."""
        end = num_tokens - 1
        # mlx-lm would quantize the last piece before it reads the last token.
        if not self.is_divisible(num_tokens) or self.quantizes_at_end(num_tokens, kv):
            return end
        begin = max(self.last_before(num_tokens), cached_tokens)
        is_short = num_tokens - begin <= JOINED_TOKENS
        return begin if begin and is_short else end

    def quantized_from(self, kv: "KVSettings") -> int | None:
        """Return the piece's end at which mlx-lm quantizes, None for never.

        Boundaries do not count: they are not the same for prompts that share a prefix.
        """
        if kv.bits is None:
            return None
        return math.ceil(max(kv.start, 1) / self.step_size) * self.step_size

    def quantizes_at_end(self, num_tokens: int, kv: "KVSettings") -> bool:
        """Return whether a prompt is quantized just before its last token is read."""
        quantized_from = self.quantized_from(kv)
        end = num_tokens - 1
        return quantized_from is not None and kv.start <= end < quantized_from

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
) -> float:
    """Process the token ids `[start, end)`; the cache holds `[0, start)` before.

    Returns the seconds that the model took, without what is called in between.

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
    seconds = 0.0
    if on_progress:
        on_progress(start, end)
    with mx.stream(generation_stream):
        for first, stop in cuts.pieces(start, end):
            started = time.perf_counter()
            model(mx.array(token_ids[first:stop])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
            seconds += time.perf_counter() - started
            if on_piece:
                on_piece(first, stop)
            quantized_from = cuts.quantized_from(kv)
            if quantized_from is not None and stop >= quantized_from:
                quantize(cache, stop, kv)
            if on_progress:
                on_progress(stop, end)
            mx.clear_cache()
    return seconds


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
