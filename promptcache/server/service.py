"""The service: completions run on the engine, told event by event."""

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.sample_utils import make_logits_processors, make_sampler

from promptcache.engine.batch.run import Run
from promptcache.engine.decode import Step
from promptcache.engine.request import RequestState
from promptcache.engine.sampling import LogitsProcessor, Sampler, seeded
from promptcache.errors import UsageError
from promptcache.printable import printable
from promptcache.prompts.render import RenderedPrompt
from promptcache.server.answer import REASONING, AnswerParser, initial_state
from promptcache.server.completion import (
    Completion,
    Event,
    Finished,
    Progress,
    Started,
    Usage,
)
from promptcache.server.metrics import ServingMetrics
from promptcache.server.models import Models, ServedModel

# More characters a token than any text has on the average: a prompt that is too long
# even so need not be tokenized to be refused.
MOST_CHARACTERS_PER_TOKEN = 16
# Names of `Completion.sampling` by what makes use of them.
SAMPLER_NAMES = ("temp", "top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold")
REQUESTS = logging.getLogger("promptcache.requests")


class BadRequestError(UsageError):
    """A request asks for what this model or this server cannot do.

    Attributes:
        param: The field that is wrong.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLongError(UsageError):
    """A prompt has more tokens than the server takes."""


@dataclass
class _Tally:
    """What a completion has come to, for its usage and for the log."""

    started_at: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tier: str = ""
    first_token_seconds: float | None = None
    completion_tokens: int = 0

    def usage(self, parsers: "list[AnswerParser]") -> Usage:
        return Usage(
            self.prompt_tokens,
            self.cached_tokens,
            sum(parser.num_tokens for parser in parsers),
            sum(parser.num_reasoning for parser in parsers),
        )


class _Listener:
    """Hands what happens to one answer from the engine's thread to the event loop."""

    def __init__(
        self,
        parser: AnswerParser,
        tally: _Tally,
        metrics: ServingMetrics,
        post: Callable[[Any], None],
    ) -> None:
        self._parser = parser
        self._tally = tally
        self._metrics = metrics
        self._post = post
        self._has_begun = False

    def on_start(self, state: RequestState) -> None:
        fetched = state.fetched
        num_new = self._tally.prompt_tokens - fetched.cached_tokens
        if fetched.tier:
            self._metrics.hit(fetched.tier, fetched.cached_tokens, num_new)
        else:
            self._metrics.miss(num_new)
        if self._tally.tier == "":
            self._tally.tier = fetched.tier or "none"
            self._tally.cached_tokens = fetched.cached_tokens

    def on_token(self, step: Step, finish_reason: str | None) -> bool:
        if not self._has_begun:
            self._has_begun = True
            if self._tally.first_token_seconds is None:
                seconds = time.perf_counter() - self._tally.started_at
                self._tally.first_token_seconds = seconds
                self._post(Started(self._tally.usage([])))
        for event in self._parser.take(step, finish_reason):
            self._post(event)
        return not self._parser.is_done

    def on_end(self, error: Exception | None) -> None:
        self._post(_End(error))


@dataclass(frozen=True)
class _End:
    """An answer has ended, and perhaps why."""

    error: Exception | None


