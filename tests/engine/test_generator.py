"""A warm run equals a cold one, and a cold one equals plain mlx-lm."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.models.cache import KVCache

from promptcache import (
    CachedGenerator,
    PrefixStore,
    PromptCacheWarning,
    StoreError,
    UnsupportedCacheError,
    UsageError,
)
from promptcache.engine.response import GenerationResponse
from promptcache.store.blobs.folder import BlobFolder
from promptcache.tiers.prompt_read import AUTO_SAVE_TOKENS
from tests.helpers import tiny
from tests.helpers.runs import (
    MAX_TOKENS,
    OTHER,
    PROMPT,
    cold,
    ids,
    largest_difference,
    only_warning,
    plain,
    run,
    stored_token_ids,
)
from tests.helpers.segments import flip

# Warm equals cold equals plain

STORED = {
    "nothing": (OTHER, 0),
    "one token": (PROMPT[:1], 1),
    "31 tokens": (PROMPT[:31], 31),
    "one block": (PROMPT[:32], 32),
    "33 tokens": (PROMPT[:33], 33),
    "two blocks": (PROMPT[:64], 64),
    "a fork": ([*PROMPT[:77], *OTHER[77:]], 77),
    "a fork in the first block": ([*PROMPT[:5], *OTHER[5:]], 5),
    "a fork at a block": ([*PROMPT[:64], *OTHER[64:]], 64),
    "all but one token": (PROMPT[:99], 99),
    "the whole prompt": (PROMPT, 99),
    "a longer prompt": ([*PROMPT, *OTHER], 99),
}


@pytest.mark.parametrize("name", STORED)
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


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 400])
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


# Responses


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


# Saving


@pytest.mark.parametrize(
    ("policy", "num_tokens", "is_saved"),
    [
        ("auto", AUTO_SAVE_TOKENS - 1, False),
        ("auto", AUTO_SAVE_TOKENS, True),
        (True, 3, True),
        (False, AUTO_SAVE_TOKENS, False),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "call"])
def test_policy_decides_what_is_saved(
    model_dir: Path,
    store: PrefixStore,
    policy: Any,
    num_tokens: int,
    is_saved: bool,
    where: str,
) -> None:
    prompt = ids(num_tokens)
    by_constructor = where == "constructor"
    generator = CachedGenerator.load(
        model_dir, store=store, save=policy if by_constructor else not is_saved
    )

    list(generator.stream_generate(prompt, 3, save=None if by_constructor else policy))

    assert stored_token_ids(store) == ([prompt] if is_saved else [])


def test_auto_counts_new_tokens_only(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    prompt = ids(AUTO_SAVE_TOKENS + 100)
    generator.build(prompt[:101])

    run(generator, prompt, save="auto")
    assert len(stored_token_ids(store)) == 1

    run(generator, [*prompt, 1], save="auto")
    assert stored_token_ids(store)[-1] == [*prompt, 1]


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 64, 65, 100])
def test_all_prompt_tokens_are_stored_and_no_answer(
    generator: CachedGenerator, store: PrefixStore, num_tokens: int
) -> None:
    prompt = PROMPT[:num_tokens]

    run(generator, prompt, save=True, prefill_step_size=32)

    assert stored_token_ids(store) == [prompt]


def test_answer_is_not_stored_after_a_match(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    generator.build(PROMPT[:50])

    run(generator, PROMPT, save=True)

    assert stored_token_ids(store) == [PROMPT[:50], PROMPT]


def test_reuse_false_reads_everything_again(generator: CachedGenerator) -> None:
    generator.build(PROMPT)

    again = run(generator, PROMPT, reuse=False)

    assert again.last.cached_tokens == 0


# Ending early


@pytest.mark.parametrize("policy", [True, False])
def test_early_close_saves_the_prompt_if_it_is_due(
    generator: CachedGenerator, store: PrefixStore, policy: bool
) -> None:
    responses = generator.stream_generate(PROMPT, MAX_TOKENS, save=policy)
    next(responses)

    responses.close()

    assert stored_token_ids(store) == ([PROMPT] if policy else [])
    assert run(generator, PROMPT).tokens == plain(generator, PROMPT).tokens


def test_generator_that_never_started_saves_nothing(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    generator.stream_generate(PROMPT, save=True)

    assert stored_token_ids(store) == []


@pytest.mark.parametrize("num_taken", [1, 5])
def test_exception_in_the_consumer_saves_the_prompt(
    generator: CachedGenerator, store: PrefixStore, num_taken: int
) -> None:
    def consume() -> None:
        for response in generator.stream_generate(PROMPT, save=True):
            if response.generation_tokens == num_taken:
                raise ValueError("enough")

    with pytest.raises(ValueError, match="enough"):
        consume()

    assert stored_token_ids(store) == [PROMPT]
    assert store.verify().is_sound
    again = run(generator, PROMPT)
    assert again.last.cached_tokens == 99
    assert again.tokens == plain(generator, PROMPT).tokens


def test_interrupt_during_prefill_keeps_the_pieces_that_are_done(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    def interrupt(done: int, _: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(
            generator,
            PROMPT,
            save=True,
            prefill_step_size=32,
            prompt_progress_callback=interrupt,
        )

    assert store.verify().is_sound
    assert stored_token_ids(store) == [PROMPT[:64]]
    again = run(generator, PROMPT, prefill_step_size=32)
    assert again.last.cached_tokens == 64
    expected = plain(generator, PROMPT, prefill_step_size=32)
    assert again.tokens == expected.tokens


def test_error_of_a_sampler_leaves_the_store_sound(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    def broken(logprobs: mx.array) -> mx.array:
        raise RuntimeError("broken sampler")

    with pytest.raises(RuntimeError, match="broken sampler"):
        run(generator, PROMPT, save=True, sampler=broken)

    assert store.verify().is_sound
    assert run(generator, PROMPT, save=True).tokens == plain(generator, PROMPT).tokens


def test_two_generations_in_turn_do_not_mix(generator: CachedGenerator) -> None:
    generator.build(PROMPT[:60])
    forked = [*PROMPT[:60], *OTHER]

    left = generator.stream_generate(PROMPT, MAX_TOKENS, save=True)
    right = generator.stream_generate(forked, MAX_TOKENS, save=True)
    pairs = list(zip(left, right, strict=True))

    assert [a.token for a, _ in pairs] == plain(generator, PROMPT).tokens
    assert [b.token for _, b in pairs] == plain(generator, forked).tokens


# Sampling and logits processors


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


# Quantized keys and values

QUANTIZED = [
    pytest.param(
        {"kv_bits": bits, "kv_group_size": 32, "quantized_kv_start": start},
        id=f"{bits} bits from {start}",
    )
    for bits in (8, 4)
    for start in (0, 60)
]


@pytest.mark.parametrize("kv", QUANTIZED)
@pytest.mark.parametrize("step", [2048, 64, 32])
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
    "built longer": ("build", [*PROMPT, *OTHER]),
    "built but one": ("build", PROMPT[:99]),
    "generated to the middle": ("generate", PROMPT[:50]),
    "generated past the start": ("generate", PROMPT[:80]),
    "generated whole": ("generate", PROMPT),
    "generated a fork": ("generate", [*PROMPT[:70], *OTHER[70:]]),
}


@pytest.mark.parametrize("name", QUANTIZED_STORED)
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
@pytest.mark.parametrize("num_stored", [32, 64, 96, 100])
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


# Windows

FORKS = {
    "after one token": 1,
    "before the window is full": 31,
    "where the window is full": 32,
    "after the window was full": 33,
    "in the middle of a piece": 57,
    "before the last token": 99,
    "at the end": 100,
}


@pytest.fixture
def windowed(make_model: Callable[[str], Path], store: PrefixStore) -> CachedGenerator:
    """A generator whose model looks back 32 tokens in every other layer."""
    return CachedGenerator.load(make_model("gemma3_text"), store=store)


@pytest.mark.parametrize(("how", "step"), [("built", 40), ("answered", 2048)])
@pytest.mark.parametrize("name", FORKS)
def test_window_is_resumed_at_any_fork(
    windowed: CachedGenerator, name: str, how: str, step: int
) -> None:
    fork = FORKS[name]
    stored = [*PROMPT[:fork], *OTHER]
    if how == "built":
        windowed.build(stored, prefill_step_size=step)
    else:
        run(windowed, stored, save=True, max_tokens=1, prefill_step_size=step)

    warm = run(windowed, PROMPT, prefill_step_size=step, max_tokens=8)

    expected = cold(windowed, PROMPT, prefill_step_size=step, max_tokens=8)
    assert warm.last.cached_tokens == min(fork, len(PROMPT) - 1)
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) < 1e-4


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


# Models that only a checkpoint can resume


@pytest.fixture(scope="module")
def hybrid_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("hybrid"), tiny.QWEN3_NEXT)


@pytest.fixture
def hybrid(hybrid_dir: Path, store: PrefixStore) -> CachedGenerator:
    """A generator whose model has linear attention in every other layer."""
    return CachedGenerator.load(hybrid_dir, store=store)


@pytest.fixture
def calls(hybrid: CachedGenerator, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many tokens the model reads with each call."""
    noted: list[int] = []
    model_class = type(hybrid.model)
    call = model_class.__call__

    def noting(model: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> Any:
        noted.append(inputs.size)
        return call(model, inputs, *args, **kwargs)

    monkeypatch.setattr(model_class, "__call__", noting)
    return noted


def chat(*contents: str) -> list[dict[str, str]]:
    """Return a system message, and what user and assistant say in turns."""
    roles = ["system", *(["user", "assistant"] * len(contents))]
    return [
        {"role": role, "content": content}
        for role, content in zip(roles, contents, strict=False)
    ]


FIRST_TURN = chat("You narrate. " * 5, "I open the door. " * 8)
SECOND_TURN = [
    *FIRST_TURN,
    {"role": "assistant", "content": "It is dark. " * 8},
    {"role": "user", "content": "I light a torch."},
]


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1], FIRST_TURN], ids=len)
def test_prompt_that_was_answered_costs_its_last_token(
    hybrid: CachedGenerator, calls: list[int], prompt: Any
) -> None:
    first = run(hybrid, prompt, save=True)
    num_read = sum(calls)
    calls.clear()
    steps: list[tuple[int, int]] = []

    again = run(
        hybrid, prompt, prompt_progress_callback=lambda *done: steps.append(done)
    )

    num_tokens = again.last.prompt_tokens
    assert first.last.cached_tokens == 0
    assert again.last.cached_tokens == num_tokens - 1
    assert num_read == num_tokens + MAX_TOKENS - 1
    assert calls == [1] * MAX_TOKENS
    assert steps == [(num_tokens - 1, num_tokens), (num_tokens, num_tokens)]
    assert again.tokens == first.tokens
    assert largest_difference(again.logprobs, first.logprobs) == 0.0


