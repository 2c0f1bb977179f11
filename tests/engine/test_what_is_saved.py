"""A generation saves its prompt, also where it ends early."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.tiers.prompt_read import AUTO_SAVE_TOKENS
from tests.helpers.runs import (
    MAX_TOKENS,
    OTHER,
    PROMPT,
    ids,
    plain,
    run,
    stored_token_ids,
)


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
