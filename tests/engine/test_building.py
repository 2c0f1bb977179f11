"""`build` stores a prefix, and what is built is what a generation reuses."""

import pytest

from promptcache import CachedGenerator, PrefixStore, StoreError, UsageError
from tests.helpers.runs import OTHER, PROMPT, run, stored_token_ids


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
