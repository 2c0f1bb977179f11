"""A model with windows resumes at any fork."""

from collections.abc import Callable
from pathlib import Path

import pytest

from promptcache import CachedGenerator, PrefixStore
from tests.helpers.runs import OTHER, PROMPT, cold, largest_difference, plain, run


@pytest.fixture
def windowed(make_model: Callable[[str], Path], store: PrefixStore) -> CachedGenerator:
    """A generator whose model looks back 32 tokens in every other layer."""
    return CachedGenerator.load(make_model("gemma3_text"), store=store)


@pytest.mark.parametrize("num_tokens", [20, 33, 100])
def test_window_that_is_saved_equals_plain_mlx_lm(
    windowed: CachedGenerator, num_tokens: int
) -> None:
    prompt = PROMPT[:num_tokens]

    saved = run(windowed, prompt, save=True)

    expected = plain(windowed, prompt)
    assert saved.tokens == expected.tokens
    assert largest_difference(saved.logprobs, expected.logprobs) < 1e-4


@pytest.mark.parametrize("step", [2048, 40])
def test_rows_of_a_window_are_those_of_the_prompt_after_a_long_answer(
    windowed: CachedGenerator, step: int
) -> None:
    run(windowed, PROMPT, save=True, max_tokens=100, prefill_step_size=step)

    for fork in (5, 31, 32, 33, 64, 80, 99, 100):
        prompt = [*PROMPT[:fork], *OTHER[:20]]
        warm = run(windowed, prompt, prefill_step_size=step, max_tokens=8)

        expected = cold(windowed, prompt, prefill_step_size=step, max_tokens=8)
        assert warm.last.cached_tokens == fork
        assert warm.tokens == expected.tokens
        assert largest_difference(warm.logprobs, expected.logprobs) < 1e-4


def test_window_that_is_resumed_is_saved_with_all_its_rows(
    windowed: CachedGenerator, store: PrefixStore
) -> None:
    longer = [*PROMPT, *OTHER]
    windowed.build(PROMPT[:50])
    run(windowed, PROMPT, save=True)
    run(windowed, longer, save=True)

    for fork in (40, 50, 60, 100, 110, 199):
        prompt = [*longer[:fork], 7, 8, 9]
        warm = run(windowed, prompt, max_tokens=8)
        assert warm.last.cached_tokens == fork
        assert warm.tokens == cold(windowed, prompt, max_tokens=8).tokens
    assert store.verify().is_sound
