"""A main model and its draft as one model."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from promptcache.errors import UsageError
from promptcache.kvcache.classes import parts_of, trim_limit


class DraftPair:
    """A main model and its draft as one model: what one reads, both read.

    Its cache is the main model's, followed by the draft's, as mlx-lm wants it.
    """

    def __init__(self, main: Any, draft: Any) -> None:
        self.main = main
        self.draft = draft
        # mlx-lm splits the cache after as many parts as the main model has layers,
        # which for some models is not how many parts its cache has.
        self.layers = make_prompt_cache(main)

    def make_cache(self) -> list[Any]:
        """Return a fresh cache for both, as `make_prompt_cache` wants it."""
        return [*make_prompt_cache(self.main), *make_prompt_cache(self.draft)]

    def modules(self) -> list[Any]:
        """Return the modules of both."""
        return [*self.main.modules(), *self.draft.modules()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Read tokens, shape `(1, tokens)`; return the main model's logits."""
        num_layers = len(self.layers)
        # Without a draft's part it is mlx-lm that runs the main model.
        if cache[num_layers:]:
            self.draft(tokens, cache=cache[num_layers:])
        logits: mx.array = self.main(tokens, cache=cache[:num_layers])
        return logits

    def check_trimmable(self, num_tokens: int) -> None:
        """Check that mlx-lm can take rejected tokens back out of both caches.

        It looks only whether the main model's fresh cache can be trimmed, and goes on
        with wrong tokens once a window has wrapped.

        Args:
            num_tokens: How many tokens the prompt and the answer have at most.

        Raises:
            UsageError: It cannot.
        """
        for _, part in parts_of(self.make_cache()):
            window = trim_limit(part)
            if num_tokens < window:
                continue
            limit = f" beyond its window of {window} tokens" if window else ""
            raise UsageError(
                "speculative decoding has to take tokens back, which a "
                f"{type(part).__name__} cannot{limit}, leave the draft model out"
            )
