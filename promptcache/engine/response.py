"""The response: what a generation yields for each token."""

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as PlainResponse

from promptcache.engine.decode import Step
from promptcache.engine.request import RequestState
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


class Responses:
    """Turns the tokens of an answer into text, as mlx-lm's `stream_generate` does."""

    def __init__(self, tokenizer: Any, num_prompt: int, state: RequestState) -> None:
        self._detokenizer = tokenizer.detokenizer
        self._num_prompt = num_prompt
        self._state = state
        self._num_tokens = 0

    def of(self, step: Step, finish_reason: str | None) -> GenerationResponse:
        """Return the response for a token, and why the answer ends with it, if so."""
        state, detokenizer = self._state, self._detokenizer
        cached_tokens = state.fetched.cached_tokens
        self._num_tokens += 1
        if finish_reason != "stop":
            detokenizer.add_token(step.token)
        if finish_reason is not None:
            detokenizer.finalize()
        decode_seconds = time.perf_counter() - state.answers_at
        return GenerationResponse(
            text=detokenizer.last_segment,
            token=step.token,
            logprobs=step.logprobs,
            from_draft=step.from_draft,
            prompt_tokens=self._num_prompt,
            prompt_tps=(self._num_prompt - cached_tokens) / state.prefill_seconds,
            generation_tokens=self._num_tokens,
            generation_tps=self._num_tokens / decode_seconds,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            cached_tokens=cached_tokens,
            declined=state.fetched.declined,
            load_seconds=state.load_seconds,
            prefill_seconds=state.prefill_seconds,
        )