class CompletionService:
    """Runs completions for clients, each in a namespace."""

    def __init__(
        self,
        models: Models,
        options: Namespace,
        metrics: ServingMetrics,
        *,
        save_answers: bool,
    ) -> None:
        self._models = models
        self._options = options
        self._metrics = metrics
        self._save_answers = save_answers
        # Rendering and tokenizing, which take a core each.
        self._rendering = asyncio.Semaphore(4)

    async def events(
        self, completion: Completion, namespace: str, client: str = "-"
    ) -> AsyncIterator[Event]:
        """Yield what happens to a completion; closed early, it is cancelled.

        Raises:
            UsageError: It makes no sense, or is not supported.
            ModelError: Its model cannot be loaded, or has changed.
        """
        tally = _Tally()
        try:
            async with self._models.use(completion) as served:
                async for event in self._run(served, completion, namespace, tally):
                    yield event
        finally:
            self._log(client, completion, tally)

    async def num_tokens(self, completion: Completion) -> int:
        """Return how many tokens a completion's prompt has; raises as `events` does."""
        async with self._models.use(completion) as served, self._rendering:
            prompt = await asyncio.to_thread(self.render, served, completion)
        return len(prompt.token_ids)

    async def _run(
        self,
        served: ServedModel,
        completion: Completion,
        namespace: str,
        tally: _Tally,
    ) -> AsyncIterator[Event]:
        async with self._rendering:
            prompt = await asyncio.to_thread(self.render, served, completion)
        tally.prompt_tokens = len(prompt.token_ids)
        yield Progress(0, tally.prompt_tokens)
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

        def post(event: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        def on_progress(done: int, total: int) -> None:
            post(Progress(done, total))

        parsers = [
            self._parser(served, completion, prompt, index)
            for index in range(completion.num_answers)
        ]
        listeners = [
            _Listener(parser, tally, self._metrics, post) for parser in parsers
        ]

        def submit() -> list[Run]:
            return [
                served.engine.submit(
                    prompt,
                    completion.max_tokens or self._options.max_tokens,
                    listener,
                    prompt_progress_callback=on_progress,
                    **self._options_of(served, completion, prompt, namespace, index),
                )
                for index, listener in enumerate(listeners)
            ]

        runs = await asyncio.to_thread(submit)
        try:
            num_left = len(runs)
            while num_left:
                event = await queue.get()
                if not isinstance(event, _End):
                    yield event
                    continue
                if event.error is not None:
                    raise event.error
                num_left -= 1
            yield Finished(tally.usage(parsers))
        finally:
            for run in runs:
                served.engine.cancel(run)
            tally.completion_tokens = sum(p.num_tokens for p in parsers)

    def render(self, served: ServedModel, completion: Completion) -> RenderedPrompt:
        """Return a completion's prompt as token ids. Raises UsageError."""
        generator, most = served.generator, served.most_tokens
        if completion.messages is not None:
            prompt: Any = completion.messages
            size = sum(_num_characters(m.get("content")) for m in completion.messages)
        else:
            prompt = completion.prompt or ""
            size = len(prompt) if isinstance(prompt, str) else 0
        if most is not None and size > most * MOST_CHARACTERS_PER_TOKEN:
            raise PromptTooLongError(
                f"this model takes at most {most} tokens, and the prompt has {size} "
                "characters"
            )
        tools = None if completion.tool_choice == "none" else completion.tools
        rendered = generator.render(
            prompt,
            tools or None,
            {**self._options.chat_template_args, **completion.chat_template_config},
        )
        num_tokens = len(rendered.token_ids)
        if most is not None and num_tokens >= most:
            raise PromptTooLongError(
                f"this model takes at most {most} tokens, and the prompt has "
                f"{num_tokens}"
            )
        return rendered

    def _parser(
        self,
        served: ServedModel,
        completion: Completion,
        prompt: RenderedPrompt,
        index: int,
    ) -> AnswerParser:
        if completion.tool_choice not in ("auto", "none"):
            raise BadRequestError(
                f"tool_choice {completion.tool_choice} is not supported", "tool_choice"
            )
        return AnswerParser(
            served.generator.tokenizer,
            prompt.token_ids,
            tools=completion.tools,
            stop=completion.stop,
            top_logprobs=completion.top_logprobs,
            index=index,
            is_chat=completion.messages is not None,
        )

    def _options_of(
        self,
        served: ServedModel,
        completion: Completion,
        prompt: RenderedPrompt,
        namespace: str,
        index: int,
    ) -> dict[str, Any]:
        """Return how to read and to answer. Raises UsageError."""
        is_chat = completion.messages is not None
        return {
            **served.read_options,
            "namespace": namespace,
            "sampler": self._sampler(served, completion, index),
            "logits_processors": [
                *_logits_processors(served, completion),
                *_constraints(served, completion, prompt),
            ],
            "num_draft_tokens": self._options.num_draft_tokens
            if completion.num_draft_tokens is None
            else completion.num_draft_tokens,
            # Chats go on; other short prompts cost less to read than to keep.
            "save": is_chat or "auto",
            "save_answer": self._save_answers and is_chat,
            "on_recorded": self._metrics.save_seconds,
        }

    def _sampler(
        self, served: ServedModel, completion: Completion, index: int
    ) -> Sampler:
        defaults = {name: getattr(self._options, name, 0) for name in SAMPLER_NAMES[:4]}
        given = {**defaults, **completion.sampling}
        if given["top_k"] >= served.vocab_size:
            raise BadRequestError(
                f"top_k must be less than {served.vocab_size}, the size of the "
                "vocabulary",
                "top_k",
            )
        tokenizer = served.generator.tokenizer
        sampler: Sampler = make_sampler(
            given["temp"],
            given["top_p"],
            given["min_p"],
            top_k=given["top_k"],
            xtc_probability=given.get("xtc_probability", 0.0),
            xtc_threshold=given.get("xtc_threshold", 0.1),
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        )
        seed = given.get("seed")
        return sampler if seed is None else seeded(sampler, (seed + index) % 2**64)

    def _log(self, client: str, completion: Completion, tally: _Tally) -> None:
        first = tally.first_token_seconds
        REQUESTS.info(
            "%s: %s, prompt %d tokens (%d from %s), answer %d, first token %s, %.2f s",
            client,
            printable(completion.model),
            tally.prompt_tokens,
            tally.cached_tokens,
            tally.tier or "nowhere",
            tally.completion_tokens,
            "-" if first is None else f"{first:.2f} s",
            time.perf_counter() - tally.started_at,
        )


def _num_characters(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    return sum(len(part["text"]) for part in content or ())


def _logits_processors(
    served: ServedModel, completion: Completion
) -> list[LogitsProcessor]:
    """Return what changes the logits. Raises BadRequestError."""
    given = completion.sampling
    for token_id in completion.logit_bias:
        if not 0 <= token_id < served.vocab_size:
            raise BadRequestError(f"logit_bias has no token {token_id}", "logit_bias")
    arguments = [
        given.get(f"{kind}_{what}", default)
        for kind in ("repetition", "presence", "frequency")
        for what, default in (("penalty", 0.0), ("context_size", 20))
    ]
    bias = dict(completion.logit_bias) or None
    processors: list[LogitsProcessor] = make_logits_processors(bias, *arguments)
    return processors


def _constraints(
    served: ServedModel, completion: Completion, prompt: RenderedPrompt
) -> list[LogitsProcessor]:
    """Return what makes an answer match its schema. Raises UsageError."""
    if completion.json_schema is None:
        return []
    state = initial_state(served.generator.tokenizer, prompt.token_ids)
    is_thinking = state == REASONING
    constraint = served.constraints.of_schema(
        completion.json_schema, is_thinking=is_thinking
    )
    return [constraint]
