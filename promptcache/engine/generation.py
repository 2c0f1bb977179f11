"""One generation: fetch, read the rest, decode, save."""

import contextlib
import sys
import time
from collections.abc import Generator, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from promptcache.engine.decode import Step, decode
from promptcache.engine.prefill import read_pieces, read_rest
from promptcache.engine.request import Request, RequestState
from promptcache.engine.response import GenerationResponse
from promptcache.engine.speculate import speculate
from promptcache.errors import ModelError, warn
from promptcache.kvcache.kv_quantization import quantize
from promptcache.models.draft import DraftPair
from promptcache.models.loaded import LoadedModel
from promptcache.tiers.prefix_cache import PrefixCache


class Generation:
    """Runs one request; trouble with the store is a warning and a prefill."""

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Any,
        prefixes: PrefixCache,
        request: Request,
    ) -> None:
        """Take what runs it, and what is asked for.

        Raises:
            UsageError: mlx-lm cannot do what is asked with this model.
        """
        read = request.read
        self._model = model
        self._tokenizer = tokenizer
        self._prefixes = prefixes
        self._request = request
        self._read = read
        self._drafted: DraftPair | None = None
        if read.is_drafted:
            self._drafted = DraftPair(model.model, read.settings.draft_model)
            most = read.num_tokens + request.max_tokens + request.num_draft_tokens
            unlimited = request.max_tokens == -1
            self._drafted.check_trimmable(sys.maxsize if unlimited else most)

    def stream(self) -> Generator[GenerationResponse, None, None]:
        """Generate; at the end, also an early one, save the prompt if it is due."""
        started = time.perf_counter()
        fetched = self._prefixes.fetch(self._model, self._read)
        saver = self._prefixes.saver(self._read, fetched)
        state = RequestState(fetched, saver, started)
        try:
            with wired_limit(self._model.model, [generation_stream]):
                for response in self._responses(state, self._steps(state)):
                    if response.finish_reason is not None:
                        self._end(state, response)
                    yield response
                    if response.generation_tokens == 1:
                        self._begin_to_save(state, self._read.num_saved)
                    saver.advance()
        except GeneratorExit:
            # The cache holds whole tokens only here, not when a step is interrupted.
            if not response.finish_reason:
                self._end(state, response)
            raise
        finally:
            # Nothing is left to save unless something was raised.
            end = self._read.num_saved if state.prefill_seconds else state.num_pieced
            if saver.is_active:
                with self._hurried():
                    self._save(state, end)

    def _hurried(self) -> contextlib.AbstractContextManager[None]:
        """Wait for other processes a moment only."""
        store = self._prefixes.store
        return contextlib.nullcontext() if store is None else store.patience.hurried()

    # Saving

    def _end(self, state: RequestState, last: GenerationResponse) -> None:
        """Save what is due, note what was reused, and keep the cache in memory."""
        key = self._save(state, self._read.num_saved, self._kept_answer(state))
        if key is not None:
            self._request.on_saved(key)
        reused, last.saved_seconds = self._prefixes.record(
            self._read,
            state.fetched,
            load_seconds=state.load_seconds,
            prefill_seconds=state.prefill_seconds,
            timed=state.timed,
        )
        last.key = key or reused
        if not state.has_changed:
            answer = state.answer[: state.num_read]
            self._prefixes.keep(self._read, state.fetched, answer)

    def _save(
        self, state: RequestState, end: int, answer: list[int] | None = None
    ) -> str | None:
        """Save the prompt up to `end` and an answer, for the last time."""
        self._check_model(state)
        key = None
        try:
            key = state.saver.save(end, answer or [])
        # mlx raises RuntimeError where memory is short, or the thread is another one.
        except Exception as error:
            warn(f"the prompt is not saved: {error}")
        state.saver.stop()
        return key

    def _begin_to_save(self, state: RequestState, end: int) -> None:
        self._check_model(state)
        has_answer = self._request.save_answer and state.prefill_seconds > 0
        state.saver.begin(end, answer_follows=has_answer)

    def _check_model(self, state: RequestState) -> None:
        """Save and keep nothing that was read by what the model is no longer."""
        if state.fetched.fingerprint is None or state.has_changed:
            return
        try:
            now = self._model.fingerprint(self._read.settings)
            state.has_changed = now.digest != state.fetched.fingerprint.digest
        except ModelError:
            state.has_changed = True
        if state.has_changed and state.saver.is_active:
            warn("the prompt is not saved: the model has changed meanwhile")
            state.saver.stop()

    def _kept_answer(self, state: RequestState) -> list[int]:
        """Return the tokens after the saved part of the prompt that are saved, too."""
        read = self._read
        can_follow = read.plan.is_sliceable(read.num_tokens) and not (
            read.is_drafted or read.plan.quantizes_at_end(read.num_tokens, read.kv)
        )
        if not (self._request.save_answer and can_follow and state.num_read):
            return []
        return [*read.token_ids[read.num_saved :], *state.answer[: state.num_read]]

    # Running the model

    def _steps(self, state: RequestState) -> Iterator[Step]:
        """Read what is not cached and generate after it."""
        request, read, cache = self._request, self._read, state.fetched.cache
        options: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "sampler": request.sampler,
            "logits_processors": request.logits_processors,
            "kv": read.kv,
        }
        if request.input_embeddings is not None:
            return self._embedded_steps(request.input_embeddings)
        if self._drafted is not None:
            self._prefill(state, read.num_tokens - 1)
            num_draft_tokens = request.num_draft_tokens
            return speculate(
                self._drafted,
                cache,
                read.token_ids,
                num_draft_tokens=num_draft_tokens,
                **options,
            )
        logits = self._read_prompt(state)
        return decode(self._model.model, cache, read.token_ids, logits, **options)

    def _read_prompt(self, state: RequestState) -> mx.array:
        """Read the prompt to its end; return the logits of the next token."""
        read, cache = self._read, state.fetched.cache
        num_read = read.plan.end_of_prefill(
            read.num_tokens, state.fetched.cached_tokens, read.kv
        )
        self._prefill(state, num_read)
        logits = read_rest(self._model.model, cache, read.token_ids, num_read=num_read)
        if read.num_saved == read.num_tokens:
            state.saver.capture(num_read, read.num_tokens)
        quantize(cache, read.num_tokens, read.kv)
        return logits

    def _prefill(self, state: RequestState, end: int) -> None:
        """Read the prompt up to `end`, and save full pieces on the way."""
        read, cache = self._read, state.fetched.cache
        on_progress = self._request.on_progress

        def on_piece(first: int, stop: int) -> None:
            state.saver.capture(first, stop)
            if stop % read.plan.step_size or stop > read.num_saved:
                return
            state.num_pieced = stop
            if state.saver.is_overdue:
                self._begin_to_save(state, stop)

        num_cached = state.fetched.cached_tokens
        seconds = read_pieces(
            self._model,
            read,
            cache,
            start=num_cached,
            end=end,
            on_piece=on_piece,
            on_progress=lambda done, _: on_progress(done, read.num_tokens),
        )
        state.timed = (end - num_cached, seconds)
        if end == read.num_tokens - 1:
            # As mlx-lm does before the last token, also where nothing was left to do.
            quantize(cache, end, read.kv)

    def _embedded_steps(self, input_embeddings: mx.array) -> Iterator[Step]:
        request, read = self._request, self._read
        steps = generate_step(
            mx.array(read.token_ids),
            self._model.model,
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

    def _responses(
        self, state: RequestState, steps: Iterator[Step]
    ) -> Iterator[GenerationResponse]:
        """Turn tokens into text, as mlx-lm's `stream_generate` does."""
        read, fetched = self._read, state.fetched
        num_new = read.num_tokens - fetched.cached_tokens
        detokenizer = self._tokenizer.detokenizer
        decoding = time.perf_counter()
        for num_tokens, step in enumerate(steps, start=1):
            if num_tokens == 1:
                self._request.on_progress(read.num_tokens, read.num_tokens)
                decoding = time.perf_counter()
                state.prefill_seconds = decoding - state.loaded_at
            self._note(state, step)
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
                prompt_tps=num_new / state.prefill_seconds,
                generation_tokens=num_tokens,
                generation_tps=num_tokens / (time.perf_counter() - decoding),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason=finish_reason,
                cached_tokens=fetched.cached_tokens,
                declined=fetched.declined,
                load_seconds=state.load_seconds,
                prefill_seconds=state.prefill_seconds,
            )
            if finish_reason is not None:
                return

    def _note(self, state: RequestState, step: Step) -> None:
        """Note a token, and what the cache has read by now."""
        state.answer.append(step.token)
        if step.num_read is None:
            return
        state.num_read = step.num_read
        if answer := self._kept_answer(state):
            state.saver.capture_answer(len(answer))

    def _finish_reason(self, step: Step, num_tokens: int) -> str | None:
        if step.token in self._tokenizer.eos_token_ids:
            return "stop"
        return "length" if num_tokens == self._request.max_tokens else None
