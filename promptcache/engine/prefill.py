"""Prefill: run the model over token ids piece by piece, to fill its cache."""

import time
from collections.abc import Callable, Sequence
from typing import Any

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


def prefill(
    model: Any,
    cache: list[Any],
    token_ids: Sequence[int],
    *,
    start: int,
    end: int,
    plan: PrefillPlan = DEFAULT_PLAN,
    kv: KVSettings | None = None,
    on_piece: Callable[[int, int], object] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> float:
    """Process the token ids `[start, end)`; the cache holds `[0, start)` before.

    Returns the seconds that the model took, without what is called in between.

    Args:
        model: An mlx-lm model.
        cache: Its cache, which is modified; layers may be replaced by quantized ones.
        token_ids: The whole prompt.
        start: Where to begin.
        end: Where to stop.
        plan: Where pieces end.
        kv: When to quantize keys and values, as mlx-lm does after a piece.
        on_piece: Called with each `[start, end)` done, before it is quantized.
        on_progress: Called with the number of tokens the cache holds, `start` at first,
            and `end`.
    """
    kv = kv or KVSettings()
    seconds = 0.0
    if on_progress:
        on_progress(start, end)
    with mx.stream(generation_stream):
        for first, stop in plan.pieces(start, end):
            started = time.perf_counter()
            model(mx.array(token_ids[first:stop])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
            seconds += time.perf_counter() - started
            if on_piece:
                on_piece(first, stop)
            quantized_from = plan.quantized_from(kv)
            if quantized_from is not None and stop >= quantized_from:
                quantize(cache, stop, kv)
            if on_progress:
                on_progress(stop, end)
            mx.clear_cache()
    return seconds


def read_pieces(
    model: LoadedModel,
    read: PromptRead,
    cache: list[Any],
    *,
    start: int,
    end: int,
    on_piece: Callable[[int, int], object],
    on_progress: Callable[[int, int], None],
) -> float:
    """Read a prompt's tokens `[start, end)` with the model, and with its draft.

    See `prefill`. Raises UsageError if the cache cannot be quantized as the settings
    say.
    """
    kv, settings = read.kv, read.settings
    if kv.starts_within(start, read.num_tokens):
        for part in filter(None, (model.model, settings.draft_model)):
            check_quantizable(part, kv, settings.max_kv_size)
    return prefill(
        model.reader(settings),
        cache,
        read.token_ids,
        start=start,
        end=end,
        plan=read.plan,
        kv=kv,
        on_piece=on_piece,
        on_progress=on_progress,
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
