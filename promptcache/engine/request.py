"""A request: what a generation is asked for, and how far it has come."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from promptcache.engine.sampling import LogitsProcessor, Sampler
from promptcache.tiers.prefix_cache import FetchedPrefix
from promptcache.tiers.prompt_read import PromptRead
from promptcache.tiers.prompt_saver import PromptSaver

# As in mlx-lm's speculative_generate_step.
DEFAULT_DRAFT_TOKENS = 2
Progress = Callable[[int, int], None]


def ignore_progress(done: int, total: int) -> None:
    """Take progress, and show nothing."""


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
        on_recorded: Called on the writer's thread with how long it would have taken to
            read what was cached, when that was noted; not by `Generation.stream`.
        input_embeddings: What to read in place of the tokens' own embeddings, shape
            `(tokens, hidden)`; nothing is cached then.
    """

    read: PromptRead
    max_tokens: int
    sampler: Sampler
    logits_processors: list[LogitsProcessor]
    on_progress: Progress = ignore_progress
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS
    save_answer: bool = False
    on_saved: Callable[[str], None] = lambda key: None
    on_recorded: Callable[[float], None] = lambda seconds: None
    input_embeddings: mx.array | None = None


@dataclass(slots=True)
class RequestState:
    """How far a request has come: all that changes while it runs.

    Attributes:
        fetched: Where it starts.
        saver: What saves its prompt.
        started_at: When it was begun, by `time.perf_counter`.
        loaded_at: When what is cached was loaded.
        num_read: Up to where its prompt has been read.
        num_pieced: Up to where it has been read in pieces that can be saved.
        timed: Tokens that the model read in pieces, and the seconds that took.
        logits: Those after the prompt, shape `(1, vocabulary)`, once it was read.
        answers_at: When the first token came.
        answer: The tokens generated so far.
        num_answered: How many of them the cache is known to hold.
        has_changed: Whether the model is no longer what it was at the start.
    """

    fetched: FetchedPrefix
    saver: PromptSaver
    started_at: float
    loaded_at: float = field(default_factory=time.perf_counter)
    num_read: int = 0
    num_pieced: int = 0
    timed: tuple[int, float] = (0, 0.0)
    logits: mx.array | None = None
    answers_at: float = 0.0
    answer: list[int] = field(default_factory=list)
    num_answered: int = 0
    has_changed: bool = False

    @property
    def has_answer(self) -> bool:
        """Return whether the prompt has been read to its end, and an answer begun."""
        return bool(self.answer)

    @property
    def prefill_seconds(self) -> float:
        """Return the time from loading to the first token."""
        return self.answers_at - self.loaded_at

    @property
    def load_seconds(self) -> float:
        """Return the time it took to find and load what is cached."""
        return self.loaded_at - self.started_at
