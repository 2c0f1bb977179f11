"""One generation: match, load, read the rest, decode, save."""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as PlainResponse
from mlx_lm.generate import (
    generate_step,
    generation_stream,
    wired_limit,
)
from mlx_lm.models.cache import make_prompt_cache

from promptcache.decoding import LogitsProcessor, Sampler, Step, decode, read_rest
from promptcache.errors import PromptCacheError, StoreError, UnsupportedCacheError
from promptcache.hot_tier import HotTier
from promptcache.prefill import (
    Cuts,
    KVSettings,
    check_quantizable,
    prefill,
    quantize,
)
from promptcache.resuming import Resumed, resume
from promptcache.saving import QuietSaver, Saver, warn
from promptcache.speculation import DraftedModel, speculate
from promptcache.store import PrefixStore
from promptcache.treatment import check_supported
from promptcache.types import Fingerprint, LoadEstimate, Match, Origin, Receipt
from promptcache.writer import Writer

# Below this, prefilling again costs less than it is worth to keep: a second on
# the slow machines, and 24 MB of SmolLM2's cache.
AUTO_SAVE_TOKENS = 512

# What an interrupted generation may lose of the time it read. Where reading is fast,
# encoding what was read would delay the first token.
SAVE_SECONDS = 5.0

# As in mlx-lm's speculative_generate_step.
DEFAULT_DRAFT_TOKENS = 2

SavePolicy = bool | Literal["auto"]
Progress = Callable[[int, int], None]


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


@dataclass(frozen=True, slots=True)
class Request:
    """What a generation is asked for.

    Attributes:
        token_ids: The whole prompt.
        max_tokens: Most tokens to generate, -1 for no limit.
        save: Whether to save the prompt.
        reuse: Whether to look for cached prefixes.
        sampler: From log-probabilities to a token.
        logits_processors: Called with all tokens so far and the logits.
        cuts: Where the pieces of the prefill end.
        kv: When to quantize keys and values.
        origin: How the prompt was rendered.
        on_progress: Called with the prompt tokens done so far and their total.
        max_kv_size: Most tokens to keep in the cache; see `make_prompt_cache`.
        draft_model: A smaller model that proposes tokens.
        num_draft_tokens: How many it proposes at once.
        on_match: Called with what is reused.
        save_answer: Whether to save the answer with the prompt.
        on_saved: Called with the key of what was saved.
        input_embeddings: What to read in place of the tokens' own embeddings, shape
            `(tokens, hidden)`; nothing is cached then.
        store_bits: In how many bits keys and values are stored, None for their own.
    """

    token_ids: list[int]
    max_tokens: int
    save: SavePolicy
    reuse: bool
    sampler: Sampler
    logits_processors: list[LogitsProcessor]
    cuts: Cuts
    kv: KVSettings
    origin: Origin | None = None
    on_progress: Progress = lambda done, total: None
    max_kv_size: int | None = None
    draft_model: Any = None
    num_draft_tokens: int = DEFAULT_DRAFT_TOKENS
    on_match: Callable[[Match], None] = lambda match: None
    save_answer: bool = False
    on_saved: Callable[[str], None] = lambda key: None
    input_embeddings: mx.array | None = None
    store_bits: int | None = None

    @property
    def num_tokens(self) -> int:
        """Return the length of the prompt."""
        return len(self.token_ids)


