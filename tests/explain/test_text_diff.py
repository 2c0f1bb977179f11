"""What two prompts part by, and how it is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptcache.explain.text_diff import Difference, compare
from promptcache.explain.volatile_text import KINDS

FORMS = ["whitespace", "line endings"]
BEFORE = "You are a careful assistant. "
AFTER = " Answer in short sentences and never guess."


def parting(one: str, other: str) -> int:
    """Return where two texts part."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def difference(one: str, other: str) -> Difference:
    """Compare two texts in the middle of a prompt."""
    expected, found = BEFORE + one + AFTER, BEFORE + other + AFTER
    return compare(expected, found, parting(expected, found))


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("date", "2026-11-21", "2026-11-22"),
        ("date", "Sunday, November 22", "Monday, November 23"),
        ("date", "30 Nov 2026", "1 Dec 2026"),
        ("time", "9:59 PM", "10:00 PM"),
        ("time", "2026-11-21 10:15:00", "2026-11-21 10:15:01"),
        (
            "UUID",
            "123e4567-e89b-12d3-a456-426614174000",
            "123e4567-e89b-12d3-a456-426614174999",
        ),
        ("random id", "4d2a233ef5bce2c0", "ca6ae662894a8a77"),
        ("hostname", "mac.local", "nas.local"),
        ("working directory", "/home/ann", "/home/bob"),
        ("counter", "turn: 9", "turn: 10"),
        ("counter", "turn: 1", "turn: 12"),
    ],
)
def test_volatile_change_is_told_with_both_values(
    kind: str, one: str, other: str
) -> None:
    changed = difference(f"It is {one}.", f"It is {other}.")

    assert changed == (kind, f"the {kind} changed from {one!r} to {other!r}")


def test_volatile_change_is_named_after_what_is_found_now() -> None:
    changed = difference("2026-11-21", "2026-11-22 10:15")

    assert changed.kind == "time"
    assert difference("2026-11-22 10:15", "2026-11-21").kind == "date"


@pytest.mark.parametrize(
    ("one", "other", "clause"),
    [
        ("Bob", "2026-11-22 Bob", "a date appears: '2026-11-22'"),
        ("2026-11-22 Bob", "Bob", "a date is gone: '2026-11-22'"),
    ],
)
def test_volatile_text_on_one_side_is_told(one: str, other: str, clause: str) -> None:
    assert difference(one, other) == ("date", clause)


def test_names_of_the_machine_are_known() -> None:
    expected, found = "On box7, in /srv/a", "On tau, in /srv/b"

    changed = compare(expected, found, 3, hostnames=["box7", "tau"])
    moved = compare("in /srv/a", "in /srv/b", 8, directories=["/srv"])

    assert changed == ("hostname", "the hostname changed from 'box7' to 'tau'")
    assert moved.kind == "working directory"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("on 2026-11-22, sir", "on 2026-11-22; boy"),
        ("on 2026-11-22 I go", "on 2026-11-22 we stay"),
        ("I open the door", "I light my lamp"),
    ],
)
def test_text_beside_the_same_date_is_text(one: str, other: str) -> None:
    assert difference(one, other).kind == "text"


@pytest.mark.parametrize(
    ("kind", "one", "other"),
    [
        ("line endings", "a\r\nb", "a\nb"),
        ("line endings", "a\nb", "a\r\nb"),
        ("line endings", "a\rb", "a\nb"),
        ("line endings", "a\r\nb", "a\rb"),
        ("whitespace", "a\tb", "a    b"),
        ("whitespace", "a \nb", "a\nb"),
        ("whitespace", "a b", "a\u00a0b"),
        ("whitespace", "\ufeffHello", "Hello"),
        ("whitespace", "at 2026-11-22", "at  2026-11-22"),
        ("whitespace", "at  2026-11-22", "at 2026-11-22"),
    ],
)
def test_change_of_form_is_told(kind: str, one: str, other: str) -> None:
    assert difference(one, other).kind == kind


def test_change_of_form_quotes_both() -> None:
    changed = difference("a\r\nb", "a\nb")

    assert changed.clause == (
        "the line endings changed: 'a\\r\\nb Answer in short sentences' "
        "became 'a\\nb Answer in short sentences'"
    )


@pytest.mark.parametrize(("one", "other"), [("x\n", "x"), ("x", "x \n"), ("", " ")])
def test_whitespace_at_the_end_is_told(one: str, other: str) -> None:
    assert compare(one, other, len(one)).kind == "whitespace"


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        ("I see.\n", "I see. We go"),
        ("A dog", "a cat"),
        ("I  see and so on", "I see and we go"),
        ("\nThat is enough", "\r\nThat is e"),
    ],
)
def test_too_little_that_agrees_is_text(expected: str, found: str) -> None:
    assert compare(expected, found, parting(expected, found)).kind == "text"


