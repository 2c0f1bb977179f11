"""A run: a request on its way through the scheduler."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, Self

import mlx.core as mx

from promptcache.engine.batch.decode_batch import Joining
from promptcache.engine.decode import Step
from promptcache.engine.generation import Generation
from promptcache.engine.request import RequestState
from promptcache.engine.sampling import LogitsProcessor, Sampler, greedy
from promptcache.errors import ModelError
from promptcache.models.loaded import LoadedModel
from promptcache.segments.chain import common_length, pack
from promptcache.segments.fingerprint import Fingerprint
from promptcache.tiers.prompt_read import PromptRead


class Listener(Protocol):
    """Who asked. It is told on the thread that generates, which must not wait."""

    def on_start(self, state: RequestState) -> None:
        """Take where the prompt starts: what is cached of it has been loaded."""

    def on_token(self, step: Step, finish_reason: str | None) -> bool:
        """Take a token, and why it is the last; return whether to go on."""

    def on_end(self, error: Exception | None) -> None:
        """Take that nothing more comes, and why, if that is an error."""


@dataclass(eq=False)
class Run:
    """A request on its way: queued, loading, reading, decoding, and being saved.

    Attributes:
        generation: The request, and how far it has come.
        listener: Who asked for it.
        fingerprint: What its KV values depend on, None if nothing is cached.
        is_sliceable: Whether its cache can be taken over at any token.
        is_cancelled: Whether nobody waits for it any more; may be set on any thread.
        is_sharing: Whether what it loads stays in memory for others.
        loading: Done when what is cached of it has been loaded.
        pieces: Its prompt's pieces, while it is read.
        steps: Its tokens, while it is decoded alone.
        waited: How many pieces of others were read since one of its own.
        error: What its sampler or a logits processor has raised in a batch.
        has_answer: Whether a token of it has been handed out.
        has_waited: Whether it had to wait for others.
        ends_at: When to tell that it has ended, whether it is saved by then or not.
        is_told: Whether that has been told.
    """

    generation: Generation
    listener: Listener
    fingerprint: Fingerprint | None
    is_sliceable: bool
    is_cancelled: bool = False
    is_sharing: bool = False
    loading: "Future[None] | None" = None
    pieces: Iterator[None] | None = None
    steps: Iterator[Step] | None = None
    waited: int = 0
    error: Exception | None = None
    has_answer: bool = False
    has_waited: bool = False
    ends_at: float = 0.0
    is_told: bool = False

    @classmethod
    def of(cls, generation: Generation, listener: Listener, model: LoadedModel) -> Self:
        """Return a request that is going to run on a model."""
        settings = generation.request.read.settings
        fingerprint = None
        # Without an identity nothing is cached, nor shared.
        with suppress(ModelError):
            fingerprint = model.fingerprint(settings)
        return cls(generation, listener, fingerprint, model.is_sliceable(settings))

    @property
    def read(self) -> PromptRead:
        """Return its prompt, and how it is read."""
        return self.generation.request.read

    @cached_property
    def data(self) -> bytes:
        """Return the prompt's token ids, packed."""
        return pack(self.read.token_ids)

    @property
    def num_read(self) -> int:
        """Return up to where its prompt has been read, 0 before it is loaded."""
        state = getattr(self.generation, "state", None)
        return max(state.num_read, state.fetched.cached_tokens) if state else 0

    def takes_away(self, other: "Run") -> bool:
        """Return whether it is loading what another prompt could have from memory."""
        return not self.is_sharing and bool(self.shareable(other))

    def shareable(self, other: "Run") -> int:
        """Return how much of another prompt it is going to have read.

        That is the last place at which the other can take over.
        """
        if self.fingerprint is None or other.fingerprint is None:
            return 0
        if self.fingerprint.digest != other.fingerprint.digest:
            return 0
        plan = self.read.plan
        shared = min(common_length(self.data, other.data), other.read.num_tokens - 1)
        last = self.read.num_tokens - 1
        if self.is_sliceable:
            return plan.last_resume_point(min(shared, last))
        pieces = (end for _, end in plan.pieces(self.num_read, last))
        ends = (end for end in (self.num_read, *pieces) if end <= shared)
        return max(filter(plan.can_resume, ends), default=0)


def joining_of(run: Run) -> Joining[Run]:
    """Return a request as a batch takes it in, between two of its tokens."""
    state, request = run.generation.state, run.generation.request
    return Joining(
        run,
        state.fetched.cache,
        [*run.read.token_ids, *state.answer[:-1]],
        state.answer[-1],
        _guarded_sampler(run, request.sampler),
        [_guarded_processor(run, p) for p in request.logits_processors],
    )


def _guarded_sampler(run: Run, sampler: Sampler) -> Sampler:
    """Return a sampler whose errors are the request's, and not the batch's."""
    if sampler is greedy:
        # It cannot fail, and is called once for all that have it.
        return sampler

    def sample(logprobs: mx.array) -> mx.array:
        try:
            return sampler(logprobs)
        except Exception as error:
            run.error = error
            return mx.argmax(logprobs, axis=-1)

    return sample


def _guarded_processor(run: Run, process: LogitsProcessor) -> LogitsProcessor:
    """Return a logits processor whose errors are the request's."""

    def processed(tokens: mx.array, logits: mx.array) -> mx.array:
        try:
            return process(tokens, logits)
        except Exception as error:
            run.error = error
            return logits

    return processed
