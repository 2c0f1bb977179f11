"""One generation: fetch, read the rest, decode, save."""

import contextlib
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from promptcache.engine.decode import Decoder, Step, speculate
from promptcache.engine.keeper import Keeper, has_rows_since
from promptcache.engine.prefill import Piece, read_prompt, read_rest
from promptcache.engine.request import Request, RequestState
from promptcache.engine.response import GenerationResponse, Responses
from promptcache.kvcache.kv_quantization import quantize
from promptcache.models.draft import DraftPair
from promptcache.models.loaded import LoadedModel
from promptcache.tiers.prefix_cache import PrefixCache


class Generation:
    """Runs one request; trouble with the store is a warning and a prefill.

    `load` it, `read` its prompt to the end, and `note` each of its `steps`; its
    `keeper` saves what has been read. In between, other requests may run. `stream` does
    all that for this request alone.

    Attributes:
        request: What it is asked for.
        state: How far it has come, once it was loaded.
        keeper: What is kept of it, once it was loaded.
    """

    state: RequestState
    keeper: Keeper

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
        self.request = request
        self._model = model
        self._tokenizer = tokenizer
        self._prefixes = prefixes
        self._read = read
        self._drafted: DraftPair | None = None
        if read.is_drafted:
            self._drafted = DraftPair(model.model, read.settings.draft_model)
            most = read.num_tokens + request.max_tokens + request.num_draft_tokens
            unlimited = request.max_tokens == -1
            self._drafted.check_trimmable(sys.maxsize if unlimited else most)

    def stream(self) -> Generator[GenerationResponse, None, None]:
        """Generate; at the end, also an early one, save the prompt if it is due."""
        self.load()
        state = self.state
        try:
            with wired_limit(self._model.model, [generation_stream]):
                for _ in self.read():
                    pass
                for response in self._responses():
                    if response.finish_reason is not None:
                        self.keeper.end(response)
                    yield response
                    if response.generation_tokens == 1:
                        self.keeper.begin()
                    state.saver.advance()
        except GeneratorExit:
            # The cache holds whole tokens only here, not when a step is interrupted.
            if not response.finish_reason:
                self.keeper.end(response)
            raise
        finally:
            # Nothing is left to save unless something was raised.
            if state.saver.is_active:
                with self._hurried():
                    self.keeper.save_read()

    def _hurried(self) -> contextlib.AbstractContextManager[None]:
        """Wait for other processes a moment only."""
        store = self._prefixes.store
        return contextlib.nullcontext() if store is None else store.patience.hurried()

    # Reading

    def load(self, *, is_shared: bool = False) -> None:
        """Take the longest cached prefix; the rest is left to read.

        If it is shared, others find it in memory meanwhile.
        """
        started = time.perf_counter()
        fetched = self._prefixes.fetch(self._model, self._read, is_shared=is_shared)
        saver = self._prefixes.saver(self._read, fetched)
        self.state = RequestState(fetched, saver, started)
        self.keeper = Keeper(self._model, self._prefixes, self.request, self.state)

    def read(self) -> Iterator[None]:
        """Read the rest of the prompt; yield after each piece."""
        read, state = self._read, self.state
        if self.request.input_embeddings is not None:
            return
        if self._drafted is not None:
            # Speculation reads the last token itself.
            yield from self._prefill(read.num_tokens - 1)
            return
        cache, num_cached = state.fetched.cache, state.fetched.cached_tokens
        num_read = read.plan.end_of_prefill(read.num_tokens, num_cached, read.kv)
        yield from self._prefill(num_read)
        state.logits = read_rest(
            self._model.model, cache, read.token_ids, num_read=num_read
        )
        if read.num_saved == read.num_tokens:
            state.saver.capture(num_read, read.num_tokens)
        state.num_read = read.num_tokens
        quantize(cache, read.num_tokens, read.kv)

    def _prefill(self, end: int) -> Iterator[None]:
        """Read the prompt up to `end`, and save full pieces on the way."""
        read, state = self._read, self.state
        start = state.fetched.cached_tokens
        self.request.on_progress(start, read.num_tokens)
        cache, seconds = state.fetched.cache, 0.0
        for piece in read_prompt(self._model, read, cache, start=start, end=end):
            seconds += piece.seconds
            self._note_piece(piece)
            self.request.on_progress(piece.stop, read.num_tokens)
            yield
        state.timed = (end - start, seconds)
        if end == read.num_tokens - 1:
            # As mlx-lm does before the last token, also where nothing was left to do.
            quantize(cache, end, read.kv)

    def _note_piece(self, piece: Piece) -> None:
        state = self.state
        state.num_read = piece.stop
        state.saver.capture(piece.start, piece.stop)
        if piece.stop % self._read.plan.step_size or piece.stop > self._read.num_saved:
            return
        state.num_pieced = piece.stop
        if state.saver.is_overdue:
            self.keeper.begin(piece.stop)

    # Decoding

    def steps(self) -> Iterator[Step]:
        """Generate after the prompt, which has been read."""
        request, read = self.request, self._read
        cache, logits = self.state.fetched.cache, self.state.logits
        options: dict[str, Any] = {
            "max_tokens": request.max_tokens,
            "sampler": request.sampler,
            "logits_processors": request.logits_processors,
            "kv": read.kv,
        }
        if request.input_embeddings is not None:
            return self._embedded_steps(request.input_embeddings)
        if self._drafted is not None:
            num_draft_tokens = request.num_draft_tokens
            return speculate(
                self._drafted,
                cache,
                read.token_ids,
                num_draft_tokens=num_draft_tokens,
                **options,
            )
        assert logits is not None
        return Decoder(self._model.model, cache, read.token_ids, logits, **options)

    def _embedded_steps(self, input_embeddings: mx.array) -> Iterator[Step]:
        request, read = self.request, self._read
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

    def note(self, step: Step) -> str | None:
        """Note a token, and return why the answer ends with it, if it does."""
        state = self.state
        state.answer.append(step.token)
        if len(state.answer) == 1:
            self.request.on_progress(self._read.num_tokens, self._read.num_tokens)
            state.answers_at = time.perf_counter()
        if step.num_read is not None:
            state.num_answered = step.num_read
            if answer := self.keeper.answer():
                state.saver.capture_answer(len(answer))
        if step.token in self._tokenizer.eos_token_ids:
            return "stop"
        is_last = len(state.answer) == self.request.max_tokens
        return "length" if is_last else None

    @property
    def can_join(self) -> bool:
        """Return whether it can be decoded in a batch with others."""
        read, request = self._read, self.request
        settings = read.settings
        is_plain = not (read.is_drafted or settings.exact or read.kv.bits)
        return (
            is_plain
            and settings.max_kv_size is None
            and request.input_embeddings is None
            and all(hasattr(layer, "merge") for layer in self.state.fetched.cache)
        )

    def adopt(self, cache: list[Any], num_tokens: int) -> None:
        """Go on with a cache that a batch has read on, up to so many tokens."""
        state = self.state
        state.saver.use(cache)
        if has_rows_since(cache, self._read.num_saved):
            state.fetched = state.fetched._replace(cache=cache)
            state.num_answered = num_tokens - self._read.num_tokens
        else:
            # Of an answer that is longer than a window, the first rows are gone: the
            # prompt can be saved, but the cache is of no use to others.
            state.fetched = state.fetched._replace(cache=[])
            state.num_answered = 0

    def continued(self) -> "Generation":
        """Return a generation that goes on from the answer of this one."""
        answer = self.state.answer
        read = replace(
            self._read, token_ids=[*self._read.token_ids, *answer], save=False
        )
        left = max(self.request.max_tokens - len(answer), -1)
        request = replace(self.request, read=read, max_tokens=left, save_answer=False)
        return Generation(self._model, self._tokenizer, self._prefixes, request)

    def _responses(self) -> Iterator[GenerationResponse]:
        responses = Responses(self._tokenizer, self._read.num_tokens, self.state)
        for step in self.steps():
            finish_reason = self.note(step)
            yield responses.of(step, finish_reason)
            if finish_reason is not None:
                return
