"""`build` warns of text in the system prompt, the tools and templates that changes."""

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from promptcache import CachedGenerator, PrefixStore
from promptcache.explain.lint import VolatileText
from promptcache.prompts.parts import PromptParts
from tests.helpers import tiny
from tests.helpers.commands import invoke, ok

STRFTIME = '<|day|>{{ strftime_now("%Y-%m-%d") }}<|end|>' + tiny.CHAT_TEMPLATE
# As in Llama 3's template.
DATE_STRING = (
    "{% if not date_string is defined %}"
    '{% set date_string = strftime_now("%d %b %Y") %}{% endif %}'
    "Today Date: {{ date_string }}\n" + tiny.CHAT_TEMPLATE
)
# What is planted, by the kind to be named.
PLANTED = {
    "date": "2026-11-23",
    "time": "14:05:10",
    "UUID": "123e4567-e89b-12d3-a456-426614174000",
    "random id": "4d2a233ef5bce2c0",
    "hostname": "alpha.local",
    "working directory": "/home/ada/game",
    "counter": "Session: 41",
}
MESSAGE = re.compile(
    r"promptcache: warning: (?P<kind>.+) (?P<text>'.+') at token (?P<position>\d+) of "
    r"(?P<total>\d+) \((?P<place>.+)\): when it changes, all tokens from there on are "
    r"read again; (?P<advice>.+)"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tiny.save_model(tmp_path / "narrator", tiny.LLAMA)
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(folder))
    return folder


@pytest.fixture
def lint(folder: Path) -> Callable[..., list[VolatileText]]:
    """Return a function that lints what `build` would build."""

    def lint(**parts: Any) -> list[VolatileText]:
        with CachedGenerator.load(folder) as generator:
            return generator.lint(generator.render_prefix(PromptParts(**parts)))

    return lint


def warned(result: Result) -> list[dict[str, str]]:
    """Return the parts of each warning; what else is said is no warning."""
    lines = [x for x in result.stderr.splitlines() if x.startswith("promptcache: ")]
    found = [MESSAGE.fullmatch(line) for line in lines]
    return [match.groupdict() if match else {"more": "yes"} for match in found]


def expected_position(text: str, *, nth: int = 0, **parts: Any) -> int:
    """Return by brute force in which token of a prefix a text begins."""
    with CachedGenerator.load() as generator:
        token_ids = generator.render_prefix(PromptParts(**parts)).token_ids
        decode = generator.tokenizer.decode
        place = -1
        for _ in range(nth + 1):
            place = decode(token_ids).index(text, place + 1)
        ends = (len(decode(token_ids[: i + 1])) for i in range(len(token_ids)))
        return next(i for i, end in enumerate(ends) if end > place)


def write_tools(path: Path, description: str) -> list[dict[str, Any]]:
    function = {"name": "look", "description": description, "parameters": {}}
    tools = [{"type": "function", "function": function}]
    path.write_text(json.dumps(tools))
    return tools


# Where it stands


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("kind", PLANTED)
def test_text_in_the_system_prompt_is_told_with_its_place(kind: str) -> None:
    text = PLANTED[kind]
    system = f"You narrate.\nBe kind and brief.\nIt is – {text}\nNever break character."

    result = ok("build", "-s", system)

    (warning,) = warned(result)
    assert warning["kind"] == kind
    assert warning["text"] == repr(text)
    assert int(warning["position"]) == expected_position(text, system=system)
    assert warning["place"] == "line 3 of the system prompt"
    assert warning["advice"] == "move it to the user's message"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("kind", PLANTED)
def test_text_in_the_tools_is_told_with_its_place(kind: str, tmp_path: Path) -> None:
    text = PLANTED[kind]
    path = tmp_path / "tools.json"
    tools = write_tools(path, f"Look around, {text}")

    result = ok("build", "-s", "You narrate.", "--tools", path)

    (warning,) = warned(result)
    position = expected_position(text, system="You narrate.", tools=tools)
    assert warning["kind"] == kind
    assert int(warning["position"]) == position
    assert warning["place"] == "in the tools"
    assert "out of the tools" in warning["advice"]


