"""One generation: match, load, read the rest, decode, save."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as PlainResponse
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from promptcache import starting
from promptcache.decoding import Step, decode, read_rest
from promptcache.errors import ModelError, StoreError
from promptcache.hot_tier import HotTier
from promptcache.prefill import check_quantizable, prefill, quantize
from promptcache.quiet_saver import QuietSaver
from promptcache.request import Request
from promptcache.saving import Saver
from promptcache.speculation import DraftedModel, speculate
from promptcache.starting import Start
from promptcache.store import PrefixStore
from promptcache.types import Fingerprint, LoadEstimate, Receipt
from promptcache.writer import Writer

# What an interrupted generation may lose of the time it read. Where reading is fast,
# encoding what was read would delay the first token.
SAVE_SECONDS = 5.0


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


class Generation:
    """Runs one request; trouble with the store is a warning and a prefill."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: PrefixStore | None,
        writer: Writer,
        hot: HotTier,
        fingerprint: Callable[[], Fingerprint],
        request: Request,
    ) -> None:
        """Take a store, or None to go without, and a function that fingerprints.

        Raises:
            UsageError: mlx-lm cannot do what is asked with this model.
        """
        self._model = model
        self._drafted: DraftedModel | None = None
        if request.draft_model is not None:
            self._drafted = DraftedModel(model, request.draft_model)
            most = request.num_tokens + request.max_tokens + request.num_draft_tokens
            unlimited = request.max_tokens == -1
            self._drafted.check_trimmable(sys.maxsize if unlimited else most)
        self._tokenizer = tokenizer
        self._store = store if request.reuse or request.save else None
        self._writer = writer
        self._hot = hot
        self._fingerprint = fingerprint
        self._request = request
        self._answer: list[int] = []
        # Up to where the prompt has been read in steps that can be saved.
        self._num_pieced = 0
        # Tokens read in whole pieces, and the seconds that took.
        self._prefilled = (0, 0.0)
        # How many tokens of the answer the cache is known to hold.
        self._num_read = 0
        self._saver = QuietSaver(None)
        self._has_changed = False

    def stream(self) -> Generator[GenerationResponse, None, None]:
        """Generate; at the end, also an early one, save the prompt if it is due."""
        request = self._request
        started = time.perf_counter()
        start = starting.start(
            self._reader, self._store, self._hot, self._fingerprint, request
        )
        self._saver = self._make_saver(start)
        loaded = time.perf_counter()
        num_new = request.num_tokens - start.cached_tokens
        prefill_seconds = 0.0
        try:
            with wired_limit(self._model, [generation_stream]):
                for response in self._responses(self._steps(start)):
                    prefill_seconds = prefill_seconds or time.perf_counter() - loaded
                    response.cached_tokens = start.cached_tokens
                    response.declined = start.resumed.declined
                    response.load_seconds = loaded - started
                    response.prefill_seconds = prefill_seconds
                    response.prompt_tps = num_new / prefill_seconds
                    if response.finish_reason is not None:
                        key = self._save(start)
                        reused, response.saved_seconds = self._record(start, response)
                        response.key = key or reused
                        self._keep(start)
                    last = response
                    yield response
                    if response.generation_tokens == 1:
                        is_listed = not request.save_answer
                        self._begin(start, request.num_saved, is_listed=is_listed)
                    self._saver.advance()
        except GeneratorExit:
            # The cache holds whole tokens only here, not when a step is interrupted.
            self._save(start)
            if not last.finish_reason:
                self._record(start, last)
                self._keep(start)
            raise
        finally:
            # Nothing is left to save unless something was raised.
            end = request.num_saved if prefill_seconds else self._num_pieced
            if self._saver.is_saving:
                self._check_model(start)
            with self._hurried():
                self._saver.finish(end)

    def _hurried(self) -> contextlib.AbstractContextManager[None]:
        """Wait for other processes a moment only."""
        if self._store is None:
            return contextlib.nullcontext()
        return self._store.patience.hurried()

    def _begin(self, start: Start, end: int, *, is_listed: bool = True) -> None:
        """Begin to save the prompt up to `end`."""
        self._check_model(start)
        self._saver.begin(end, is_listed=is_listed)

    def _check_model(self, start: Start) -> None:
        """Save and keep nothing that was read by what the model is no longer."""
        if start.fingerprint is None or self._has_changed:
            return
        try:
            now = self._fingerprint()
            self._has_changed = now.digest != start.fingerprint.digest
        except ModelError:
            self._has_changed = True
        if self._has_changed and self._saver.is_saving:
            self._saver.stop("the model has changed meanwhile")

    def _save(self, start: Start) -> str | None:
        """Save what is due, and return the key if that was done."""
        self._check_model(start)
        key = self._saver.finish(self._request.num_saved, self._kept_answer)
        if key is not None:
            self._request.on_saved(key)
        return key

    @property
    def _kept_answer(self) -> list[int]:
        """The tokens of the answer that are to be saved."""
        is_whole = self._request.num_saved == self._request.num_tokens
        if self._request.save_answer and is_whole and self._drafted is None:
            return self._answer[: self._num_read]
        return []

    # The cache and the store

    @property
    def _reader(self) -> Any:
        """What reads the prompt: the model, or both of a pair."""
        return self._drafted or self._model

    def _keep(self, start: Start) -> None:
        """Keep the cache in memory, with as much of the answer as it has read."""
        request = self._request
        if not request.uses_hot or start.fingerprint is None or self._has_changed:
            return
        token_ids = [*request.token_ids, *self._answer[: self._num_read]]
        end = len(token_ids)
        if not request.cuts.is_divisible(end):
            end = request.cuts.last_resumable(request.num_tokens - 1)
        digest = start.fingerprint.digest
        self._hot.put(digest, token_ids, start.cache, good_to=end)

    def _make_saver(self, start: Start) -> QuietSaver:
        """Return what saves the prompt, or nothing if that is not due."""
        request = self._request
        if self._store is None or start.fingerprint is None:
            return QuietSaver(None)
        token_ids = request.token_ids[: request.num_saved]
        if not request.is_due(start.match) or not token_ids:
            return QuietSaver(None)
        saver = Saver(
            self._store,
            self._writer,
            start.fingerprint,
            token_ids,
            start.cache,
            request.cuts,
            request.kv,
            is_prompt=len(token_ids) == request.num_tokens,
            origin=request.origin,
            store_bits=request.store_bits,
        )
        saver.take_over(start.resumed.taken, start.resumed.logits)
        return QuietSaver(saver)

    def _record(
        self, start: Start, last: GenerationResponse
    ) -> tuple[str | None, float]:
        """Note what the request reused; return its key and the seconds saved."""
        nothing = (start.match.key, 0.0)
        if self._store is None or start.fingerprint is None:
            return nothing
        if not self._request.reuse:
            return nothing
        receipt = Receipt(
            start.fingerprint,
            start.match,
            start.cached_tokens,
            self._request.num_tokens - start.cached_tokens,
            last.load_seconds,
            last.prefill_seconds,
        )
        with contextlib.suppress(StoreError):
            self._store.add_speed(start.fingerprint, *self._prefilled)
            loaded = (start.loaded_tokens, last.load_seconds)
            self._store.add_load(start.fingerprint, *loaded)
            return self._store.record(receipt)
        return nothing

    # Running the model

    def _steps(self, start: Start) -> Iterator[Step]:
        """Read what is not cached and generate after it."""
        request = self._request
        if request.input_embeddings is not None:
            return self._embedded_steps(request.input_embeddings)
        if request.kv.starts_within(start.cached_tokens, request.num_tokens):
            for model in filter(None, (self._model, request.draft_model)):
                check_quantizable(model, request.kv, request.max_kv_size)
        if self._drafted is not None:
            self._prefill(start, request.num_tokens - 1)
            return speculate(
                self._drafted,
                start.cache,
                request.token_ids,
                num_draft_tokens=request.num_draft_tokens,
                **self._sampling_options(),
            )
        return decode(
            self._model,
            start.cache,
            request.token_ids,
            self._logits(start),
            **self._sampling_options(),
        )

    def _sampling_options(self) -> dict[str, Any]:
        request = self._request
        return {
            "max_tokens": request.max_tokens,
            "sampler": request.sampler,
            "logits_processors": request.logits_processors,
            "kv": request.kv,
        }

    def _logits(self, start: Start) -> mx.array:
        """Read the prompt to its end; return the logits of the next token."""
        if start.resumed.logits is not None:
            return start.resumed.logits
        request = self._request
        num_read = request.cuts.end_of_prefill(
            request.num_tokens, start.cached_tokens, request.kv
        )
        self._prefill(start, num_read)
        logits = read_rest(
            self._model,
            start.cache,
            request.token_ids,
            num_read=num_read,
        )
        if request.num_saved == request.num_tokens:
            self._saver.capture(num_read, request.num_tokens, logits)
        quantize(start.cache, request.num_tokens, request.kv)
        return logits

    def _prefill(self, start: Start, end: int) -> None:
        """Read the prompt up to `end`, and save full pieces on the way."""
        request, cache = self._request, start.cache
        saved_at = time.perf_counter()

        def on_piece(first: int, stop: int) -> None:
            nonlocal saved_at
            self._saver.capture(first, stop)
            if stop % request.cuts.step_size or stop > request.num_saved:
                return
            self._num_pieced = stop
            if time.perf_counter() - saved_at >= SAVE_SECONDS:
                self._begin(start, stop)
                saved_at = time.perf_counter()

        seconds = prefill(
            self._reader,
            cache,
            request.token_ids,
            start=start.cached_tokens,
            end=end,
            cuts=request.cuts,
            kv=request.kv,
            on_piece=on_piece,
            on_progress=lambda done, _: request.on_progress(done, request.num_tokens),
        )
        self._prefilled = (end - start.cached_tokens, seconds)
        if end == request.num_tokens - 1:
            # As mlx-lm does before the last token, also where nothing was left to do.
            quantize(cache, end, request.kv)

    def _embedded_steps(self, input_embeddings: mx.array) -> Iterator[Step]:
        request = self._request
        steps = generate_step(
            mx.array(request.token_ids),
            self._model,
            max_tokens=request.max_tokens,
            sampler=request.sampler,
            logits_processors=request.logits_processors or None,
            max_kv_size=request.max_kv_size,
            prefill_step_size=request.cuts.step_size,
            kv_bits=request.kv.bits,
            kv_group_size=request.kv.group_size,
            quantized_kv_start=request.kv.start,
            prompt_progress_callback=request.on_progress,
            input_embeddings=input_embeddings,
        )
        return (Step(*step) for step in steps)

    def _responses(self, steps: Iterator[Step]) -> Iterator[GenerationResponse]:
        """Turn tokens into text, as mlx-lm's `stream_generate` does."""
        request = self._request
        detokenizer = self._tokenizer.detokenizer
        decoding = time.perf_counter()
        for num_tokens, step in enumerate(steps, start=1):
            if num_tokens == 1:
                request.on_progress(request.num_tokens, request.num_tokens)
                decoding = time.perf_counter()
            self._answer.append(step.token)
            if step.num_read is not None:
                self._num_read = step.num_read
                if self._kept_answer:
                    self._saver.capture_answer(self._num_read)
            finish_reason = self._finish_reason(step, num_tokens)
            if finish_reason != "stop":
                detokenizer.add_token(step.token)
            if finish_reason is not None:
                detokenizer.finalize()
            yield GenerationResponse(
                text=detokenizer.last_segment,
                token=step.token,
                logprobs=step.logprobs,
                from_draft=step.from_draft,
                prompt_tokens=request.num_tokens,
                prompt_tps=0.0,
                generation_tokens=num_tokens,
                generation_tps=num_tokens / (time.perf_counter() - decoding),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
            )
            if finish_reason is not None:
                return

    def _finish_reason(self, step: Step, num_tokens: int) -> str | None:
        if step.token in self._tokenizer.eos_token_ids:
            return "stop"
        return "length" if num_tokens == self._request.max_tokens else None
