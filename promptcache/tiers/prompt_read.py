"""A prompt and how it is read: all that fetching and saving has to know of a run."""

from dataclasses import dataclass
from typing import Literal

from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.models.settings import Settings
from promptcache.segments.types import Match, PromptOrigin

# Below this, prefilling again costs less than it is worth to keep: a second on
# the slow machines, and 24 MB of SmolLM2's cache.
AUTO_SAVE_TOKENS = 512
SavePolicy = bool | Literal["auto"]


@dataclass(frozen=True, slots=True)
class PromptRead:
    """A prompt, and how a run reads it.

    Attributes:
        token_ids: The whole prompt.
        plan: Where the pieces of the prefill end.
        settings: What KV values depend on besides the model and the token ids.
        origin: How the prompt was rendered, or None for text and token ids.
        reuse: Whether to look for cached prefixes.
        save: Whether to save the prompt.
        can_be_stored: Whether its values depend on the token ids.
    """

    token_ids: list[int]
    plan: PrefillPlan
    settings: Settings
    origin: PromptOrigin | None = None
    reuse: bool = True
    save: SavePolicy = False
    can_be_stored: bool = True

    @property
    def num_tokens(self) -> int:
        """Return the length of the prompt."""
        return len(self.token_ids)

    @property
    def kv(self) -> KVSettings:
        """Return when keys and values are quantized."""
        return self.settings.kv

    @property
    def is_drafted(self) -> bool:
        """Return whether a draft model reads it, too."""
        return self.settings.draft_model is not None

    @property
    def num_saved(self) -> int:
        """Return how much of the prompt is saved, if it is."""
        if self.is_drafted:
            # Speculation reads the last token itself.
            return self.plan.last_resume_point(self.num_tokens - 1)
        return self.plan.last_kept(self.num_tokens, self.kv)

    @property
    def uses_memory(self) -> bool:
        """Return whether the run's cache holds what a run from nothing would hold.

        It may not where keys and values are quantized from some length on.
        """
        return self.reuse and self.kv.bits is None

    def is_due(self, match: Match) -> bool:
        """Return whether what the store lacks of the prompt is to be saved."""
        if self.save == "auto":
            return self.num_tokens - match.cached_tokens >= AUTO_SAVE_TOKENS
        return bool(self.save)
