"""The plan of a prefill: where its pieces end.

That depends on the prompt alone: at multiples of the step counted from the first
token, and at boundaries such as the end of the system prompt. A run that resumes at one
of them repeats the arithmetic of a run from nothing, to the bit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from promptcache.kvcache.kv_quantization import KVSettings

# As in mlx-lm's generate_step.
DEFAULT_STEP_SIZE = 2048
# A rest of the prompt up to this long is read in one go with the last token, which
# saves a pass through the model; longer ones as mlx-lm does, because the logits of
# all their tokens would be computed.
JOINED_TOKENS = 64
# Templates open an answer with fewer: the role, the start of its thinking.
MAX_OPENING_TOKENS = 64


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Where the pieces of a prompt end, and so where another run can take over.

    From `exact_after` on a run repeats plain mlx-lm's arithmetic: pieces end at
    multiples of the step only, and only there can another prompt take over.

    Attributes:
        step_size: Most tokens in a piece.
        boundaries: Positions to cut at besides the multiples of `step_size`.
        exact_after: Position after which boundaries do not count, None for never.
        answer: Where the prompt's answer begins in history, None if not known.
        needs_checkpoint: Whether a run resumes from states only, which are taken at the
            ends of pieces.
    """

    step_size: int = DEFAULT_STEP_SIZE
    boundaries: tuple[int, ...] = ()
    exact_after: int | None = None
    answer: int | None = None
    needs_checkpoint: bool = False

    def is_sliceable(self, end: int) -> bool:
        """Return whether rows up to `end` may be cut at any token."""
        return self.exact_after is None or end <= self.exact_after

    def can_resume(self, position: int) -> bool:
        """Return whether other prompts may take over at a position."""
        return self.is_sliceable(position) or position % self.step_size == 0

    def last_resume_point(self, end: int) -> int:
        """Return the last position up to `end` at which other prompts may take over."""
        if self.can_resume(end):
            return end
        return max(end - end % self.step_size, self.exact_after or 0)

    def last_kept(self, num_tokens: int, kv: "KVSettings") -> int:
        """Return up to where a prompt is kept, to be resumed when it is repeated.

        Its last token is read alone. Where that cannot be taken back, or is not read as
        in longer prompts, what is kept ends before it.
        """
        if not self.is_sliceable(num_tokens):
            if self.needs_checkpoint:
                return self.last_before(num_tokens)
            return self.last_resume_point(num_tokens - 1)
        is_alone = self.needs_checkpoint or self.quantizes_at_end(num_tokens, kv)
        return num_tokens - is_alone

    def is_cut(self, position: int) -> bool:
        """Return whether a piece of every longer prompt ends at a position."""
        return position % self.step_size == 0 or self.is_boundary(position)

    def is_boundary(self, position: int) -> bool:
        """Return whether it is a cut because other prompts are likely to part there."""
        return position in self._places()

    def _places(self) -> list[int]:
        return [b for b in self.boundaries if self.is_sliceable(b)]

    def next_turn(self, end: int) -> int:
        """Return where the next turn is likely to part from a prompt read up to `end`.

        That is where its answer begins in history: a template may drop what was
        thought, and the tokens that open it. Where nobody knows, it is at a boundary
        just before the end, or at the end.
        """
        if self.answer is not None:
            return min(self.answer, end)
        near = (b for b in self._places() if end - MAX_OPENING_TOKENS <= b < end)
        return max(near, default=end)

    def segment_ends(self, end: int, kv: "KVSettings") -> tuple[int, ...]:
        """Return where segments of `[0, end)` have to end."""
        if self.exact_after is None:
            ends = {*range(DEFAULT_STEP_SIZE, end, DEFAULT_STEP_SIZE)}
        else:
            # Where `can_resume` is to hold.
            ends = {self.exact_after, *range(self.step_size, end, self.step_size)}
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
        if (
            self.needs_checkpoint
            or not self.is_sliceable(num_tokens)
            or self.quantizes_at_end(num_tokens, kv)
        ):
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


DEFAULT_PLAN = PrefillPlan()
