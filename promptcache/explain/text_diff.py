"""Describe what changed where two prompts part."""

import re
from collections.abc import Callable, Collection
from typing import NamedTuple

from promptcache.explain.volatile_text import Volatile, find_volatile


class Difference(NamedTuple):
    """What kind of change makes two texts part, and a clause that describes it.

    The kind is one of `volatile_text.KINDS` or "line endings", "whitespace",
    "thinking", "text". The clause is one line without a full
    stop, for example "the date changed from '2026-11-21' to '2026-11-22'".
    """

    kind: str
    clause: str


# How far a position that comes from tokens may lie behind the first difference.
MAX_LATE = 8
# How far to look for what changed, on both sides.
WINDOW = 200
# Characters that have to agree to call a change one of form only.
MIN_EQUAL = 16
MAX_QUOTED = 40
MAX_WORDS = 30
# How long the beginning of a word may be to be quoted with it.
MAX_OF_WORD = 15
# How far before the difference a thinking block may begin.
MAX_THOUGHT = 40
# A byte order mark and what joins or parts words unseen count, too.
_BLANKS = re.compile(r"[\s\ufeff\u200b\u2060]+")
# Of DeepSeek and Qwen, Anthropic, Seed-OSS, Magistral, gpt-oss, Command, Gemma and
# others. An empty block holds no thinking: templates put one where they drop it.
_THINKING = re.compile(
    r"(?:<(?:think|thinking|thought|seed:think|reasoning)>|\[THINK\]"
    r"|<\|channel\|>analysis(?:<\|message\|>)?+|<\|channel>thought"
    r"|<\|START_THINKING\|>|<\|begin_of_thought\|>)"
    r"(?!\s*(?:</|\[/THINK\]|<\|end|<\|END|<channel\|>))"
)


def compare(
    expected: str,
    found: str,
    position: int,
    *,
    hostnames: Collection[str] = (),
    directories: Collection[str] = (),
) -> Difference:
    """Name the likeliest reason why two texts part at a position.

    Args:
        expected: The whole text that is cached.
        found: The whole text of the new prompt.
        position: Where they part, or up to `MAX_LATE` characters later.
        hostnames: As in `find_volatile`.
        directories: As in `find_volatile`.
    """
    at = _first_difference(expected, found, max(position - MAX_LATE, 0))
    expected, here = _window(expected, at)
    found, here = _window(found, at)
    names = {"hostnames": hostnames, "directories": directories}
    return (
        _volatile_change(
            find_volatile(expected, **names), find_volatile(found, **names), here
        )
        or _change_of_form(expected, found, here)
        or _change_of_thinking(expected, found, here)
        or _change_of_text(expected, found, here)
    )


def _first_difference(expected: str, found: str, start: int) -> int:
    end = min(len(expected), len(found))
    start = min(start, end)
    pairs = zip(expected[start:end], found[start:end], strict=True)
    return next((start + i for i, (a, b) in enumerate(pairs) if a != b), end)


def _window(text: str, at: int) -> tuple[str, int]:
    """Return the window around a position, and the position in it."""
    start = max(at - WINDOW, 0)
    return text[start : at + WINDOW], at - start


def _volatile_change(
    expected: list[Volatile], found: list[Volatile], at: int
) -> Difference | None:
    before, after = _touching(expected, at), _touching(found, at)
    old, new = (v and _quote(v.text, at - v.start) for v in (before, after))
    if before and after and before.text != after.text:
        return Difference(after.kind, f"the {after.kind} changed from {old} to {new}")
    if after and _is_new(after, expected, at):
        return Difference(after.kind, f"a {after.kind} appears: {new}")
    if before and _is_new(before, found, at):
        return Difference(before.kind, f"a {before.kind} is gone: {old}")
    return None


def _touching(volatiles: list[Volatile], at: int) -> Volatile | None:
    """Return the last one that touches a position: it covers it rather than ends."""
    touching = [v for v in volatiles if v.start <= at <= v.end]
    return touching[-1] if touching else None


def _is_new(volatile: Volatile, others: list[Volatile], at: int) -> bool:
    """Return whether it covers the position and has not only moved there."""
    moved = any(other.text == volatile.text for other in others if other.end > at)
    return volatile.end > at and not moved


def _quote(text: str, at: int) -> str:
    """Return what fits of a text, around a position where it is long."""
    start = max(at - MAX_QUOTED // 2, 0) if len(text) > MAX_QUOTED else 0
    shown = text[start : start + MAX_QUOTED]
    while len(repr(shown)) > MAX_QUOTED + len("''"):
        shown = shown[:-1]
    return repr(shown)


def _one_newline(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _no_blanks(text: str) -> str:
    return _BLANKS.sub("", text)


_FORMS: tuple[tuple[str, Callable[[str], str], str], ...] = (
    ("line endings", _one_newline, "the line endings changed"),
    ("whitespace", _no_blanks, "only whitespace changed"),
)


def _change_of_form(expected: str, found: str, at: int) -> Difference | None:
    """Return the first kind of difference that a normal form makes disappear."""
    if expected == found:
        return None
    for kind, normal, clause in _FORMS:
        if _agree(normal, expected, found, at):
            return Difference(kind, f"{clause}: {_both(expected, found, at)}")
    return None


def _agree(normal: Callable[[str], str], expected: str, found: str, at: int) -> bool:
    """Return whether texts agree from a position on, long enough or to their ends."""
    # One character earlier there may be the "\r" of a "\r\n".
    start = max(at - 1, 0)
    one, other = normal(expected[start:]), normal(found[start:])
    num_equal = _first_difference(one, other, 0)
    return num_equal > MIN_EQUAL or one == other


def _change_of_thinking(expected: str, found: str, at: int) -> Difference | None:
    before, after = _thinks(expected, at), _thinks(found, at)
    if before == after:
        return None
    verb = "was dropped from" if before else "appears in"
    return Difference("thinking", f"thinking {verb} an earlier answer")


def _thinks(text: str, at: int) -> bool:
    """Return whether a thinking block begins at a position or shortly before it."""
    last = len(text) - len(text[at:].lstrip())
    starts = (m.start() for m in _THINKING.finditer(text, max(at - MAX_THOUGHT, 0)))
    return any(start <= last for start in starts)


def _change_of_text(expected: str, found: str, at: int) -> Difference:
    if expected == found:
        return Difference("text", "both prompts end here")
    if at == len(expected):
        return Difference("text", "the cached prompt ends here")
    if at == len(found):
        return Difference("text", "the prompt ends here")
    return Difference("text", _both(expected, found, at))


def _both(expected: str, found: str, at: int) -> str:
    """Return a clause that quotes both texts from the word that differs."""
    word = re.search(rf"\S{{0,{MAX_OF_WORD}}}\Z", expected[:at])
    assert word is not None
    start = word.start()
    least = at - start + 1
    before, after = _words(expected[start:], least), _words(found[start:], least)
    return f"{_quote(before, at - start)} became {_quote(after, at - start)}"


def _words(text: str, least: int) -> str:
    """Return the whole words that fit, with at least some characters."""
    pattern = rf"(?s:.{{{least},{MAX_WORDS}}}(?!\S)|.{{0,{MAX_WORDS}}})"
    words = re.match(pattern, text)
    assert words is not None
    return words[0]
