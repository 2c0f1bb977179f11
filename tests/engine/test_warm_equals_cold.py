"""A warm run equals a cold one, and a cold one equals plain mlx-lm."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest

from promptcache import CachedGenerator
from tests.helpers.marks import all_but
from tests.helpers.runs import OTHER, PROMPT, cold, ids, largest_difference, plain, run

STORED = {
    "nothing": (OTHER, 0),
    "one token": (PROMPT[:1], 1),
    "31 tokens": (PROMPT[:31], 31),
    "one block": (PROMPT[:32], 32),
    "33 tokens": (PROMPT[:33], 33),
    "two blocks": (PROMPT[:64], 64),
    "all but one token": (PROMPT[:99], 99),
    "the whole prompt": (PROMPT, 99),
    "a longer prompt": ([*PROMPT, *OTHER], 99),
}


@pytest.mark.parametrize("name", all_but(["31 tokens", "the whole prompt"], STORED))
def test_warm_tokens_equal_cold_and_plain_ones(
    generator: CachedGenerator, name: str
) -> None:
    stored, cached_tokens = STORED[name]
    generator.build(stored)

    warm = run(generator, PROMPT)

    assert warm.last.cached_tokens == cached_tokens
    assert warm.tokens == cold(generator, PROMPT).tokens
    expected = plain(generator, PROMPT)
    assert warm.tokens == expected.tokens
    assert warm.text == expected.text
    assert largest_difference(warm.logprobs, expected.logprobs) < 1e-4


@pytest.mark.parametrize("num_tokens", all_but([65, 400], [1, 2, 63, 64, 65, 400]))
@pytest.mark.parametrize("step", [150, 2048])
def test_cold_logprobs_equal_plain_ones_to_the_bit(
    generator: CachedGenerator, num_tokens: int, step: int
) -> None:
    prompt = ids(num_tokens)

    saved = run(generator, prompt, save=True, prefill_step_size=step)

    expected = plain(generator, prompt, prefill_step_size=step)
    assert saved.last.cached_tokens == 0
    assert saved.tokens == expected.tokens
    assert largest_difference(saved.logprobs, expected.logprobs) == 0.0


@pytest.mark.parametrize("num_tokens", [33, 64, 100])
def test_cold_run_that_joins_its_last_pieces_equals_a_plain_one(
    generator: CachedGenerator, num_tokens: int
) -> None:
    prompt = PROMPT[:num_tokens]

    saved = run(generator, prompt, save=True, prefill_step_size=32)

    expected = plain(generator, prompt, prefill_step_size=32)
    assert saved.tokens == expected.tokens
    assert largest_difference(saved.logprobs, expected.logprobs) < 1e-4


@pytest.mark.parametrize("num_words", [3, 40])
def test_chat_after_its_built_system_equals_cold_to_the_bit(
    generator: CachedGenerator, num_words: int
) -> None:
    built = generator.build(system="You narrate.")
    messages = [
        {"role": "system", "content": "You narrate."},
        {"role": "user", "content": "I open the door. " * num_words},
    ]

    warm = run(generator, messages)

    expected = cold(generator, messages)
    assert warm.last.cached_tokens == built.num_tokens
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


@pytest.mark.parametrize("step", [16, 33, 2048])
def test_long_suffix_is_read_in_pieces_after_a_match(
    generator: CachedGenerator, step: int
) -> None:
    prompt = ids(400)
    generator.build(prompt[:50])

    warm = run(generator, prompt, prefill_step_size=step)

    assert warm.last.cached_tokens == 50
    assert warm.tokens == plain(generator, prompt, prefill_step_size=step).tokens


def test_match_at_a_piece_gives_the_logits_of_a_cold_run_to_the_bit(
    generator: CachedGenerator,
) -> None:
    prompt = ids(300)
    generator.build(prompt[:128], prefill_step_size=64)

    warm = run(generator, prompt, prefill_step_size=64)

    assert warm.last.cached_tokens == 128
    expected = cold(generator, prompt, prefill_step_size=64)
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


@pytest.mark.parametrize("variant", ["float16", "bfloat16"])
def test_half_precision_runs_warm(generator: CachedGenerator, variant: str) -> None:
    generator.model.set_dtype(getattr(mx, variant))
    wrapped = CachedGenerator(
        generator.model, generator.tokenizer, store=generator.store
    )
    prompt = ids(150)
    wrapped.build(prompt[:64], prefill_step_size=64)

    warm = run(wrapped, prompt, prefill_step_size=64)

    assert warm.last.cached_tokens == 64
    assert warm.tokens == plain(wrapped, prompt, prefill_step_size=64).tokens


def test_same_prompt_twice_leaves_one_token_to_read(
    generator: CachedGenerator,
) -> None:
    first = run(generator, PROMPT, save=True)

    second = run(generator, PROMPT, save=True)

    assert first.last.cached_tokens == 0
    assert second.last.cached_tokens == len(PROMPT) - 1
    assert second.tokens == first.tokens


def test_conversation_resumes_from_its_last_prompt(generator: CachedGenerator) -> None:
    first = run(generator, PROMPT, save=True)
    longer = [*PROMPT, *first.tokens, *OTHER]

    second = run(generator, longer, save=True)

    # The answer is not stored, but it may begin like nothing else.
    assert second.last.cached_tokens == len(PROMPT)
    assert second.tokens == plain(generator, longer).tokens


def test_one_token_prompt_is_saved_and_generates(generator: CachedGenerator) -> None:
    first = run(generator, [65], save=True)

    second = run(generator, [65], save=True)

    assert first.tokens == second.tokens == plain(generator, [65]).tokens
    assert (first.last.cached_tokens, second.last.cached_tokens) == (0, 0)


def test_prompts_of_every_kind_equal_plain_mlx_lm(generator: CachedGenerator) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    rendered = generator.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True
    )

    from_messages = run(generator, messages)
    from_text = run(generator, "Hello")
    from_array = run(generator, mx.array(PROMPT))

    assert from_messages.tokens == plain(generator, rendered).tokens
    assert from_text.tokens == plain(generator, "Hello").tokens
    assert from_array.tokens == plain(generator, PROMPT).tokens


def test_generate_returns_the_whole_text(generator: CachedGenerator) -> None:
    text = generator.generate("Hello", max_tokens=20)

    expected = mlx_lm.generate(
        generator.model, generator.tokenizer, prompt="Hello", max_tokens=20
    )
    assert text == expected


def test_logits_processors_see_the_whole_prompt(generator: CachedGenerator) -> None:
    seen: dict[str, list[list[int]]] = {"plain": [], "cold": [], "warm": []}

    def recorder(name: str) -> Callable[[mx.array, mx.array], mx.array]:
        def record(tokens: mx.array, logits: mx.array) -> mx.array:
            seen[name].append(tokens.tolist())
            return logits

        return record

    plain(generator, PROMPT, max_tokens=4, logits_processors=[recorder("plain")])
    cold(generator, PROMPT, max_tokens=4, logits_processors=[recorder("cold")])
    generator.build(PROMPT[:80])
    warm = run(generator, PROMPT, max_tokens=4, logits_processors=[recorder("warm")])

    assert warm.last.cached_tokens == 80
    assert seen["warm"] == seen["cold"]
    # mlx-lm begins one token more than it hands out.
    assert seen["cold"] == seen["plain"][: len(seen["cold"])]
    assert seen["warm"][:2] == [PROMPT, [*PROMPT, warm.tokens[0]]]


@pytest.mark.parametrize("context_size", [20, 200])
def test_repetition_penalty_looks_into_the_cached_prefix(
    generator: CachedGenerator, context_size: int
) -> None:
    options: dict[str, Any] = {
        "repetition_penalty": 1.8,
        "repetition_context_size": context_size,
    }
    processors = mlx_lm.sample_utils.make_logits_processors(**options)
    generator.build(PROMPT[:99])

    warm = run(generator, PROMPT, **options)

    assert warm.last.cached_tokens == 99
    assert warm.tokens == cold(generator, PROMPT, **options).tokens
    expected = plain(generator, PROMPT, logits_processors=processors)
    assert warm.tokens == expected.tokens
    assert warm.tokens != plain(generator, PROMPT).tokens


@pytest.mark.parametrize(
    "options",
    [
        {"temp": 1.0},
        {"temp": 0.7, "top_p": 0.9},
        {"temp": 1.3, "top_k": 20},
        {"temp": 1.0, "min_p": 0.05},
    ],
    ids=str,
)
def test_sampling_with_a_seed_is_the_same_warm(
    generator: CachedGenerator, options: dict[str, Any]
) -> None:
    generator.build(PROMPT[:70])

    warm = run(generator, PROMPT, seed=7, **options)

    assert warm.last.cached_tokens == 70
    assert warm.tokens == cold(generator, PROMPT, seed=7, **options).tokens
    mx.random.seed(7)
    sampler = mlx_lm.sample_utils.make_sampler(**options)
    assert warm.tokens == plain(generator, PROMPT, sampler=sampler).tokens
    assert warm.tokens != run(generator, PROMPT, seed=8, **options).tokens