class _Start(NamedTuple):
    """Where a generation starts: its cache, and what the cache already holds."""

    cache: list[Any]
    resumed: Resumed
    saver: QuietSaver
    fingerprint: Fingerprint | None = None

    @property
    def match(self) -> Match:
        return self.resumed.match

    @property
    def cached_tokens(self) -> int:
        return self.resumed.cached_tokens


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
        self._loaded_tokens = 0
        # How many tokens of the answer the cache is known to hold.
        self._num_read = 0

    def stream(self) -> Generator[GenerationResponse, None, None]:
        """Generate; at the end, also an early one, save the prompt if it is due."""
        request = self._request
        started = time.perf_counter()
        start = self._start()
        loaded = time.perf_counter()
        num_new = request.num_tokens - start.cached_tokens
        prefill_seconds = 0.0
        try:
            with wired_limit(self._model, [generation_stream]):
                for response in self._responses(self._steps(start), start.saver):
                    prefill_seconds = prefill_seconds or time.perf_counter() - loaded
                    response.cached_tokens = start.cached_tokens
                    response.declined = start.resumed.declined
                    response.load_seconds = loaded - started
                    response.prefill_seconds = prefill_seconds
                    response.prompt_tps = num_new / prefill_seconds
                    if response.finish_reason is not None:
                        key = self._save(start.saver)
                        reused, response.saved_seconds = self._record(start, response)
                        response.key = key or reused
                        self._keep(start)
                    last = response
                    yield response
                    if response.generation_tokens == 1:
                        is_listed = not self._request.save_answer
                        start.saver.begin(self._num_saved, is_listed=is_listed)
                    start.saver.advance()
        except GeneratorExit:
            # The cache holds whole tokens only here, not when a step is interrupted.
            self._save(start.saver)
            if not last.finish_reason:
                self._record(start, last)
                self._keep(start)
            raise
        finally:
            # Nothing is left to save unless something was raised.
            start.saver.finish(self._num_saved if prefill_seconds else self._num_pieced)

    def _save(self, saver: QuietSaver) -> str | None:
        """Save what is due, and return the key if that was done."""
        key = saver.finish(self._num_saved, self._kept_answer)
        if key is not None:
            self._request.on_saved(key)
        return key

    @property
    def _kept_answer(self) -> list[int]:
        """The tokens of the answer that are to be saved."""
        is_whole = self._num_saved == self._request.num_tokens
        if self._request.save_answer and is_whole and self._drafted is None:
            return self._answer[: self._num_read]
        return []

    # Starting

    @property
    def _reader(self) -> Any:
        """What reads the prompt: the model, or both of a pair."""
        return self._drafted or self._model

    @property
    def _num_saved(self) -> int:
        """How much of the prompt is saved.

        Speculation reads the last token itself, and rows that are quantized as they
        are written cannot be kept together with others.
        """
        num_tokens, cuts = self._request.num_tokens, self._request.cuts
        if self._drafted is not None:
            return cuts.last_resumable(num_tokens - 1)
        return num_tokens - cuts.quantizes_at_end(num_tokens, self._request.kv)

    def _start(self) -> _Start:
        """Find and load what is cached, and decide whether to save."""
        if self._store is None:
            return self._cold()
        cache = self._make_cache()
        try:
            self._check_cacheable(cache)
            fingerprint = self._fingerprint()
            cache, resumed = self._resume(self._store, fingerprint, cache)
        except (UnsupportedCacheError, StoreError) as error:
            warn(f"going on without the store: {error}")
            # With a cache of its own: the other one may have been filled.
            return self._cold()
        with contextlib.suppress(PromptCacheError):
            self._request.on_match(resumed.match)
        saver = self._saver(self._store, fingerprint, cache, resumed)
        return _Start(cache, resumed, saver, fingerprint)

    def _cold(self) -> _Start:
        return _Start(self._make_cache(), Resumed(), QuietSaver(None))

    def _make_cache(self) -> list[Any]:
        cache: list[Any] = make_prompt_cache(self._reader, self._request.max_kv_size)
        return cache

    def _check_cacheable(self, cache: list[Any]) -> None:
        """Raise UnsupportedCacheError if the prompt's state cannot be kept."""
        if self._request.input_embeddings is not None:
            raise UnsupportedCacheError(
                "prefixes cannot be stored with input_embeddings"
            )
        check_supported(cache, self._reader)

    def _resume(
        self, store: PrefixStore, fingerprint: Fingerprint, cache: list[Any]
    ) -> tuple[list[Any], Resumed]:
        """Return a cache with the longest prefix there is, in memory or on disk."""
        request = self._request
        if not request.reuse:
            return cache, Resumed()
        if hot := self._resume_hot(store, fingerprint):
            return hot
        # Speculation reads the last token itself.
        is_drafted = self._drafted is not None
        resumed = resume(
            store,
            fingerprint,
            cache,
            request.token_ids[:-1] if is_drafted else request.token_ids,
            cuts=request.cuts,
            kv=request.kv,
            generating=not is_drafted,
            may_decline=True,
        )
        self._loaded_tokens = resumed.cached_tokens
        return cache, resumed

    @property
    def _uses_hot(self) -> bool:
        """Return whether the run's cache holds what a run from nothing would hold.

        It may not where keys and values are quantized from some length on.
        """
        request = self._request
        return request.reuse and request.kv.bits is None and self._drafted is None

    def _resume_hot(
        self, store: PrefixStore, fingerprint: Fingerprint
    ) -> tuple[list[Any], Resumed] | None:
        """Take a cache from memory, if no longer prefix is on disk."""
        request, digest = self._request, fingerprint.digest
        if not self._uses_hot:
            return None
        found = self._hot.find(digest, request.token_ids, request.cuts.last_resumable)
        if found is None:
            return None
        match = store.lookup(request.token_ids, fingerprint, generating=True)
        is_shorter = found.num_tokens < min(match.cached_tokens, request.num_tokens - 1)
        # What is saved has to be captured, piece by piece, from where the store ends.
        is_lost = not found.is_divisible and self._is_due(match)
        if is_shorter or is_lost:
            return None
        try:
            cache = self._hot.take(found)
        except (RuntimeError, MemoryError):
            # It does not fit twice; on disk it is safe.
            self._hot.clear()
            return None
        return None if cache is None else (cache, Resumed(match, found.num_tokens))

    def _keep(self, start: _Start) -> None:
        """Keep the cache in memory, with as much of the answer as it has read."""
        request = self._request
        if not self._uses_hot or start.fingerprint is None:
            return
        token_ids = [*request.token_ids, *self._answer[: self._num_read]]
        end = len(token_ids)
        if not request.cuts.is_divisible(end):
            end = request.cuts.last_resumable(request.num_tokens - 1)
        digest = start.fingerprint.digest
        self._hot.put(digest, token_ids, start.cache, good_to=end)

    def _is_due(self, match: Match) -> bool:
        """Return whether what the store lacks of the prompt is to be saved."""
        if self._request.save == "auto":
            num_new = self._request.num_tokens - match.cached_tokens
            return num_new >= AUTO_SAVE_TOKENS
        return bool(self._request.save)

    def _saver(
        self,
        store: PrefixStore,
        fingerprint: Fingerprint,
        cache: list[Any],
        resumed: Resumed,
    ) -> QuietSaver:
        request = self._request
        token_ids = request.token_ids[: self._num_saved]
        if not self._is_due(resumed.match) or not token_ids:
            return QuietSaver(None)
        saver = Saver(
            store,
            self._writer,
            fingerprint,
            token_ids,
            cache,
            request.cuts,
            request.kv,
            is_prompt=len(token_ids) == request.num_tokens,
            origin=request.origin,
            store_bits=request.store_bits,
        )
        saver.take_over(resumed.taken, resumed.logits)
        return QuietSaver(saver)

    def _record(
        self, start: _Start, last: GenerationResponse
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
            loaded = (self._loaded_tokens, last.load_seconds)
            self._store.add_load(start.fingerprint, *loaded)
            return self._store.record(receipt)
        return nothing

    # Running the model

    def _steps(self, start: _Start) -> Iterator[Step]:
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

    def _logits(self, start: _Start) -> mx.array:
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
        if self._num_saved == request.num_tokens:
            start.saver.capture(num_read, request.num_tokens, logits)
        quantize(start.cache, request.num_tokens, request.kv)
        return logits

    def _prefill(self, start: _Start, end: int) -> None:
        """Read the prompt up to `end`, and save full pieces on the way."""
        request, cache = self._request, start.cache
        saved_at = time.perf_counter()

        def on_piece(first: int, stop: int) -> None:
            nonlocal saved_at
            start.saver.capture(first, stop)
            if stop % request.cuts.step_size or stop > self._num_saved:
                return
            self._num_pieced = stop
            if time.perf_counter() - saved_at >= SAVE_SECONDS:
                start.saver.begin(stop)
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

    def _responses(
        self, steps: Iterator[Step], saver: QuietSaver
    ) -> Iterator[GenerationResponse]:
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
                    saver.capture_answer(self._num_read)
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
