"""Responses, and their progress, are those of plain mlx-lm."""

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from promptcache import CachedGenerator
from promptcache.engine.response import GenerationResponse
from tests.helpers.runs import MAX_TOKENS, PROMPT, ids, plain, run


def test_every_field_is_that_of_plain_mlx_lm(generator: CachedGenerator) -> None:
    generator.build(PROMPT[:50])

    warm = list(generator.stream_generate(PROMPT, MAX_TOKENS))

    expected = list(
        mlx_lm.stream_generate(generator.model, generator.tokenizer, PROMPT, MAX_TOKENS)
    )
    names = (
        "text",
        "token",
        "from_draft",
        "prompt_tokens",
        "generation_tokens",
        "finish_reason",
    )
    assert [[getattr(r, name) for name in names] for r in warm] == [
        [getattr(r, name) for name in names] for r in expected
    ]
    assert all(isinstance(r, GenerationResponse) for r in warm)
    assert all(isinstance(r, type(expected[0])) for r in warm)
    assert all(r.peak_memory > 0 and r.generation_tps > 0 for r in warm)


def test_times_are_of_this_run(generator: CachedGenerator) -> None:
    generator.build(PROMPT[:50])
    started = time.perf_counter()

    responses = list(generator.stream_generate(PROMPT, 5))

    elapsed = time.perf_counter() - started
    last = responses[-1]
    assert 0 < last.load_seconds < elapsed
    assert 0 < last.prefill_seconds < elapsed
    assert last.ttft_seconds == last.load_seconds + last.prefill_seconds
    assert last.prompt_tps == pytest.approx(50 / last.prefill_seconds)
    assert {r.ttft_seconds for r in responses} == {last.ttft_seconds}
    assert {r.cached_tokens for r in responses} == {50}


def test_last_response_names_the_longest_stored_prefix(
    generator: CachedGenerator,
) -> None:
    nothing = run(generator, PROMPT)
    key = generator.build(PROMPT[:50]).key
    matched = run(generator, PROMPT)
    saved = run(generator, PROMPT, save=True)

    assert nothing.last.key is None
    assert matched.last.key == key
    assert generator.store is not None
    prefix = generator.store.resolve(saved.last.key)
    assert prefix.num_tokens == len(PROMPT)


def forcing(token_ids: list[int]) -> Callable[[mx.array, mx.array], mx.array]:
    """Return a logits processor that makes the answer one of given token ids."""

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        wanted = token_ids[tokens.size - len(PROMPT)]
        return mx.where(mx.arange(logits.shape[-1]) == wanted, 0.0, -1e9)[None]

    return process


@pytest.mark.parametrize("text", ["naïve 日本語 🦊!", "a\n\n the and\n"])
def test_text_in_pieces_is_that_of_plain_mlx_lm(
    generator: CachedGenerator, text: str
) -> None:
    forced = generator.tokenizer.encode(text, add_special_tokens=False)
    options: dict[str, Any] = {
        "logits_processors": [forcing([*forced, 0])],
        "max_tokens": len(forced),
    }
    generator.build(PROMPT[:50])

    warm = list(generator.stream_generate(PROMPT, save=False, **options))

    expected = mlx_lm.stream_generate(
        generator.model, generator.tokenizer, PROMPT, **options
    )
    assert [r.text for r in warm] == [r.text for r in expected]
    assert "".join(r.text for r in warm) == text


@pytest.mark.parametrize("max_tokens", [MAX_TOKENS, -1])
def test_generation_ends_at_a_stop_token(
    generator: CachedGenerator, max_tokens: int
) -> None:
    answer = plain(generator, PROMPT).tokens
    stop = next(t for i, t in enumerate(answer) if i >= 4 and t not in answer[:i])
    generator.tokenizer.add_eos_token(str(stop))

    stopped = run(generator, PROMPT, max_tokens=max_tokens, save=True)
    again = run(generator, PROMPT, max_tokens=max_tokens)

    expected = plain(generator, PROMPT, max_tokens=max_tokens)
    for found in (stopped, again):
        assert found.tokens == expected.tokens == answer[: answer.index(stop) + 1]
        assert found.last.finish_reason == "stop"
        assert found.last.generation_tokens == len(found.tokens)
        assert found.text == expected.text


def test_stop_token_comes_first(generator: CachedGenerator) -> None:
    first = plain(generator, PROMPT).tokens[0]
    generator.tokenizer.add_eos_token(str(first))

    stopped = run(generator, PROMPT, save=True)

    assert (stopped.tokens, stopped.text) == ([first], "")
    assert stopped.last.finish_reason == "stop"
    assert generator.match([*PROMPT, 1]).cached_tokens == len(PROMPT)


def test_stop_token_at_the_limit_is_a_stop(generator: CachedGenerator) -> None:
    first = plain(generator, PROMPT).tokens[0]
    generator.tokenizer.add_eos_token(str(first))

    assert run(generator, PROMPT, max_tokens=1).last.finish_reason == "stop"


def test_one_token_is_enough(generator: CachedGenerator) -> None:
    one = run(generator, PROMPT, max_tokens=1, save=True)

    expected = plain(generator, PROMPT, max_tokens=1)
    assert one.tokens == expected.tokens
    assert one.text == expected.text
    assert (one.last.generation_tokens, one.last.finish_reason) == (1, "length")
    assert generator.match([*PROMPT, 1]).cached_tokens == len(PROMPT)


def test_progress_of_a_cold_run_is_that_of_plain_mlx_lm(
    generator: CachedGenerator,
) -> None:
    told: list[tuple[int, int]] = []
    expected: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    def expect(done: int, total: int) -> None:
        expected.append((done, total))

    prompt = ids(170)
    run(generator, prompt, prefill_step_size=100, prompt_progress_callback=tell)

    plain(generator, prompt, prefill_step_size=100, prompt_progress_callback=expect)
    assert told == expected == [(n, 170) for n in (0, 100, 169, 170)]


def test_progress_of_a_warm_run_begins_at_what_is_cached(
    generator: CachedGenerator,
) -> None:
    generator.build(PROMPT[:10])
    told: list[tuple[int, int]] = []

    run(
        generator,
        PROMPT,
        prefill_step_size=32,
        prompt_progress_callback=lambda *done: told.append(done),
    )

    assert told == [(n, 100) for n in (10, 32, 64, 96, 100)]


def test_progress_of_a_short_rest_begins_at_what_is_cached(
    generator: CachedGenerator,
) -> None:
    generator.build(PROMPT[:80])
    told: list[tuple[int, int]] = []

    run(generator, PROMPT, prompt_progress_callback=lambda *done: told.append(done))

    assert told == [(80, 100), (100, 100)]
