"""One generation: match, load, read the rest, decode, save."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from promptcache.engine.decode import Step, decode
from promptcache.engine.prefill import prefill, read_rest
from promptcache.engine.request import Request
from promptcache.engine.response import GenerationResponse
from promptcache.engine.speculate import speculate
from promptcache.errors import ModelError, StoreError
from promptcache.kvcache.kv_quantization import check_quantizable, quantize
from promptcache.models.draft import DraftPair
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store import PrefixStore
from promptcache.store.types import RequestUsage
from promptcache.tiers import prefix_cache
from promptcache.tiers.background_writer import BackgroundWriter
from promptcache.tiers.memory_tier import MemoryTier
from promptcache.tiers.prefix_cache import FetchedPrefix
from promptcache.tiers.quiet_saver import QuietSaver
from promptcache.tiers.saver import Saver

# What an interrupted generation may lose of the time it read. Where reading is fast,
# encoding what was read would delay the first token.
SAVE_SECONDS = 5.0


class Generation:
    """Runs one request; trouble with the store is a warning and a prefill."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: PrefixStore | None,
        writer: BackgroundWriter,
        hot: MemoryTier,
        fingerprint: Callable[[], Fingerprint],
        request: Request,
    ) -> None:
        """Take a store, or None to go without, and a function that fingerprints.

        Raises:
            UsageError: mlx-lm cannot do what is asked with this model.
        """
        read = request.read
        self._model = model
        self._drafted: DraftPair | None = None
        if read.is_drafted:
            self._drafted = DraftPair(model, read.settings.draft_model)
            most = read.num_tokens + request.max_tokens + request.num_draft_tokens
            unlimited = request.max_tokens == -1
            self._drafted.check_trimmable(sys.maxsize if unlimited else most)
        self._tokenizer = tokenizer
        self._store = store if read.reuse or read.save else None
        self._writer = writer
        self._hot = hot
        self._fingerprint = fingerprint
        self._request = request
        self._read = read
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
        request, read = self._request, self._read
        started = time.perf_counter()
        start = prefix_cache.start(
            self._reader, self._store, self._hot, self._fingerprint, read
        )
        self._saver = self._make_saver(start)
        loaded = time.perf_counter()
        num_new = read.num_tokens - start.cached_tokens
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
                        self._begin(start, read.num_saved, is_listed=is_listed)
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
            end = read.num_saved if prefill_seconds else self._num_pieced
            if self._saver.is_saving:
                self._check_model(start)
            with self._hurried():
                self._saver.finish(end)

    def _hurried(self) -> contextlib.AbstractContextManager[None]:
        """Wait for other processes a moment only."""
        if self._store is None:
            return contextlib.nullcontext()
        return self._store.patience.hurried()

    def _begin(self, start: FetchedPrefix, end: int, *, is_listed: bool = True) -> None:
        """Begin to save the prompt up to `end`."""
        self._check_model(start)
        self._saver.begin(end, is_listed=is_listed)

    def _check_model(self, start: FetchedPrefix) -> None:
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

    def _save(self, start: FetchedPrefix) -> str | None:
        """Save what is due, and return the key if that was done."""
        self._check_model(start)
        key = self._saver.finish(self._read.num_saved, self._kept_answer)
        if key is not None:
            self._request.on_saved(key)
        return key

    @property
    def _kept_answer(self) -> list[int]:
        """The tokens after the saved part of the prompt that are to be saved, too."""
        read, num_read = self._read, self._num_read
        can_follow = read.plan.is_sliceable(read.num_tokens) and not (
            read.is_drafted or read.plan.quantizes_at_end(read.num_tokens, read.kv)
        )
        if not (self._request.save_answer and can_follow and num_read):
            return []
        return [*read.token_ids[read.num_saved :], *self._answer[:num_read]]

    # The cache and the store

    @property
    def _reader(self) -> Any:
        """What reads the prompt: the model, or both of a pair."""
        return self._drafted or self._model

    def _keep(self, start: FetchedPrefix) -> None:
        """Keep the cache in memory, with as much of the answer as it has read."""
        read = self._read
        if not read.uses_memory or start.fingerprint is None or self._has_changed:
            return
        token_ids = [*read.token_ids, *self._answer[: self._num_read]]
        end = len(token_ids)
        if not read.plan.is_sliceable(end):
            end = read.plan.last_resume_point(read.num_tokens - 1)
        digest = start.fingerprint.digest
        self._hot.put(digest, token_ids, start.cache, good_to=end)

    def _make_saver(self, start: FetchedPrefix) -> QuietSaver:
        """Return what saves the prompt, or nothing if that is not due."""
        read = self._read
        if self._store is None or start.fingerprint is None:
            return QuietSaver(None)
        token_ids = read.token_ids[: read.num_saved]
        if not read.is_due(start.match) or not token_ids:
            return QuietSaver(None)
        saver = Saver(
            self._store,
            self._writer,
            start.fingerprint,
            token_ids,
            start.cache,
            read.plan,
            read.kv,
            origin=read.origin,
            store_bits=read.settings.store_bits,
        )
        saver.take_over(start.resumed.taken)
        return QuietSaver(saver)

    def _record(
        self, start: FetchedPrefix, last: GenerationResponse
    ) -> tuple[str | None, float]:
        """Note what the request reused; return its key and the seconds saved."""
        nothing = (start.match.key, 0.0)
        if self._store is None or start.fingerprint is None:
            return nothing
        if not self._read.reuse:
            return nothing
        receipt = RequestUsage(
            start.fingerprint,
            start.match,
            start.cached_tokens,
            self._read.num_tokens - start.cached_tokens,
            last.load_seconds,
            last.prefill_seconds,
        )
        with contextlib.suppress(StoreError):
            self._store.usage_log.add_speed(start.fingerprint, *self._prefilled)
            loaded = (start.loaded_tokens, last.load_seconds)
            self._store.usage_log.add_load(start.fingerprint, *loaded)
            return self._store.usage_log.record(receipt)
        return nothing

    # Running the model

    def _steps(self, start: FetchedPrefix) -> Iterator[Step]:
        """Read what is not cached and generate after it."""
        request, read = self._request, self._read
        if request.input_embeddings is not None:
            return self._embedded_steps(request.input_embeddings)
        if read.kv.starts_within(start.cached_tokens, read.num_tokens):
            for model in filter(None, (self._model, read.settings.draft_model)):
                check_quantizable(model, read.kv, read.settings.max_kv_size)
        if self._drafted is not None:
            self._prefill(start, read.num_tokens - 1)
            return speculate(
                self._drafted,
                start.cache,
                read.token_ids,
                num_draft_tokens=request.num_draft_tokens,
                **self._sampling_options(),
            )
        return decode(
            self._model,
            start.cache,
            read.token_ids,
            self._logits(start),
            **self._sampling_options(),
        )

    def _sampling_options(self) -> dict[str, Any]:
        request = self._request
        return {
            "max_tokens": request.max_tokens,
            "sampler": request.sampler,
            "logits_processors": request.logits_processors,
            "kv": request.read.kv,
        }

    def _logits(self, start: FetchedPrefix) -> mx.array:
        """Read the prompt to its end; return the logits of the next token."""
        read = self._read
        num_read = read.plan.end_of_prefill(
            read.num_tokens, start.cached_tokens, read.kv
        )
        self._prefill(start, num_read)
        logits = read_rest(
            self._model,
            start.cache,
            read.token_ids,
            num_read=num_read,
        )
        if read.num_saved == read.num_tokens:
            self._saver.capture(num_read, read.num_tokens)
        quantize(start.cache, read.num_tokens, read.kv)
        return logits

    def _prefill(self, start: FetchedPrefix, end: int) -> None:
        """Read the prompt up to `end`, and save full pieces on the way."""
        read, cache = self._read, start.cache
        on_progress = self._request.on_progress
        saved_at = time.perf_counter()

        def on_piece(first: int, stop: int) -> None:
            nonlocal saved_at
            self._saver.capture(first, stop)
            if stop % read.plan.step_size or stop > read.num_saved:
                return
            self._num_pieced = stop
            if time.perf_counter() - saved_at >= SAVE_SECONDS:
                self._begin(start, stop)
                saved_at = time.perf_counter()

        seconds = prefill(
            self._reader,
            cache,
            read.token_ids,
            start=start.cached_tokens,
            end=end,
            plan=read.plan,
            kv=read.kv,
            on_piece=on_piece,
            on_progress=lambda done, _: on_progress(done, read.num_tokens),
        )
        self._prefilled = (end - start.cached_tokens, seconds)
        if end == read.num_tokens - 1:
            # As mlx-lm does before the last token, also where nothing was left to do.
            quantize(cache, end, read.kv)

    def _embedded_steps(self, input_embeddings: mx.array) -> Iterator[Step]:
        request, read = self._request, self._read
        steps = generate_step(
            mx.array(read.token_ids),
            self._model,
            max_tokens=request.max_tokens,
            sampler=request.sampler,
            logits_processors=request.logits_processors or None,
            max_kv_size=read.settings.max_kv_size,
            prefill_step_size=read.plan.step_size,
            kv_bits=read.kv.bits,
            kv_group_size=read.kv.group_size,
            quantized_kv_start=read.kv.start,
            prompt_progress_callback=request.on_progress,
            input_embeddings=input_embeddings,
        )
        return (Step(*step) for step in steps)

    def _responses(self, steps: Iterator[Step]) -> Iterator[GenerationResponse]:
        """Turn tokens into text, as mlx-lm's `stream_generate` does."""
        request, read = self._request, self._read
        detokenizer = self._tokenizer.detokenizer
        decoding = time.perf_counter()
        for num_tokens, step in enumerate(steps, start=1):
            if num_tokens == 1:
                request.on_progress(read.num_tokens, read.num_tokens)
                decoding = time.perf_counter()
            self._answer.append(step.token)
            if step.num_read is not None:
                self._num_read = step.num_read
                if self._kept_answer:
                    self._saver.capture_answer(len(self._kept_answer))
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
                prompt_tokens=read.num_tokens,
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
