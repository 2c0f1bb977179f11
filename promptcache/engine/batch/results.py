"""Batch results: the answers to many prompts at once."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import mlx.core as mx
from mlx_lm.generate import BatchResponse as PlainResponse
from mlx_lm.generate_utils import BatchStats

from promptcache.engine.batch.admission import MIN_SHARED_TOKENS
from promptcache.engine.batch.engine import Engine
from promptcache.engine.decode import Step
from promptcache.engine.options import GenerateOptions
from promptcache.engine.request import RequestState
from promptcache.engine.response import GenerationResponse, Responses
from promptcache.errors import PromptCacheError
from promptcache.models.text_model import TextModel
from promptcache.prompts.render import RenderedPrompt
from promptcache.segments.chain import common_length, pack

# What is wrong with a prompt, in its place.
Failed = PromptCacheError


@dataclass(slots=True)
class BatchResult:
    """The answer to one of a batch's prompts.

    Attributes:
        index: Which of the prompts it is, counted from 0.
        text: The whole answer.
        token_ids: Its tokens, without the one that ended it.
        logprobs: The log-probability of each of them.
        last: The last response, None if nothing was generated.
        error: Why there is no answer, or why it ends early; None if all went well.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    last: GenerationResponse | None = None
    error: Exception | None = None


@dataclass
class BatchResponse(PlainResponse):
    """The answers to a batch: mlx-lm's response, and what the cache did.

    Attributes:
        cached_tokens: By prompt, how many of its tokens were not read again.
    """

    cached_tokens: list[int] = field(default_factory=list)


class _Collector:
    """Collects one answer, and hands it over at its end."""

    def __init__(
        self,
        result: BatchResult,
        responses_of: Callable[[RequestState], Responses],
        on_result: Callable[[BatchResult], None],
    ) -> None:
        self._result = result
        self._responses_of = responses_of
        self._on_result = on_result
        self._responses: Responses | None = None

    def on_start(self, state: RequestState) -> None:
        self._responses = self._responses_of(state)

    def on_token(self, step: Step, finish_reason: str | None) -> bool:
        assert self._responses is not None
        result, response = self._result, self._responses.of(step, finish_reason)
        result.last = response
        result.text += response.text
        if finish_reason != "stop":
            result.token_ids.append(step.token)
            result.logprobs.append(step.logprobs[step.token].item())
        return True

    def on_end(self, error: Exception | None) -> None:
        self._result.error = error
        self._on_result(self._result)


def _with_shared_boundaries(
    prompts: Sequence[RenderedPrompt | Failed],
) -> list[RenderedPrompt | Failed]:
    """Return prompts with a boundary where each parts from the others.

    A model that is resumed at checkpoints reads what they share once only with one.
    """
    known = [(i, p) for i, p in enumerate(prompts) if isinstance(p, RenderedPrompt)]
    known.sort(key=lambda pair: pair[1].token_ids)
    result = [*prompts]
    for (i, left), (j, right) in pairwise(known):
        end = common_length(pack(left.token_ids), pack(right.token_ids))
        for index, prompt in ((i, left), (j, right)):
            if MIN_SHARED_TOKENS <= end < len(prompt.token_ids):
                before = result[index]
                assert isinstance(before, RenderedPrompt)
                boundaries = tuple(sorted({*before.boundaries, end}))
                result[index] = before._replace(boundaries=boundaries)
    return result


def run_batch(
    engine: Engine,
    model: TextModel,
    prompts: Sequence[RenderedPrompt | Failed],
    limits: Sequence[int],
    options: GenerateOptions,
) -> Iterator[BatchResult]:
    """Answer prompts together, and yield the result of each as it ends.

    Those that begin alike are read one after the other, so that each finds what the one
    before has read. When the iterator is closed, what is not done is given up.

    Args:
        engine: What runs them; it is closed at the end.
        model: The model that it runs.
        prompts: The prompts, or why there is none.
        limits: Of each, how many tokens to generate at most.
        options: The options of all.
    """
    done: deque[BatchResult] = deque()
    if not model.loaded.is_sliceable():
        prompts = _with_shared_boundaries(prompts)

    def submit(index: int, prompt: RenderedPrompt, result: BatchResult) -> None:
        responses_of = partial(Responses, model.tokenizer, len(prompt.token_ids))
        collector = _Collector(result, responses_of, done.append)
        engine.submit(prompt, limits[index], collector, **options)

    with engine:
        for index in sorted(range(len(prompts)), key=lambda i: _ids_of(prompts[i])):
            prompt, result = prompts[index], BatchResult(index)
            try:
                if isinstance(prompt, Failed):
                    raise prompt
                submit(index, prompt, result)
            except PromptCacheError as error:
                result.error = error
                done.append(result)
        is_busy = True
        while is_busy or done:
            is_busy = engine.step()
            while done:
                yield done.popleft()


def _ids_of(prompt: RenderedPrompt | Failed) -> list[int]:
    return [] if isinstance(prompt, Failed) else prompt.token_ids


def collect(results: Iterable[BatchResult], num_prompts: int) -> BatchResponse:
    """Return all results in the order of the prompts. Raises the first error."""
    started = time.perf_counter()
    by_index: dict[int, BatchResult] = {}
    for result in results:
        if result.error is not None:
            raise result.error
        by_index[result.index] = result
    ordered = [by_index[i] for i in range(num_prompts)]
    last = [result.last for result in ordered if result.last is not None]
    stats = BatchStats(
        prompt_tokens=sum(r.prompt_tokens - r.cached_tokens for r in last),
        generation_tokens=sum(r.generation_tokens for r in last),
        wall_time=time.perf_counter() - started,
        peak_memory=mx.get_peak_memory() / 1e9,
    )
    return BatchResponse(
        texts=[result.text for result in ordered],
        stats=stats,
        caches=None,
        token_ids=[result.token_ids for result in ordered],
        logprobs=[result.logprobs for result in ordered],
        cached_tokens=[r.cached_tokens for r in last],
    )
