"""Prefill: run the model over token ids piece by piece, to fill its cache."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import generation_stream

from promptcache.kvcache.kv_quantization import (
    KVSettings,
    check_quantizable,
    quantize,
)
from promptcache.models.loaded import LoadedModel
from promptcache.models.prefill_plan import DEFAULT_PLAN, PrefillPlan
from promptcache.tiers.prompt_read import PromptRead


class Piece(NamedTuple):
    """Tokens `[start, stop)` of a prompt that were read, and the seconds that took."""

    start: int
    stop: int
    seconds: float


def read_pieces(
    model: Any,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    start: int,
    end: int,
    plan: PrefillPlan = DEFAULT_PLAN,
    kv: KVSettings | None = None,
) -> Iterator[Piece]:
    """Process the token ids `[start, end)`; the cache holds `[0, start)` before.

    Yields each piece before it is quantized. What is done meanwhile must leave the
    cache as it is.

    Args:
        model: An mlx-lm model.
        cache: Its cache, which is modified; layers may be replaced by quantized ones.
        token_ids: The whole prompt.
        start: Where to begin.
        end: Where to stop.
        plan: Where pieces end.
        kv: When to quantize keys and values, as mlx-lm does after a piece.
    """
    kv = kv or KVSettings()
    quantized_from = plan.quantized_from(kv)
    for first, stop in plan.pieces(start, end):
        started = time.perf_counter()
        with mx.stream(generation_stream):
            model(mx.array(token_ids[first:stop])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
        yield Piece(first, stop, time.perf_counter() - started)
        if quantized_from is not None and stop >= quantized_from:
            with mx.stream(generation_stream):
                quantize(cache, stop, kv)
        mx.clear_cache()


def prefill(
    model: Any,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    start: int,
    end: int,
    plan: PrefillPlan = DEFAULT_PLAN,
    kv: KVSettings | None = None,
) -> None:
    """Process the token ids `[start, end)` at one go; see `read_pieces`."""
    for _ in read_pieces(
        model, cache, token_ids, start=start, end=end, plan=plan, kv=kv
    ):
        pass


def read_prompt(
    model: LoadedModel, read: PromptRead, cache: list[Any], *, start: int, end: int
) -> Iterator[Piece]:
    """Read a prompt's tokens `[start, end)` with the model, and with its draft.

    See `read_pieces`. Raises UsageError if the cache cannot be quantized as the
    settings say.
    """
    kv, settings = read.kv, read.settings
    if kv.starts_within(start, read.num_tokens):
        for part in filter(None, (model.model, settings.draft_model)):
            check_quantizable(part, kv, settings.max_kv_size)
    return read_pieces(
        model.reader(settings),
        cache,
        read.token_ids,
        start=start,
        end=end,
        plan=read.plan,
        kv=kv,
    )


def read_rest(
    model: Any, cache: list[Any], token_ids: Sequence[int], *, num_read: int
) -> mx.array:
    """Read `token_ids[num_read:]` at once; return the logits of the next token.

    Args:
        model: An mlx-lm model.
        cache: Its cache, holding `num_read` tokens; it is modified.
        token_ids: The whole prompt.
        num_read: How many of its tokens the cache holds.

    Returns:
        Logits of shape `(1, vocabulary)`, not yet computed.
    """
    with mx.stream(generation_stream):
        rest = mx.array(list(token_ids[num_read:]))
        logits: mx.array = model(rest[None], cache=cache)[:, -1, :]
        return logits