def test_date_that_a_template_inserts_is_told(
    folder: Path, lint: Callable[..., list[VolatileText]]
) -> None:
    tiny.save_tokenizer(folder, STRFTIME)

    (warning,) = warned(ok("build", "-s", "You narrate."))

    (found,) = lint(system="You narrate.")
    assert warning["kind"] == "date"
    assert re.fullmatch(r"'\d{4}-\d\d-\d\d'", warning["text"])
    position = expected_position(found.text, system="You narrate.")
    assert int(warning["position"]) == found.position == position
    assert warning["place"] == "inserted by the chat template"
    assert warning["advice"] == "use a template that leaves it out"


def test_argument_that_fixes_a_template_is_told(folder: Path) -> None:
    tiny.save_tokenizer(folder, DATE_STRING)

    (warning,) = warned(ok("build", "-s", "You narrate."))

    assert warning["kind"] == "date"
    assert warning["place"] == "inserted by the chat template"
    assert '--chat-template-config \'{"date_string": "…"}\'' in warning["advice"]


@pytest.mark.usefixtures("folder")
def test_name_of_this_machine_is_told() -> None:
    (warning,) = warned(ok("build", "-s", f"You run on {socket.gethostname()} today"))

    assert warning["kind"] == "hostname"
    assert warning["text"] == repr(socket.gethostname())


@pytest.mark.usefixtures("folder")
def test_working_directory_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    (warning,) = warned(ok("build", "-s", f"Files are in {tmp_path}/saves"))

    assert warning["kind"] == "working directory"
    assert warning["text"] == repr(f"{tmp_path}/saves"[:60])


def test_position_is_exact_after_characters_of_many_bytes(
    lint: Callable[..., list[VolatileText]],
) -> None:
    system = "Erzähle 🎲🎲 and the dragon. 龍。 2026-11-23, then 2026-12-24"

    found = lint(system=system)

    assert [each.text for each in found] == ["2026-11-23", "2026-12-24"]
    for each in found:
        assert each.position == expected_position(each.text, system=system)


def test_all_is_in_the_order_of_the_prompt(
    lint: Callable[..., list[VolatileText]], tmp_path: Path
) -> None:
    tools = write_tools(tmp_path / "tools.json", "Session: 41")

    found = lint(system="On 2026-11-23\nat 14:05:10", tools=tools)

    assert [each.kind for each in found] == ["counter", "date", "time"]
    places = [each.place for each in found]
    assert places == [
        "in the tools",
        *(f"line {n} of the system prompt" for n in (1, 2)),
    ]
    assert [each.position for each in found] == sorted(e.position for e in found)


def test_text_without_a_chat_template_is_looked_at(
    lint: Callable[..., list[VolatileText]],
) -> None:
    (found,) = lint(prompt="Written on 2026-11-23, long ago", raw=True)

    assert (found.kind, found.place) == ("date", "in the text")
    assert found.position == len("Written on ")
    assert found.advice == "move it to the end of the prompt"


# Known defects


def test_text_that_stands_twice_is_told_with_both_lines(
    lint: Callable[..., list[VolatileText]],
) -> None:
    found = lint(system="On 2026-11-23\nor not\non 2026-11-23")

    assert [each.place for each in found] == [
        "line 1 of the system prompt",
        "line 3 of the system prompt",
    ]


def test_advice_that_was_followed_ends_the_warning(
    folder: Path, lint: Callable[..., list[VolatileText]]
) -> None:
    tiny.save_tokenizer(folder, DATE_STRING)
    config = {"date_string": "26 Jul 2024"}

    assert lint(system="You narrate.", chat_template_config=config) == []


def test_advice_names_no_argument_that_a_template_does_not_take(
    folder: Path, lint: Callable[..., list[VolatileText]]
) -> None:
    tiny.save_tokenizer(folder, STRFTIME + "{# updated #}")

    (found,) = lint(system="You narrate.")

    assert found.advice == "use a template that leaves it out"


