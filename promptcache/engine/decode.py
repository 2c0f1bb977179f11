"""Decoding: token by token, sampled as mlx-lm does it; with a draft or without."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import mlx.core as mx
from mlx_lm.generate import generation_stream, speculative_generate_step

from promptcache.engine.sampling import LogitsProcessor, Sampler, sampled
from promptcache.kvcache.kv_quantization import KVSettings, quantize
from promptcache.models.draft import DraftPair

# How often to give unused memory back, as in mlx-lm's generate_step.
CLEAR_CACHE_TOKENS = 256


class Step(NamedTuple):
    """One generated token.

    Attributes:
        token: Its id.
        logprobs: Log-probabilities, shape `(vocabulary,)`.
        from_draft: Whether a draft model proposed it.
        num_read: How many tokens of the answer the cache has read, if that is known.
    """

    token: int
    logprobs: mx.array
    from_draft: bool = False
    num_read: int | None = None


class Decoder:
    """Generates after a prompt.

    Like mlx-lm's `generate_step` it begins a token before it hands out the one
    before, but for the first, which nothing may delay.
    """

    def __init__(
        self,
        model: Any,
        cache: list[Any],
        token_ids: Sequence[int],
        logits: mx.array,
        *,
        max_tokens: int,
        sampler: Sampler,
        logits_processors: Sequence[LogitsProcessor] = (),
        kv: KVSettings,
    ) -> None:
        """Take a prompt that has been read.

        Args:
            model: An mlx-lm model.
            cache: Its cache, holding the prompt; it is modified.
            token_ids: The whole prompt, which the processors see.
            logits: The logits after the prompt, shape `(1, vocabulary)`.
            max_tokens: Most tokens to generate, -1 for no limit.
            sampler: From log-probabilities, shape `(1, vocabulary)`, to a token.
            logits_processors: Called with all tokens so far and the logits.
            kv: When to quantize keys and values.
        """
        self._model = model
        self._cache = cache
        self._num_prompt = len(token_ids)
        self._sampler = sampler
        self._logits_processors = logits_processors
        self._kv = kv
        self._max_tokens = max_tokens
        self._num_tokens = 0
        self._seen = mx.array(list(token_ids)) if logits_processors else None
        # The token that comes next and its log-probabilities, once they are begun.
        self._upcoming: tuple[mx.array, mx.array] | None = self._sample(logits)
        self._token = self._upcoming[0]

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Step:
        """Return the next token."""
        if self._num_tokens == self._max_tokens:
            raise StopIteration
        self._token, logprobs = self._upcoming or self._forward()
        self._num_tokens += 1
        is_followed = self._num_tokens not in (1, self._max_tokens)
        self._upcoming = self._forward() if is_followed else None
        if self._num_tokens % CLEAR_CACHE_TOKENS == 0:
            mx.clear_cache()
        num_read = self._num_tokens - (self._upcoming is None)
        return Step(self._token.item(), logprobs, num_read=num_read)

    def stop(self) -> Step | None:
        """Return the token that has been begun, if one has, and begin no other.

        The cache has then read all tokens but the last that was returned.
        """
        if self._upcoming is None:
            return None
        (self._token, logprobs), self._upcoming = self._upcoming, None
        self._num_tokens += 1
        return Step(self._token.item(), logprobs, num_read=self._num_tokens - 1)

    def _forward(self) -> tuple[mx.array, mx.array]:
        """Read the last token, and begin the one after it."""
        with mx.stream(generation_stream):
            logits = self._model(self._token[None], cache=self._cache)[:, -1, :]
            if self._seen is not None:
                self._seen = mx.concatenate([self._seen, self._token])
            quantize(self._cache, self._num_prompt + self._num_tokens, self._kv)
            return self._sample(logits)

    def _sample(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        with mx.stream(generation_stream):
            for processor in self._logits_processors:
                logits = processor(self._seen, logits)
            logprobs = logits - mx.logsumexp(logits, keepdims=True)
            token = sampled(self._sampler, logprobs)
            mx.async_eval(token, logprobs)
            return token, logprobs.squeeze(0)


def speculate(
    model: DraftPair,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    num_draft_tokens: int,
    max_tokens: int,
    sampler: Sampler,
    logits_processors: Sequence[LogitsProcessor] = (),
    kv: KVSettings,
) -> Iterator[Step]:
    """Generate after a prompt, of which the cache holds all but the last token.

    Args:
        model: The main model with its draft.
        cache: Their cache; it is modified.
        token_ids: The whole prompt, which the processors see.
        num_draft_tokens: How many tokens the draft proposes at once.
        max_tokens: Most tokens to generate, -1 for no limit.
        sampler: From log-probabilities, shape `(1, vocabulary)`, to a token.
        logits_processors: Called with all tokens so far and the logits.
        kv: When to quantize keys and values.
    """
    read = mx.array(list(token_ids[:-1]), dtype=mx.uint32)
    steps = speculative_generate_step(
        mx.array(list(token_ids[-1:]), dtype=mx.uint32),
        model,
        model.draft,
        num_draft_tokens=num_draft_tokens,
        max_tokens=max_tokens,
        sampler=sampler,
        logits_processors=[_seeing(read, p) for p in logits_processors] or None,
        prompt_cache=cache,
        kv_bits=kv.bits,
        kv_group_size=kv.group_size,
        quantized_kv_start=kv.start,
    )
    return (Step(int(token), *rest) for token, *rest in steps)


def _seeing(read: mx.array, processor: LogitsProcessor) -> LogitsProcessor:
    """Return a processor that sees what was read before, which mlx-lm hides from it."""
    return lambda tokens, logits: processor(mx.concatenate([read, tokens]), logits)
