"""One generation: match, load, read the rest, decode, save."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import mlx.core as mx
from mlx_lm.generate import GenerationResponse as PlainResponse
from mlx_lm.generate import (
    generate_step,
    generation_stream,
    speculative_generate_step,
    wired_limit,
)
from mlx_lm.models.cache import make_prompt_cache

from promptcache import codec
from promptcache.decoding import LogitsProcessor, Sampler, Step, decode
from promptcache.errors import StoreError, UnsupportedCacheError
from promptcache.prefill import Cuts, KVSettings, prefill, quantize
from promptcache.resuming import resume
from promptcache.saving import QuietSaver, Saver, warn
from promptcache.store import PrefixStore
from promptcache.types import Fingerprint, Match

# Below this, prefilling again costs less than it is worth to keep: a second on
# the slow machines, and 24 MB of SmolLM2's cache.
AUTO_SAVE_TOKENS = 512
# A rest of the prompt up to this long is read in one go with the last token, which
# saves a pass through the model; longer ones as mlx-lm does, because the logits of
# all their tokens would be computed.
JOINED_TOKENS = 64

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
    """

    cached_tokens: int = 0
    load_seconds: float = 0.0
    prefill_seconds: float = 0.0
    key: str | None = None

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
        on_progress: Called with the prompt tokens done so far and their total.
        options: Further arguments of mlx-lm's `generate_step`.
    """

    token_ids: list[int]
    max_tokens: int
    save: SavePolicy
    reuse: bool
    sampler: Sampler
    logits_processors: list[LogitsProcessor]
    cuts: Cuts
    kv: KVSettings
    on_progress: Progress = lambda done, total: None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Return the length of the prompt."""
        return len(self.token_ids)


class _Start(NamedTuple):
    """Where a generation starts: its cache, and what the cache already holds."""

    cache: list[Any]
    match: Match
    saver: QuietSaver


