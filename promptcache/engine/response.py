"""The response: what a generation yields for each token."""

from dataclasses import dataclass

from mlx_lm.generate import GenerationResponse as PlainResponse

from promptcache.store.types import LoadEstimate


@dataclass
class GenerationResponse(PlainResponse):
    """One step of a generation: mlx-lm's response and what the cache did.

    `prompt_tokens` counts the whole prompt. `prompt_tps` is the speed at which the
    tokens that were not cached were processed.

    Attributes:
        cached_tokens: Tokens of the prompt that were not processed again.
        load_seconds: Time to match the prompt and to load what is cached.
        prefill_seconds: From then to the first token.
        key: With the last response, the key of the longest stored prefix of the
            prompt, or None.
        saved_seconds: With the last response, how long it would have taken to process
            the cached tokens, at this model's speed on this machine; 0 if unknown.
        declined: Why cached tokens were processed again all the same: that is faster
            here. None if they were not.
    """

    cached_tokens: int = 0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    key: str | None = None
    saved_seconds: float = 0.0
    declined: LoadEstimate | None = None

    @property
    def ttft_seconds(self) -> float:
        """Return the time from the start of matching to the first token."""
        return self.load_seconds + self.prefill_seconds
