"""A request: what a generation is asked for, and what follows from that alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from promptcache.prefill import Cuts, KVSettings
from promptcache.sampling import LogitsProcessor, Sampler
from promptcache.types import Match, Origin

# Below this, prefilling again costs less than it is worth to keep: a second on
# the slow machines, and 24 MB of SmolLM2's cache.
AUTO_SAVE_TOKENS = 512

# As in mlx-lm's speculative_generate_step.
DEFAULT_DRAFT_TOKENS = 2

SavePolicy = bool | Literal["auto"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What a generation is asked for.

    Attributes:
        token_ids: The whole prompt.
        max_tokens: Most tokens to generate, -1 for no limit.
        save: Whether to save the prompt.
        reuse: Whether to look for cached prefixes.
        sampler: From log-probabilities to a token.
        logits_processors: Called with all tokens so far and the logits.
        cuts: Where the pieces of the prefill end.
        kv: When to quantize keys and values.
        origin: How the prompt was rendered.
        on_progress: Called with the prompt tokens done so far and their total.
        max_kv_size: Most tokens to keep in the cache; see `make_prompt_cache`.
        draft_model: A smaller model that proposes tokens.
        num_draft_tokens: How many it proposes at once.
        on_match: Called with what is reused.
        save_answer: Whether to save the answer with the prompt.
        on_saved: Called with the key of what was saved.
        input_embeddings: What to read in place of the tokens' own embeddings, shape
            `(tokens, hidden)`; nothing is cached then.
        store_bits: In how many bits keys and values are stored, None for their own.
    """

    token_ids: list[int]
    max_tokens: int
    save: SavePolicy
    reuse: bool
    sampler: Sampler
    logits_processors: list[LogitsProcessor]
    cuts: Cuts
    kv: KVSettings
    origin: Origin | None = None
    on_progress: Progress = lambda done, total: None
    max_kv_size: int | None = None
    draft_model: Any = None
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS
    on_match: Callable[[Match], None] = lambda match: None
    save_answer: bool = False
    on_saved: Callable[[str], None] = lambda key: None
    input_embeddings: mx.array | None = None
    store_bits: int | None = None

    @property
    def num_tokens(self) -> int:
        """Return the length of the prompt."""
        return len(self.token_ids)

    @property
    def num_saved(self) -> int:
        """Return how much of the prompt is saved, if it is.

        Speculation reads the last token itself, and rows that are quantized as they
        are written cannot be kept together with others.
        """
        if self.draft_model is not None:
            return self.cuts.last_resumable(self.num_tokens - 1)
        return self.num_tokens - self.cuts.quantizes_at_end(self.num_tokens, self.kv)

    @property
    def uses_hot(self) -> bool:
        """Return whether the run's cache holds what a run from nothing would hold.

        It may not where keys and values are quantized from some length on.
        """
        return self.reuse and self.kv.bits is None and self.draft_model is None

    def is_due(self, match: Match) -> bool:
        """Return whether what the store lacks of the prompt is to be saved."""
        if self.save == "auto":
            return self.num_tokens - match.cached_tokens >= AUTO_SAVE_TOKENS
        return bool(self.save)
