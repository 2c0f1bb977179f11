"""A request: what a generation is asked for."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from promptcache.engine.decode import LogitsProcessor, Sampler
from promptcache.tiers.prompt_read import PromptRead

# As in mlx-lm's speculative_generate_step.
DEFAULT_DRAFT_TOKENS = 2
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What a generation is asked for.

    Attributes:
        read: The prompt, and how it is read.
        max_tokens: Most tokens to generate, -1 for no limit.
        sampler: From log-probabilities to a token.
        logits_processors: Called with all tokens so far and the logits.
        on_progress: Called with the prompt tokens done so far and their total.
        num_draft_tokens: How many tokens a draft model proposes at once.
        save_answer: Whether to save the answer with the prompt.
        on_saved: Called with the key of what was saved.
        input_embeddings: What to read in place of the tokens' own embeddings, shape
            `(tokens, hidden)`; nothing is cached then.
    """

    read: PromptRead
    max_tokens: int
    sampler: Sampler
    logits_processors: list[LogitsProcessor]
    on_progress: Progress = lambda done, total: None
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS
    save_answer: bool = False
    on_saved: Callable[[str], None] = lambda key: None
    input_embeddings: mx.array | None = None