class Generation:
    """Runs one request; trouble with the store is a warning and a prefill."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: PrefixStore | None,
        fingerprint: Callable[[KVSettings], Fingerprint],
        request: Request,
    ) -> None:
        """Take a store, or None to go without, and a function that fingerprints."""
        self._model = model
        self._tokenizer = tokenizer
        self._store = store if request.reuse or request.save else None
        self._fingerprint = fingerprint
        self._request = request

    def stream(self) -> Generator[GenerationResponse, None, None]:
        """Generate; at the end, also an early one, save the prompt if it is due."""
        request = self._request
        started = time.perf_counter()
        start = self._start()
        loaded = time.perf_counter()
        num_new = request.num_tokens - start.match.cached_tokens
        key = start.match.key
        prefill_seconds = 0.0
        try:
            with wired_limit(self._model, [generation_stream]):
                for response in self._responses(self._steps(start)):
                    prefill_seconds = prefill_seconds or time.perf_counter() - loaded
                    if response.finish_reason is not None:
                        key = start.saver.finish(request.num_tokens) or key
                        response.key = key
                    response.cached_tokens = start.match.cached_tokens
                    response.load_seconds = loaded - started
                    response.prefill_seconds = prefill_seconds
                    response.prompt_tps = num_new / prefill_seconds
                    yield response
        finally:
            if prefill_seconds:
                start.saver.finish(request.num_tokens)
            self._touch(start.match)

    # Starting

    def _start(self) -> _Start:
        """Find and load what is cached, and decide whether to save."""
        options = self._request.options
        cache = make_prompt_cache(self._model, options.get("max_kv_size"))
        cold = _Start(cache, Match(), QuietSaver(None))
        if self._store is None:
            return cold
        try:
            self._check_cacheable(cache)
            fingerprint = self._fingerprint(self._request.kv)
            match = self._resume(self._store, fingerprint, cache)
        except (UnsupportedCacheError, StoreError) as error:
            warn(f"going on without the store: {error}")
            return cold
        return _Start(cache, match, self._saver(self._store, fingerprint, cache, match))

    def _check_cacheable(self, cache: list[Any]) -> None:
        """Raise UnsupportedCacheError if the token ids alone decide no cache."""
        for option in ("draft_model", "input_embeddings"):
            if self._request.options.get(option) is not None:
                raise UnsupportedCacheError(f"prefixes cannot be stored with {option}")
        codec.check_supported(cache)

    def _resume(
        self, store: PrefixStore, fingerprint: Fingerprint, cache: list[Any]
    ) -> Match:
        request = self._request
        if not request.reuse:
            return Match()
        # The last token stays, because the model has to read something.
        limit = request.num_tokens - 1
        match = store.lookup(request.token_ids, fingerprint, limit=limit)
        return resume(
            store, match, cache, request.token_ids, cuts=request.cuts, kv=request.kv
        )

    def _saver(
        self,
        store: PrefixStore,
        fingerprint: Fingerprint,
        cache: list[Any],
        match: Match,
    ) -> QuietSaver:
        request = self._request
        num_new = request.num_tokens - match.cached_tokens
        wanted = request.save
        if wanted == "auto":
            wanted = num_new >= AUTO_SAVE_TOKENS
        saver = Saver(store, fingerprint, request.token_ids, cache)
        return QuietSaver(saver if wanted else None)

    def _touch(self, match: Match) -> None:
        if self._store is not None and match.slices:
            with contextlib.suppress(StoreError):
                self._store.touch(match)

    # Running the model

    def _steps(self, start: _Start) -> Iterator[Step]:
        """Read what is not cached and generate after it."""
        request = self._request
        if request.options.get("draft_model") is not None:
            return self._speculative_steps()
        if request.options.get("input_embeddings") is not None:
            return self._embedded_steps()
        num_read = self._prefill(start)
        return decode(
            self._model,
            start.cache,
            request.token_ids,
            num_read=num_read,
            max_tokens=request.max_tokens,
            sampler=request.sampler,
            logits_processors=request.logits_processors,
            kv=request.kv,
        )

    def _prefill(self, start: _Start) -> int:
        """Read the prompt but for its end; return how many tokens the cache holds."""
        request, cache = self._request, start.cache
        end = self._end_of_prefill(start.match.cached_tokens)

        def on_piece(_: int, stop: int) -> None:
            # The rest is saved after the answer, where it delays nothing; but rows
            # that are about to be quantized must be kept as they are now.
            is_full = stop % request.cuts.step_size == 0
            if is_full or request.kv.quantizes(cache, stop):
                start.saver.save(stop)

        prefill(
            self._model,
            cache,
            request.token_ids,
            start=start.match.cached_tokens,
            end=end,
            cuts=request.cuts,
            kv=request.kv,
            on_piece=on_piece,
            on_progress=lambda done, _: request.on_progress(done, request.num_tokens),
        )
        if end == request.num_tokens - 1:
            # As mlx-lm does before the last token, also where nothing was left to do.
            quantize(cache, end, request.kv)
        return end

    def _end_of_prefill(self, cached_tokens: int) -> int:
        """Return where to stop, so that decoding reads the rest in one go."""
        request = self._request
        cut = request.cuts.last_before(request.num_tokens)
        end = request.num_tokens - 1
        # mlx-lm would quantize the last piece before it reads the last token.
        if request.kv.bits is not None and cut < max(request.kv.start, 1) <= end:
            return end
        begin = max(cut, cached_tokens)
        is_short = request.num_tokens - begin <= JOINED_TOKENS
        return begin if begin and is_short else end

    def _speculative_steps(self) -> Iterator[Step]:
        options = dict(self._request.options)
        options.pop("max_kv_size", None)
        steps = speculative_generate_step(
            mx.array(self._request.token_ids),
            self._model,
            options.pop("draft_model"),
            prefill_step_size=self._request.cuts.step_size,
            **self._sampling_options(),
            **options,
        )
        return (Step(*step) for step in steps)

    def _embedded_steps(self) -> Iterator[Step]:
        steps = generate_step(
            mx.array(self._request.token_ids),
            self._model,
            prefill_step_size=self._request.cuts.step_size,
            prompt_progress_callback=self._request.on_progress,
            **self._sampling_options(),
            **self._request.options,
        )
        return (Step(*step) for step in steps)

    def _sampling_options(self) -> dict[str, Any]:
        request = self._request
        return {
            "max_tokens": request.max_tokens,
            "sampler": request.sampler,
            "logits_processors": request.logits_processors or None,
            "kv_bits": request.kv.bits,
            "kv_group_size": request.kv.group_size,
            "quantized_kv_start": request.kv.start,
        }

    def _responses(self, steps: Iterator[Step]) -> Iterator[GenerationResponse]:
        """Turn tokens into text, as mlx-lm's `stream_generate` does."""
        request = self._request
        detokenizer = self._tokenizer.detokenizer
        decoding = time.perf_counter()
        for num_tokens, step in enumerate(steps, start=1):
            if num_tokens == 1:
                request.on_progress(request.num_tokens, request.num_tokens)
                decoding = time.perf_counter()
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
