"""Prefill cuts at the same places and computes the same as mlx-lm."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache

from promptcache.engine.prefill import prefill, read_pieces
from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.prefill_plan import PrefillPlan

TOKEN_IDS = [(31 * i + i * i) % 256 for i in range(300)]


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return mlx_lm.load(str(model_dir))[0]


def state(cache: list[Any]) -> list[mx.array]:
    """Return all rows of a cache without their padding."""
    arrays = []
    for layer in cache:
        for part in (layer.keys, layer.values):
            parts = part if isinstance(layer, QuantizedKVCache) else [part]
            arrays += [array[..., : layer.offset, :] for array in parts]
    return arrays


def assert_equal_caches(left: list[Any], right: list[Any]) -> None:
    assert [type(layer) for layer in left] == [type(layer) for layer in right]
    assert [layer.offset for layer in left] == [layer.offset for layer in right]
    pairs = zip(state(left), state(right), strict=True)
    assert all(mx.array_equal(a, b) for a, b in pairs)


def plain_cache(model: Any, num_tokens: int, **options: Any) -> list[Any]:
    """Return the cache of a plain mlx-lm run that has read so many tokens."""
    cache = make_prompt_cache(model)
    # It reads all but the last token in pieces; the step that follows is cut off.
    prompt = mx.array([*TOKEN_IDS[:num_tokens], 0])

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        next(
            generate_step(
                prompt,
                model,
                prompt_cache=cache,
                prompt_progress_callback=stop,
                **options,
            )
        )
    return cache


# Pieces


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 0, []),
        (5, 5, []),
        (0, 1, [(0, 1)]),
        (0, 8, [(0, 8)]),
        (0, 9, [(0, 8), (8, 9)]),
        (3, 20, [(3, 8), (8, 16), (16, 20)]),
        (8, 16, [(8, 16)]),
        (7, 9, [(7, 8), (8, 9)]),
        (9, 11, [(9, 11)]),
    ],
)
def test_pieces_end_at_multiples_of_the_step_counted_from_the_first_token(
    start: int, end: int, expected: list[tuple[int, int]]
) -> None:
    assert list(PrefillPlan(8).pieces(start, end)) == expected


@pytest.mark.parametrize("start", [0, 1, 63, 64, 65, 200])
def test_resumed_prefill_cuts_where_a_cold_one_does(start: int) -> None:
    cold = {stop for _, stop in PrefillPlan(64).pieces(0, 300)}

    resumed = {stop for _, stop in PrefillPlan(64).pieces(start, 300)}

    assert resumed == {stop for stop in cold if stop > start}


# The model


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 128, 300])
def test_cache_equals_that_of_plain_mlx_lm_to_the_bit(
    model: Any, num_tokens: int
) -> None:
    cache = make_prompt_cache(model)

    prefill(model, cache, TOKEN_IDS, start=0, end=num_tokens, plan=PrefillPlan(64))

    expected = plain_cache(model, num_tokens, prefill_step_size=64)
    assert_equal_caches(cache, expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("start", [0, 100, 128, 129, 300])
def test_quantized_cache_equals_that_of_plain_mlx_lm_to_the_bit(
    model: Any, bits: int, start: int
) -> None:
    cache = make_prompt_cache(model)
    kv = KVSettings(bits=bits, group_size=32, start=start)

    prefill(model, cache, TOKEN_IDS, start=0, end=250, plan=PrefillPlan(64), kv=kv)

    expected = plain_cache(
        model,
        250,
        prefill_step_size=64,
        kv_bits=bits,
        kv_group_size=32,
        quantized_kv_start=start,
    )
    assert_equal_caches(cache, expected)


@pytest.mark.parametrize("cut", [64, 128])
def test_prefill_in_two_calls_at_a_piece_equals_one_to_the_bit(
    model: Any, cut: int
) -> None:
    cache, expected = make_prompt_cache(model), make_prompt_cache(model)

    prefill(model, cache, TOKEN_IDS, start=0, end=cut, plan=PrefillPlan(64))
    prefill(model, cache, TOKEN_IDS, start=cut, end=250, plan=PrefillPlan(64))

    prefill(model, expected, TOKEN_IDS, start=0, end=250, plan=PrefillPlan(64))
    assert_equal_caches(cache, expected)


def test_nothing_is_read_where_nothing_is_missing(model: Any) -> None:
    cache = make_prompt_cache(model)

    assert [*read_pieces(model, cache, TOKEN_IDS, start=0, end=0)] == []

    assert [layer.offset for layer in cache] == [0, 0]


def test_pieces_are_told_before_they_are_quantized(model: Any) -> None:
    cache = make_prompt_cache(model)
    pieces = read_pieces(
        model,
        cache,
        TOKEN_IDS,
        start=0,
        end=200,
        plan=PrefillPlan(64),
        kv=KVSettings(bits=8, group_size=32, start=64),
    )

    told = [
        (piece.start, piece.stop, isinstance(cache[0], QuantizedKVCache))
        for piece in pieces
    ]

    assert told == [(0, 64, False), (64, 128, True), (128, 192, True), (192, 200, True)]
    assert isinstance(cache[0], QuantizedKVCache)


@pytest.mark.parametrize(
    ("boundaries", "answer", "expected"),
    [
        ((1, 449), None, 449),
        ((1, 449, 451), None, 449),
        ((1, 300), None, 451),
        ((), None, 451),
        ((1, 449), 400, 400),
        ((1, 449), 451, 451),
        ((1, 449), 900, 451),
    ],
)
def test_next_turn_parts_where_the_answer_begins(
    boundaries: tuple[int, ...], answer: int | None, expected: int
) -> None:
    """Where nobody knows that, at a boundary just before the end, or there."""
    assert PrefillPlan(boundaries=boundaries, answer=answer).next_turn(451) == expected
