"""Quantized keys and values give the same tokens warm as cold."""

from typing import Any

import pytest

from promptcache import CachedGenerator
from tests.helpers.marks import all_but
from tests.helpers.runs import OTHER, PROMPT, QUANTIZED, largest_difference, plain, run


@pytest.mark.parametrize("kv", QUANTIZED)
@pytest.mark.parametrize("step", all_but([64], [2048, 64, 32]))
def test_quantized_cold_run_equals_plain_mlx_lm(
    generator: CachedGenerator, kv: dict[str, Any], step: int
) -> None:
    saved = run(generator, PROMPT, save=True, prefill_step_size=step, **kv)

    expected = plain(generator, PROMPT, prefill_step_size=step, **kv)
    assert saved.tokens == expected.tokens
    assert largest_difference(saved.logprobs, expected.logprobs) < 1e-2


QUANTIZED_STORED = {
    "built to the middle": ("build", PROMPT[:50]),
    "built past the start": ("build", PROMPT[:80]),
    "built whole": ("build", PROMPT),
    "generated whole": ("generate", PROMPT),
}


@pytest.mark.parametrize("name", all_but(["built whole"], QUANTIZED_STORED))
@pytest.mark.parametrize("kv", QUANTIZED)
def test_quantized_warm_run_equals_cold_within_one_prefill_step(
    generator: CachedGenerator, kv: dict[str, Any], name: str
) -> None:
    how, stored = QUANTIZED_STORED[name]
    if how == "build":
        generator.build(stored, **kv)
    else:
        run(generator, stored, save=True, max_tokens=1, **kv)

    warm = run(generator, PROMPT, **kv)

    expected = plain(generator, PROMPT, **kv)
    assert warm.last.cached_tokens > 0
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) < 1e-2


@pytest.mark.parametrize("kv", QUANTIZED)
@pytest.mark.parametrize("num_stored", all_but([64], [32, 64, 96, 100]))
def test_quantized_build_resumed_at_a_piece_equals_cold(
    generator: CachedGenerator, kv: dict[str, Any], num_stored: int
) -> None:
    prompt = [*PROMPT, *OTHER]
    generator.build(prompt[:num_stored], prefill_step_size=32, **kv)

    warm = run(generator, prompt, prefill_step_size=32, **kv)

    expected = plain(generator, prompt, prefill_step_size=32, **kv)
    assert warm.last.cached_tokens > 0
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) < 1e-2


def test_prefixes_of_another_quantization_are_not_reused(
    generator: CachedGenerator,
) -> None:
    generator.build(PROMPT, kv_bits=8, kv_group_size=32, quantized_kv_start=0)

    assert run(generator, PROMPT).last.cached_tokens == 0
    four = run(generator, PROMPT, kv_bits=4, kv_group_size=32, quantized_kv_start=0)
    assert four.last.cached_tokens == 0