@pytest.mark.parametrize("opened", ["\n<|assistant|>\n", ""])
@pytest.mark.parametrize(
    "thinking",
    [
        "<think>Hm</think>",
        "\n\n<think>\nHm\n</think>\n\n",
        "<thinking>Hm</thinking>",
        "<thought>Hm</thought>",
        "<seed:think>Hm</seed:think>",
        "<reasoning>Hm</reasoning>",
        "[THINK]Hm[/THINK]",
        "<|channel|>analysis<|message|>Hm<|end|>",
        "<|channel>thought\nHm<channel|>",
        "<|START_THINKING|>Hm<|END_THINKING|>",
        "<|begin_of_thought|>Hm<|end_of_thought|>",
    ],
)
def test_thinking_is_told(thinking: str, opened: str) -> None:
    plain, thought = f"{opened}Yes, I do.", f"{opened}{thinking}Yes, I do."

    dropped, added = difference(thought, plain), difference(plain, thought)

    assert dropped == ("thinking", "thinking was dropped from an earlier answer")
    assert added == ("thinking", "thinking appears in an earlier answer")


@pytest.mark.parametrize(
    ("full", "empty"),
    [
        ("<think>Hm</think>", "<think></think>"),
        ("<think>\nHm\n</think>", "<think>\n\n</think>"),
        ("<think>Hm</think>", "<tool_call>Hm</tool_call>"),
        (
            "<|channel|>analysis<|message|>Hm<|end|>",
            "<|channel|>analysis<|message|><|end|>",
        ),
        ("<|channel|>analysis<|message|>Hm", "<|channel|>final<|message|>Hm"),
        ("<|channel>thought\nHm<channel|>", "<|channel>thought\n<channel|>"),
    ],
)
def test_what_replaces_thinking_is_no_thinking(full: str, empty: str) -> None:
    assert difference(full, empty).kind == "thinking"


def test_change_within_thinking_is_text() -> None:
    changed = difference("<think>Well, yes", "<think>Hm, no")

    assert changed.kind == "text"


def test_thinking_far_away_is_not_the_reason() -> None:
    assert difference("Well. <think>Hm</think>", "I go. So there").kind == "text"


def test_text_is_quoted_from_the_word_that_differs() -> None:
    changed = difference("I open the door", "I light my lamp")

    assert changed.clause == (
        "'open the door Answer in short' became 'light my lamp Answer in short'"
    )
    clause = difference("so flowers\nbloom", "so flowery\nwords").clause
    assert clause.startswith("'flowers\\nbloom")


@pytest.mark.parametrize(
    ("expected", "found", "clause"),
    [
        ("Hello", "Hello you", "the cached prompt ends here"),
        ("Hello you", "Hello", "the prompt ends here"),
        ("Hello", "Hello", "both prompts end here"),
        ("", "", "both prompts end here"),
    ],
)
def test_end_is_told(expected: str, found: str, clause: str) -> None:
    assert compare(expected, found, 5) == ("text", clause)


@pytest.mark.parametrize("late", [0, 3, 8])
def test_position_may_be_late(late: int) -> None:
    changed = compare("It is 2026-11-21 now", "It is 2026-11-22 now", 15 + late)

    assert changed.clause == "the date changed from '2026-11-21' to '2026-11-22'"


def test_position_may_be_early() -> None:
    assert compare("a" * 900 + " b", "a" * 900 + " c", 0).clause == "'b' became 'c'"


def test_long_values_are_quoted_where_they_differ() -> None:
    path = "/home/ann/" + "x" * 60

    changed = compare(f"{path}/a", f"{path}/b", 71)

    assert changed.clause == (
        "the working directory changed from 'xxxxxxxxxxxxxxxxxxx/a' "
        "to 'xxxxxxxxxxxxxxxxxxx/b'"
    )


PIECES = st.sampled_from(
    [
        *["2026-11-22", "10:15", "turn: 3", "/home/ann", "<think>", "</think>", "Hi"],
        *[" ", "\n", "\r\n", "\t", "e\u0301", "\u00e9", "\u2028", "\U000e0001" * 40],
        *["x" * 300, "4d2a233ef5bce2c0", "it's", "\\"],
    ]
)
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=8).map("".join)


@settings(deadline=None)
@given(TEXTS, TEXTS, TEXTS, st.integers(-10, 500))
def test_any_two_texts_have_a_difference(
    start: str, one: str, other: str, position: int
) -> None:
    kind, clause = compare(start + one, start + other, position)

    assert kind in {*KINDS, *FORMS, "thinking", "text"}
    assert 0 < len(clause) < 200
    assert len(clause.splitlines()) == 1
    assert not clause.endswith(".")