def test_files_may_hold_dates_without_a_chat_template(
    folder: Path, lint: Callable[..., list[VolatileText]]
) -> None:
    tiny.save_tokenizer(folder, None)

    assert lint(files=["2026-11-23 14:05:10 started"]) == []


# Where it may stand


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "args",
    [
        ["-s", "You narrate. Version 3.2 of 100 rules, since 1984."],
        ["-s", "You narrate.", "Today is 2026-11-23, session 41"],
        ["It is 14:05:10 on alpha.local"],
    ],
)
def test_clean_prompts_and_what_users_say_are_silent(args: list[str]) -> None:
    assert warned(ok("build", *args)) == []


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("system", [[], ["-s", "You narrate."]])
def test_files_may_hold_dates(system: list[str], tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text("2026-11-23 14:05:10 started\n" * 5)

    assert warned(ok("build", *system, "-f", path)) == []
    assert warned(ok("build", *system, "-f", path, "Why on 2026-11-24?")) == []


@pytest.mark.usefixtures("folder")
def test_messages_are_looked_at_up_to_the_first_user(tmp_path: Path) -> None:
    path = tmp_path / "messages.json"
    messages = [
        {"role": "system", "content": "You narrate.\nToday is 2026-11-23."},
        {"role": "user", "content": "It is 14:05:10"},
        {"role": "assistant", "content": "Session: 41"},
        {"role": "user", "content": "Go on"},
    ]
    path.write_text(json.dumps(messages))

    (warning,) = warned(ok("build", "--messages", path))

    assert warning["text"] == "'2026-11-23'"
    assert warning["place"] == "line 2 of the system prompt"


@pytest.mark.usefixtures("folder")
def test_generate_does_not_warn() -> None:
    args = ["--max-tokens", "1", "--save", "Hello"]

    assert ok("generate", "-s", "Today is 2026-11-23.", *args).stderr == ""


# What is printed


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("num_dates", "lines", "more"), [(5, 5, 0), (8, 6, 3)])
def test_at_most_five_are_told(num_dates: int, lines: int, more: int) -> None:
    system = "\n".join(f"Today is 2026-11-{day + 10}." for day in range(num_dates))

    result = ok("build", "-q", "-s", system)

    said = result.stderr.splitlines()
    assert len(said) == lines
    for number, line in enumerate(said[:5], start=1):
        assert f"(line {number} of the system prompt)" in line
    if more:
        assert said[5] == f"promptcache: warning: and {more} more like these"


@pytest.mark.usefixtures("folder")
def test_stdout_stays_clean_and_the_prefix_is_built() -> None:
    result = invoke("build", "-s", "Today is 2026-11-23.", "--name", "today")

    assert result.exit_code == 0
    assert re.fullmatch(r"[0-9a-f]{32}\n", result.stdout)
    assert ok("ls", "-q").stdout == result.stdout
    assert len(warned(result)) == 1


@pytest.mark.usefixtures("folder")
def test_json_lists_all_of_them() -> None:
    days = range(10, 18)
    system = "\n".join(f"Today is 2026-11-{day}." for day in days)

    result = ok("build", "-s", system, "--json")

    volatile = json.loads(result.stdout)["volatile"]
    assert [found["text"] for found in volatile] == [f"2026-11-{day}" for day in days]
    assert all(tuple(found) == VolatileText._fields for found in volatile)
    for found in volatile:
        assert found["position"] == expected_position(found["text"], system=system)
        assert found["prompt_tokens"] == json.loads(result.stdout)["num_tokens"]


@pytest.mark.usefixtures("folder")
def test_json_of_a_clean_prompt_lists_none() -> None:
    result = ok("build", "-s", "You narrate.", "--json")

    assert json.loads(result.stdout)["volatile"] == []


def test_linting_saves_nothing(
    lint: Callable[..., list[VolatileText]], store: PrefixStore
) -> None:
    assert lint(system="Today is 2026-11-23.")

    assert store.prefixes() == []
    assert not [*os.scandir(store.path / "blobs")]
