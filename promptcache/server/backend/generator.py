"""The response generator: mlx-lm's, with prompts that know whose they are.

mlx-lm's loop takes requests from it, one after the other, on the thread that
generates. Requests for what another one is reading right now are held back there.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from queue import Empty, Queue
from typing import Any

import mlx.core as mx

from promptcache.errors import UsageError
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.prompts.render import RenderedPrompt, render_prompt
from promptcache.server.backend.compat import ResponseGenerator, TimeBudget
from promptcache.server.backend.model_provider import (
    IdentifiedModelProvider,
    ModelKey,
    ServedModel,
    UnavailableError,
)
from promptcache.server.backend.prompt_cache import ServerPromptCache
from promptcache.server.backend.request_state import (
    ClientDisconnectedError,
    RequestState,
    RequestTokens,
    ServedRequest,
)
from promptcache.server.backend.single_flight import (
    MIN_SHARED_TOKENS,
    Job,
    SingleFlight,
)
from promptcache.server.http.validation import check_vocabulary
from promptcache.tiers.prompt_read import PromptRead

# How often a thread that waits for an answer looks whether its client still does.
LISTEN_SECONDS = 0.25
# What the end of an answer waits for its prefix to be stored: it has been told by
# then, and a disk that takes longer shall not keep the client.
SAVE_SECONDS = 0.5


class PromptTooLongError(UsageError):
    """A prompt has more tokens than the server takes."""


class CachedResponseGenerator(ResponseGenerator):
    """Generates as mlx-lm does, from prefixes in memory and on disk."""

    def __init__(
        self, provider: IdentifiedModelProvider, cache: ServerPromptCache
    ) -> None:
        self._cache = cache
        self._flight = SingleFlight(self._must_wait)
        cache.on_kept = self._flight.look
        self._listener = _ConnectionMonitor()
        super().__init__(provider, cache)
        self._time_budget = _StepBudget(self._is_wanted)

    # On the threads of clients

    def generate(
        self,
        request: ServedRequest,
        generation_args: Any,
        progress_callback: Callable[[int, int], None] | None = None,
    ) -> tuple[Any, Iterator[Any]]:
        """Return the context of a request, and its answer token by token."""
        if self.model_provider.knows(generation_args.model.model):
            generation_args.model.model = "default_model"
        self._listener.listen(request)
        try:
            self._ensure_here(generation_args)
            context, answer = super().generate(
                request, generation_args, progress_callback
            )
        except Exception as error:
            request.error = error
            raise
        return context, self._answer(request, answer)

    def _ensure_here(self, args: Any) -> None:
        """Get another model's files while others go on. Raises ModelError."""
        key = self._key_of(args)
        if key != self.model_provider.model_key:
            self.model_provider.ensure_downloaded(key)

    def _answer(self, request: ServedRequest, answer: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from answer
        except Exception as error:
            request.error = error
            raise
        if request.reading is not None:
            # One that is killed now loses nothing.
            with contextlib.suppress(TimeoutError):
                request.reading.settled.result(SAVE_SECONDS)

    def _await_response(self, response_queue: "Queue[Any]") -> Any:
        while True:
            self._listener.check()
            try:
                return response_queue.get(timeout=LISTEN_SECONDS)
            except Empty:
                if not self.generation_available():
                    raise UnavailableError("the server cannot generate") from None

    # On the thread that generates

    def _run_generate(self) -> None:
        super()._run_generate()
        self._cache.finish()
        # MLX's threads of a thread that has ended may abort the process when that
        # ends; see https://github.com/ml-explore/mlx/issues/4327.
        mx.clear_streams()

    def _next_request(self, timeout: float | None = None) -> Job | None:
        self._cache.advance()
        job = self._flight.release()
        if job is None:
            job = super()._next_request(timeout)
            if job is not None and not job[1].over.is_set():
                reading = self._prepare(job)
                if reading is not None and self._flight.holds(job, reading):
                    self._cache.metrics.wait()
                    job = None
        self._cache.num_waiting = len(self._flight)
        return None if job is None or job[1].over.is_set() else job

    def _prepare(self, job: Job) -> RequestState | None:
        """Tokenize a request for the current model, to see what it needs."""
        _, request, args = job
        current = self.model_provider.current
        if current is None or self._key_of(args) != self.model_provider.model_key:
            return None
        try:
            self._tokenize(current.tokenizer, request, args)
        except Exception:
            # It is told when its turn comes.
            return None
        return request.reading

    def _key_of(self, args: Any) -> ModelKey:
        """Return which model a request asks for."""
        provider: IdentifiedModelProvider = self.model_provider
        return provider.key_of(args.model.model, args.model.adapter, args.model.draft)

    def _must_wait(self, reading: RequestState) -> bool:
        """Return whether what a prompt needs is being read, or memory is short."""
        if not self._cache.has_room_for(reading):
            return True
        usable = [other.usable_by(reading) for other in self._cache.reading()]
        most = max(usable, default=0)
        if most < MIN_SHARED_TOKENS:
            return False
        return most - self._cache.num_cached(reading) >= MIN_SHARED_TOKENS

    def _is_wanted(self) -> bool:
        """Return whether a request can be taken in before the others go on."""
        return self._flight.is_due() or not self.requests.empty()

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        if request.tokenized is None or request.tokenized[0] is not tokenizer:
            request.tokenized = (tokenizer, *self._tokenized(tokenizer, request, args))
        _, prompt, segments, *rest = request.tokenized
        # mlx-lm takes pieces off these.
        return prompt, [*segments], [*rest[0]], *rest[1:]

    def _tokenized(self, tokenizer: Any, request: ServedRequest, args: Any) -> Any:
        current = self.model_provider.current
        assert current is not None
        check_vocabulary(args, current.vocab_size)
        model = current.loaded
        settings = replace(current.settings, namespace=request.namespace)
        rendered = self._rendered(current, request, args)
        tokenized = super()._tokenize(tokenizer, request, args)
        token_ids, segments, _, state, vision = tokenized
        _check_length(len(token_ids), current.most_tokens)
        model.check_token_ids(token_ids, draft_model=settings.draft_model)
        if vision is not None:
            return tokenized
        if rendered is None or rendered.token_ids != token_ids:
            rendered = _plainly_rendered(token_ids, segments)
        is_sliceable = model.is_sliceable(settings)
        places = (rendered.system_end,) if is_sliceable else rendered.boundaries
        plan = model.plan(settings, places, rendered.answer)
        request.reading = RequestState(
            PromptRead(token_ids, plan, settings, rendered.origin),
            model,
            model.fingerprint(settings),
            rendered.system_end,
            args.max_tokens,
            request.over,
            is_sliceable=is_sliceable,
        )
        prompt = RequestTokens(token_ids, request.reading)
        pieces, kinds = _pieces(token_ids, plan, rendered.system_end)
        return prompt, pieces, kinds, state, vision

    def _rendered(
        self, current: ServedModel, request: ServedRequest, args: Any
    ) -> RenderedPrompt | None:
        """Return the prompt with the places where it is worth resuming."""
        tokenizer = current.tokenizer
        if request.request_type != "chat" or not tokenizer.has_chat_template:
            return None
        config = self.cli_args.chat_template_args | (args.chat_template_kwargs or {})
        # It takes less than mlx-lm does, images for one.
        with contextlib.suppress(UsageError):
            return render_prompt(
                tokenizer,
                request.messages,
                tools=request.tools,
                chat_template_config=config,
                every_message=current.loaded.needs_checkpoints(current.settings),
            )
        return None

    def _serve_single(self, request: Job, stream: Any) -> None:
        answers, served, args = request
        super()._serve_single(
            (_CancellableQueue(answers, served), served, args), stream
        )


def _check_length(num_tokens: int, most_tokens: int | None) -> None:
    if not num_tokens:
        raise UsageError("the prompt is empty")
    if most_tokens is not None and num_tokens >= most_tokens:
        raise PromptTooLongError(
            f"this model takes at most {most_tokens} tokens, and the prompt has "
            f"{num_tokens}"
        )


def _plainly_rendered(
    token_ids: list[int], segments: list[list[int]]
) -> RenderedPrompt:
    """Return a prompt with mlx-lm's own segments as places to resume."""
    ends = [sum(map(len, segments[:i])) for i in range(1, len(segments))]
    return RenderedPrompt(token_ids, tuple(ends), system_end=ends[0] if ends else 0)


def _pieces(
    token_ids: list[int], plan: PrefillPlan, head: int
) -> tuple[list[list[int]], list[str]]:
    """Return a prompt in the pieces it is read in, and what mlx-lm calls them."""
    spans = [*plan.pieces(0, len(token_ids))]
    kinds = ["system" if end <= head else "user" for _, end in spans]
    return [token_ids[start:end] for start, end in spans], kinds


class _CancellableQueue:
    """A queue of answers that ends a prefill when nobody waits for it."""

    def __init__(self, queue: "Queue[Any]", request: ServedRequest) -> None:
        self._queue = queue
        self._request = request

    def put(self, item: Any) -> None:
        # Only progress is told as a pair; an answer has to be put to its end.
        if isinstance(item, tuple) and self._request.over.is_set():
            raise ClientDisconnectedError("the client hung up")
        self._queue.put(item)


class _ConnectionMonitor:
    """Knows which client each thread serves."""

    def __init__(self) -> None:
        self._local = threading.local()

    def listen(self, request: ServedRequest) -> None:
        self._local.request = request

    def check(self) -> None:
        """Raise HungUpError if the client of this thread is gone."""
        self._local.request.check_connected()


class _StepBudget(TimeBudget):
    """mlx-lm's turn of generating, which ends early for a request that can start."""

    def __init__(self, is_wanted: Callable[[], bool]) -> None:
        super().__init__()
        self._is_wanted = is_wanted
        self._is_first = True

    def __iter__(self) -> Any:
        self._is_first = True
        return super().__iter__()

    def __next__(self) -> None:
        # One step is always taken, as nothing else may be taken in at present.
        if not self._is_first and self._is_wanted():
            raise StopIteration
        self._is_first = False
        super().__next__()