def test_prompt_that_was_built_costs_its_last_token(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    hybrid.build(PROMPT)
    assert sum(calls) == len(PROMPT) - 1
    calls.clear()

    warm = run(hybrid, PROMPT)

    assert warm.last.cached_tokens == len(PROMPT) - 1
    assert calls == [1] * MAX_TOKENS
    expected = cold(hybrid, PROMPT)
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


def test_prefix_that_was_built_is_not_read_again(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    first = hybrid.build(PROMPT, prefill_step_size=32)
    calls.clear()

    again = hybrid.build(PROMPT, prefill_step_size=32)

    assert (first.cached_tokens, again.cached_tokens) == (0, len(PROMPT) - 1)
    assert calls == []


def test_second_turn_reads_that_turn_only(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    first = run(hybrid, FIRST_TURN, save=True, max_tokens=1)
    calls.clear()

    second = run(hybrid, SECOND_TURN, max_tokens=1)

    num_first, num_second = first.last.prompt_tokens, second.last.prompt_tokens
    # The state is taken before the last token, which is read alone.
    assert second.last.cached_tokens == num_first - 1
    assert sum(calls) == num_second - num_first + 1
    expected = cold(hybrid, SECOND_TURN, max_tokens=1)
    assert second.tokens == expected.tokens
    assert largest_difference(second.logprobs, expected.logprobs) < 1e-4


THINKING_TEMPLATE = tiny.CHAT_TEMPLATE.replace(
    "{% if add_generation_prompt %}<|assistant|>",
    "{% if add_generation_prompt %}<|assistant|><think>",
)


def test_second_turn_resumes_where_the_answer_begins_if_thinking_is_dropped(
    hybrid_dir: Path, store: PrefixStore, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(hybrid_dir, tmp_path / "thinking"))
    tiny.save_tokenizer(folder, THINKING_TEMPLATE)
    generator = CachedGenerator.load(folder, store=store)
    first = run(generator, FIRST_TURN, save=True)
    start_of_answer = first.last.prompt_tokens - len(
        generator.tokenizer.encode("<think>", add_special_tokens=False)
    )

    second = run(generator, SECOND_TURN, save=True)
    third = run(generator, [*SECOND_TURN[:3], SECOND_TURN[1]])

    assert second.last.cached_tokens == start_of_answer
    assert second.tokens == cold(generator, SECOND_TURN).tokens
    assert third.last.cached_tokens >= start_of_answer
    assert third.tokens == cold(generator, [*SECOND_TURN[:3], SECOND_TURN[1]]).tokens


def test_chat_after_its_built_system_reads_the_rest_only(
    hybrid: CachedGenerator, calls: list[int]
) -> None:
    built = hybrid.build(system=FIRST_TURN[0]["content"])
    calls.clear()

    warm = run(hybrid, FIRST_TURN, max_tokens=1)

    assert warm.last.cached_tokens == built.num_tokens
    assert sum(calls) == warm.last.prompt_tokens - built.num_tokens
    expected = cold(hybrid, FIRST_TURN, max_tokens=1)
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


@pytest.mark.parametrize(
    ("fork", "cached_tokens"),
    [(1, 0), (127, 0), (128, 128), (129, 128), (300, 256), (398, 384)],
)
def test_fork_is_resumed_at_the_last_piece_before_it(
    hybrid: CachedGenerator, fork: int, cached_tokens: int
) -> None:
    prompt = ids(400)
    hybrid.build(prompt, prefill_step_size=128)
    forked = [*prompt[:fork], *OTHER[:9]]

    warm = run(hybrid, forked, prefill_step_size=128, max_tokens=8)

    expected = cold(hybrid, forked, prefill_step_size=128, max_tokens=8)
    assert warm.last.cached_tokens == cached_tokens
    assert warm.tokens == expected.tokens
    assert largest_difference(warm.logprobs, expected.logprobs) < 1e-4


def checkpoint_paths(store: PrefixStore) -> list[Path]:
    """Return the blobs of checkpoints, the deepest first."""
    blobs = BlobFolder(store.path)
    infos = [blobs.read_header(key).info for key, _ in blobs.stored()]
    deepest = sorted(infos, key=lambda info: -info.end)
    return [blobs.path(info.key) for info in deepest if info.is_checkpoint]


@pytest.mark.parametrize("damage", ["flipped", "deleted"])
def test_damaged_checkpoint_is_one_warning_and_the_right_tokens(
    hybrid: CachedGenerator, store: PrefixStore, damage: str
) -> None:
    run(hybrid, FIRST_TURN, save=True)
    path = checkpoint_paths(store)[0]
    path.unlink() if damage == "deleted" else flip(path)

    with pytest.warns(PromptCacheWarning) as record:
        warm = run(hybrid, FIRST_TURN, save=True)
    healed = run(hybrid, FIRST_TURN)

    assert "read again" in only_warning(record)
    assert 0 < warm.last.cached_tokens < warm.last.prompt_tokens
    assert healed.last.cached_tokens == healed.last.prompt_tokens - 1
    expected = cold(hybrid, FIRST_TURN).tokens
    assert warm.tokens == healed.tokens == expected
    assert store.verify().is_sound


def test_all_checkpoints_damaged_is_a_warning_each_and_the_right_tokens(
    hybrid: CachedGenerator, store: PrefixStore
) -> None:
    run(hybrid, FIRST_TURN, save=True)
    paths = checkpoint_paths(store)
    for path in paths:
        flip(path)

    with pytest.warns(PromptCacheWarning) as record:
        warm = run(hybrid, FIRST_TURN)

    assert len(record) == len(paths) > 1
    assert warm.last.cached_tokens == 0
    assert warm.tokens == cold(hybrid, FIRST_TURN).tokens


def test_checkpoint_over_the_size_limit_is_one_warning_and_the_right_tokens(
    hybrid_dir: Path, tmp_path: Path
) -> None:
    store = PrefixStore(tmp_path / "small", max_nbytes=200_000)
    generator = CachedGenerator.load(hybrid_dir, store=store)

    with pytest.warns(PromptCacheWarning) as record:
        tokens = run(generator, ids(300), save=True).tokens

    assert "limit" in only_warning(record)
    assert tokens == cold(generator, ids(300)).tokens
    assert store.total_nbytes() <= 200_000
    store.close()


def test_early_close_keeps_what_was_read(hybrid: CachedGenerator) -> None:
    responses = hybrid.stream_generate(PROMPT, MAX_TOKENS, save=True)
    next(responses)

    responses.close()

    warm = run(hybrid, PROMPT)
    assert warm.last.cached_tokens == len(PROMPT) - 1
    assert warm.tokens == cold(hybrid, PROMPT).tokens


def test_interrupted_build_resumes_at_its_last_piece(hybrid: CachedGenerator) -> None:
    def interrupt(done: int, _: int) -> None:
        if done >= 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hybrid.build(PROMPT, prefill_step_size=32, prompt_progress_callback=interrupt)

    built = hybrid.build(PROMPT, prefill_step_size=32)

    assert built.cached_tokens == 64
    warm = run(hybrid, PROMPT, prefill_step_size=32)
    expected = cold(hybrid, PROMPT, prefill_step_size=32)
    assert warm.last.cached_tokens == len(PROMPT) - 1
    assert largest_difference(warm.logprobs, expected.logprobs) == 0.0


def test_match_tells_all_but_the_last_token(hybrid: CachedGenerator) -> None:
    key = hybrid.build(PROMPT).key

    assert hybrid.match(PROMPT).cached_tokens == len(PROMPT) - 1
    assert hybrid.match([*PROMPT, 1]).cached_tokens == len(PROMPT) - 1
    assert hybrid.match([*PROMPT, 1]).key == key
    assert hybrid.match(PROMPT[:99]).cached_tokens == 0


def test_hybrid_logprobs_equal_plain_ones_to_the_bit(hybrid: CachedGenerator) -> None:
    saved = run(hybrid, PROMPT, save=True)
    again = run(hybrid, PROMPT)

    expected = plain(hybrid, PROMPT)
    assert saved.tokens == again.tokens == expected.tokens
    assert largest_difference(again.logprobs, expected.logprobs) == 0.0


def test_hybrid_samples_the_same_warm(hybrid: CachedGenerator) -> None:
    options: dict[str, Any] = {"temp": 1.0, "seed": 7, "repetition_penalty": 1.5}
    first = run(hybrid, PROMPT, save=True, **options)

    again = run(hybrid, PROMPT, **options)

    assert again.last.cached_tokens == len(PROMPT) - 1
    assert again.tokens == first.tokens == cold(hybrid, PROMPT, **options).tokens


@pytest.mark.parametrize("kv", QUANTIZED)
def test_quantized_hybrid_runs_warm(
    hybrid: CachedGenerator, kv: dict[str, Any]
) -> None:
    longer, kv = [*PROMPT, *OTHER], {**kv, "max_tokens": 8}
    run(hybrid, PROMPT, save=True, prefill_step_size=32, **kv)

    again = run(hybrid, PROMPT, prefill_step_size=32, **kv)
    warm = run(hybrid, longer, prefill_step_size=32, **kv)

    assert again.tokens == cold(hybrid, PROMPT, prefill_step_size=32, **kv).tokens
    assert warm.tokens == cold(hybrid, longer, prefill_step_size=32, **kv).tokens
    assert warm.last.cached_tokens >= 96


class UnknownCache(KVCache):
    """A cache class that neither mlx-lm nor the model defines."""


@pytest.fixture
def unsupported(
    model_dir: Path, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> CachedGenerator:
    """A generator whose model makes a cache of an unknown class."""
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    monkeypatch.setattr(
        type(model), "make_cache", lambda model: [KVCache(), UnknownCache()]
    )
    return CachedGenerator(model, tokenizer, store=store)


def test_unsupported_cache_class_is_one_warning_and_a_plain_run(
    unsupported: CachedGenerator, store: PrefixStore
) -> None:
    with pytest.warns(PromptCacheWarning) as record:
        tokens = run(unsupported, PROMPT, save=True).tokens

    assert "UnknownCache" in only_warning(record)
    assert tokens == plain(unsupported, PROMPT).tokens
    assert store.prefixes() == []


def test_unsupported_cache_class_is_refused_before_any_prefill(
    unsupported: CachedGenerator,
) -> None:
    calls: list[object] = []

    with pytest.raises(UnsupportedCacheError, match="UnknownCache"):
        unsupported.build(PROMPT, prompt_progress_callback=lambda *a: calls.append(a))

    assert calls == []


def test_input_embeddings_are_one_warning_and_a_plain_run(
    generator: CachedGenerator,
) -> None:
    embeddings = generator.model.model.embed_tokens(mx.array(OTHER))
    generator.build(PROMPT)

    with pytest.warns(PromptCacheWarning) as record:
        found = run(generator, PROMPT, input_embeddings=embeddings, save=True)

    assert "input_embeddings" in only_warning(record)
    expected = plain(generator, PROMPT, input_embeddings=embeddings)
    assert found.tokens == expected.tokens
    assert found.tokens != plain(generator, PROMPT).tokens


# Arguments


def test_max_tokens_of_zero_is_refused(generator: CachedGenerator) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        generator.stream_generate(PROMPT, 0)


@pytest.mark.parametrize("name", ["max_token", "prompt_cache", "prompt_cach"])
def test_unknown_argument_is_refused_as_python_does(
    generator: CachedGenerator, name: str
) -> None:
    options: dict[str, Any] = {name: 3}

    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        generator.stream_generate(PROMPT, **options)


@pytest.mark.parametrize("prompt", ["", [], [{"content": "no role"}]], ids=str)
def test_prompt_that_is_none_is_refused_at_once(
    generator: CachedGenerator, prompt: Any
) -> None:
    with pytest.raises(UsageError):
        generator.stream_generate(prompt)


# Building


def test_built_prefix_tells_what_was_done(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    first = generator.build(PROMPT[:40])
    second = generator.build(PROMPT, name="whole")
    third = generator.build(PROMPT)

    assert (first.num_tokens, first.cached_tokens, first.name) == (40, 0, None)
    assert (second.num_tokens, second.cached_tokens) == (100, 40)
    assert (third.key, third.cached_tokens, third.name) == (second.key, 100, "whole")
    assert second.pinned
    assert second.seconds > 0
    assert stored_token_ids(store) == [PROMPT[:40], PROMPT]


def test_system_is_built_up_to_the_user(generator: CachedGenerator) -> None:
    built = generator.build(system="You narrate.")

    answered = run(
        generator,
        [
            {"role": "system", "content": "You narrate."},
            {"role": "user", "content": "I open the door"},
        ],
    )
    assert answered.last.cached_tokens == built.num_tokens
    assert answered.last.key == built.key


def test_system_and_messages_are_built_whole(generator: CachedGenerator) -> None:
    question = [{"role": "user", "content": "I open the door"}]

    built = generator.build(question, system="You narrate.")
    from_text = generator.build("I open the door", system="You narrate.")

    messages = [{"role": "system", "content": "You narrate."}, *question]
    assert from_text.key == built.key
    assert run(generator, messages).last.cached_tokens == built.num_tokens - 1


def test_tools_are_part_of_what_is_built(generator: CachedGenerator) -> None:
    tools = [{"type": "function", "function": {"name": "roll"}}]
    built = generator.build(system="You narrate.", tools=tools)
    messages = [
        {"role": "system", "content": "You narrate."},
        {"role": "user", "content": "I open the door"},
    ]

    assert run(generator, messages, tools=tools).last.cached_tokens == built.num_tokens
    assert run(generator, messages).last.cached_tokens == 0


def test_nothing_to_build_is_refused(generator: CachedGenerator) -> None:
    with pytest.raises(UsageError, match="nothing to build"):
        generator.build()


@pytest.mark.parametrize("num_told", [40, 80, 100])
def test_prefix_that_goes_away_while_it_is_built_is_a_store_error_or_stored(
    generator: CachedGenerator, store: PrefixStore, num_told: int
) -> None:
    def remove_all(done: int, _: int) -> None:
        if done == num_told:
            for prefix in store.prefixes():
                store.remove(prefix.key)

    try:
        generator.build(
            PROMPT, prefill_step_size=40, prompt_progress_callback=remove_all
        )
    except StoreError as error:
        assert "meanwhile" in str(error)
    else:
        assert stored_token_ids(store) == [PROMPT]
    assert store.verify().is_sound


def test_match_tells_what_a_generation_reuses(generator: CachedGenerator) -> None:
    key = generator.build(PROMPT).key

    assert generator.match(PROMPT).cached_tokens == 99
    assert generator.match([*PROMPT, 1]).cached_tokens == 100
    assert generator.match([*PROMPT, 1]).key == key
    assert generator.match(OTHER).key is None


# Sharing a store


def test_two_generators_share_one_store(model_dir: Path, store: PrefixStore) -> None:
    with CachedGenerator.load(model_dir, store=store) as first:
        first.build(PROMPT)
    second = CachedGenerator.load(model_dir, store=store)

    answered = run(second, PROMPT)

    assert answered.last.cached_tokens == 99
    assert [prefix.hits for prefix in store.prefixes()] == [1]


def test_another_model_finds_nothing(
    generator: CachedGenerator, store: PrefixStore, tmp_path: Path
) -> None:
    generator.build(PROMPT)
    folder = tiny.save_model(tmp_path / "other", tiny.LLAMA, seed=5)
    other = CachedGenerator.load(folder, store=store)

    answered = run(other, PROMPT)

    assert answered.last.cached_tokens == 0
    assert answered.tokens == plain(other, PROMPT).tokens


def test_namespaces_do_not_share(model_dir: Path, store: PrefixStore) -> None:
    left = CachedGenerator.load(model_dir, store=store, namespace="left")
    right = CachedGenerator.load(model_dir, store=store, namespace="right")

    left.build(PROMPT)

    assert run(left, PROMPT).last.cached_tokens == 99
    assert run(right, PROMPT).last.cached_tokens == 0


def test_context_manager_closes_the_store_it_opened(
    model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "own"

    with CachedGenerator.load(model_dir, store=path) as generator:
        generator.build(PROMPT)
        assert (path / "index.db-wal").exists()

    assert not (path / "index.db-wal").exists()
    assert generator.store is None
    generator.close()


def test_context_manager_leaves_a_store_that_was_handed_in_open(
    model_dir: Path, store: PrefixStore
) -> None:
    with CachedGenerator.load(model_dir, store=store) as generator:
        generator.build(PROMPT)

    assert len(store.prefixes()) == 1
