"""`promptcache explain`, and what `generate` tells of a miss."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.prompts.parts import PromptParts
from tests.helpers import segments, tiny
from tests.helpers.adventures import LOOK, ROLL, TEMPLATE, WALK, conversation, read_only
from tests.helpers.commands import assert_fails, invoke, ok, tree_hash

FIELDS = {
    "prompt_tokens": int,
    "cached_tokens": int,
    "key": (str, type(None)),
    "divergence": (dict, type(None)),
    "is_miss": bool,
    "declined": (dict, type(None)),
    "verdict": str,
}
DIVERGENCE_FIELDS = {
    "position": int,
    "expected": str,
    "found": str,
    "kind": str,
    "culprit": str,
}
MONDAY = "You narrate. Today is 2026-11-23. Be brief."
TUESDAY = "You narrate. Today is 2026-11-24. Be brief."
USAGE = re.compile(
    r"\d+ prompt tokens, \d+ cached, \d+ prefilled, \d+ generated, "
    r"\d+\.\d{3} s to the first token(; missed from token (\d+) on: (.+))?\n"
)


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose template takes an argument."""
    folder = tiny.save_model(tmp_path / "narrator", tiny.LLAMA)
    tiny.save_tokenizer(folder, TEMPLATE)
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(folder))
    return folder


def rendered(**parts: Any) -> list[int]:
    """Return the ids of a prompt that is given in parts."""
    with CachedGenerator.load() as generator:
        return generator.render_parts(PromptParts(**parts)).token_ids


def explained(*args: str | Path) -> dict[str, Any]:
    """Return what `explain --json` says."""
    value = json.loads(ok("explain", *args, "--json").stdout)
    assert list(value) == list(FIELDS)
    for name, kind in FIELDS.items():
        assert isinstance(value[name], kind), name
    if divergence := value["divergence"]:
        assert list(divergence) == list(DIVERGENCE_FIELDS)
        for name, kind in DIVERGENCE_FIELDS.items():
            assert type(divergence[name]) is kind, name
    return dict(value)


def generate(*args: str | Path) -> str:
    """Return what `generate` says on stderr."""
    return str(ok("generate", "--max-tokens", "1", *args).stderr)


def save(*args: str | Path) -> None:
    assert generate(*args, "--save") == ""


# explain


def test_json_has_its_fields_on_a_miss() -> None:
    save("-s", MONDAY, "Hello")

    value = explained("-s", TUESDAY, "Hello")

    stored = rendered(system=MONDAY, prompt="Hello")
    asked = rendered(system=TUESDAY, prompt="Hello")
    position = segments.shared_length(asked, stored)
    assert value["prompt_tokens"] == len(asked)
    assert value["cached_tokens"] == value["divergence"]["position"] == position
    assert re.fullmatch("[0-9a-f]{32}", value["key"])
    assert value["divergence"]["kind"] == "date"
    assert value["divergence"]["expected"].startswith("3. Be brief.")
    assert value["divergence"]["found"].startswith("4. Be brief.")
    assert "'2026-11-23' to '2026-11-24'" in value["divergence"]["culprit"]
    assert value["is_miss"]


def test_people_read_the_same_as_machines() -> None:
    save("-s", MONDAY, "Hello")

    value = explained("-s", TUESDAY, "Hello")
    result = ok("explain", "-s", TUESDAY, "Hello")

    assert result.stderr == ""
    assert result.stdout.splitlines() == [
        value["verdict"],
        f"key       {value['key']}",
        f"position  {value['divergence']['position']}",
        f"expected  {value['divergence']['expected']!r}",
        f"found     {value['divergence']['found']!r}",
    ]


def test_full_hit_has_no_divergence() -> None:
    save("-s", MONDAY, "Hello")

    value = explained("-s", MONDAY, "Hello")
    result = ok("explain", "-s", MONDAY, "Hello")

    assert value["divergence"] is None
    assert not value["is_miss"]
    assert value["cached_tokens"] == value["prompt_tokens"] - 1
    verdict, key = result.stdout.splitlines()
    assert verdict.startswith("a full hit: ")
    assert key == f"key       {value['key']}"


def test_empty_store_has_no_key(store: PrefixStore) -> None:
    value = explained("Hello")
    result = ok("explain", "Hello")

    assert (value["cached_tokens"], value["key"]) == (0, None)
    assert value["divergence"]["kind"] == "nothing cached"
    assert "key" not in result.stdout
    assert result.stdout.startswith("a miss: 0 of ")


@pytest.mark.parametrize(
    "name", ["system", "files", "messages", "tools", "raw", "config", "kv-bits"]
)
def test_explain_takes_the_prompt_as_generate_does(
    name: str, tmp_path: Path, store: PrefixStore
) -> None:
    files = {
        "a.txt": "Press the button. " * 9,
        "b.txt": "Pull the lever. " * 9,
        "messages.json": json.dumps(conversation()),
        "tools.json": json.dumps([ROLL, LOOK, WALK]),
    }
    paths = {file: tmp_path / file for file in files}
    for file, content in files.items():
        paths[file].write_text(content)
    options: dict[str, list[str | Path]] = {
        "system": ["-s", MONDAY, "Hello"],
        "files": ["-f", paths["a.txt"], "-f", paths["b.txt"], "How?"],
        "messages": ["--messages", paths["messages.json"]],
        "tools": ["--tools", paths["tools.json"], "Hello"],
        "raw": ["--raw", "Once upon a time"],
        "config": ["--chat-template-config", '{"effort": "high"}', "Hello"],
        "kv-bits": ["--kv-bits", "8", "-s", MONDAY, "Hello"],
    }
    args = options[name]

    assert explained(*args)["divergence"]["kind"] == "nothing cached"
    save(*args)

    assert explained(*args)["verdict"].startswith("a full hit")
    usage = json.loads(ok("generate", *args, "--max-tokens", "1", "--json").stdout)
    assert usage["cached_tokens"] == explained(*args)["cached_tokens"]
    for other in options.values():
        is_full = explained(*other)["verdict"].startswith("a full hit")
        assert is_full == (other is args)


def test_kv_bits_are_told() -> None:
    save("-s", MONDAY, "Hello")

    value = explained("-s", MONDAY, "Hello", "--kv-bits", "8")

    assert value["cached_tokens"] == 0
    assert value["divergence"]["culprit"] == "other KV bits: none became 8"


def test_explain_changes_nothing(tmp_path: Path) -> None:
    save("-s", MONDAY, "Hello")
    before = tree_hash(tmp_path / "store" / "blobs"), ok("ls", "--json").stdout

    for system in (MONDAY, TUESDAY):
        explained("-s", system, "Hello")

    after = tree_hash(tmp_path / "store" / "blobs"), ok("ls", "--json").stdout
    assert after == before
    assert json.loads(ok("stats", "--json").stdout)["misses"] == 1


def test_explain_reads_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    save("-s", MONDAY, "Hello")

    with read_only(tmp_path / "store") as path:
        value = explained("-s", TUESDAY, "Hello", "--store", path)

    assert value["divergence"]["kind"] == "date"


@pytest.mark.parametrize("args", [[], ["-s", MONDAY], ["--raw", "-s", "x", "y"]])
def test_explain_of_no_prompt_is_wrong_usage(args: list[str]) -> None:
    assert_fails(invoke("explain", *args), 2)


# generate


def test_usage_names_the_cause_of_a_miss_in_one_clause() -> None:
    save("-s", MONDAY, "Hello")

    line = generate("-u", "-s", TUESDAY, "Hello")

    found = USAGE.fullmatch(line)
    assert found
    value = explained("-s", TUESDAY, "Hello")
    assert found[2] == str(value["divergence"]["position"])
    assert found[3] == value["divergence"]["culprit"]
    assert "the date changed" in found[3]


def test_usage_names_an_empty_store() -> None:
    found = USAGE.fullmatch(generate("-u", "Hello"))

    assert found
    assert found[3] == "nothing cached for narrator yet"


def test_usage_says_nothing_more_on_a_hit() -> None:
    save("-s", MONDAY, "Hello")

    for question in ("Hello", "What now?"):
        found = USAGE.fullmatch(generate("-u", "-s", MONDAY, question))
        assert found
        assert found[1] is None


def test_without_usage_a_miss_is_silent() -> None:
    save("-s", MONDAY, "Hello")

    assert generate("-s", TUESDAY, "Hello") == ""


# Template arguments


def test_other_template_argument_than_built_with_is_named() -> None:
    ok("build", "-s", "You narrate.", "--chat-template-config", '{"effort": "high"}')
    asked = ("-s", "You narrate.", "--chat-template-config", '{"effort": "low"}')

    culprit = explained(*asked, "Hello")["divergence"]["culprit"]

    assert "effort was 'high' and is 'low'" in culprit
    assert culprit in generate("-u", *asked, "Hello")


def test_forgotten_template_argument_is_named() -> None:
    ok("build", "-s", "You narrate.", "--chat-template-config", '{"effort": "high"}')

    culprit = explained("-s", "You narrate.", "Hello")["divergence"]["culprit"]

    assert "effort was 'high' and is not given" in culprit
    assert culprit in generate("-u", "-s", "You narrate.", "Hello")


@pytest.mark.parametrize(
    ("built", "asked"),
    [
        ({"effort": "high"}, {"effort": "high"}),
        ({"effort": "high"}, {"effort": "high", "budget": 9}),
        ({}, {"budget": 9}),
        ({}, {"unknown": True}),
    ],
)
def test_argument_that_does_not_change_the_system_prompt_is_silent(
    built: dict[str, Any], asked: dict[str, Any]
) -> None:
    config = "--chat-template-config"
    ok("build", "-s", "You narrate.", config, json.dumps(built))

    assert generate("-s", "You narrate.", config, json.dumps(asked), "Hello") == ""


def test_other_template_argument_of_files_is_told(tmp_path: Path) -> None:
    path = tmp_path / "manual.txt"
    path.write_text("Press the button. " * 9)
    ok("build", "-f", path, "--chat-template-config", '{"effort": "high"}')

    assert "effort" in explained("-f", path, "Why?")["divergence"]["culprit"]


def test_another_system_prompt_needs_no_warning() -> None:
    ok("build", "-s", "You narrate.", "--chat-template-config", '{"effort": "high"}')

    assert generate("-s", "You sing.", "Hello") == ""


# Files


def test_files_in_one_order_are_one_prefix(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("Press the button. " * 9)
    two.write_text("Pull the lever.\n" * 9)
    texts = [one.read_text(), two.read_text()]
    built = json.loads(ok("build", "-f", one, "-f", two, "--json").stdout)
    asked = rendered(files=texts, prompt="Why?")

    value = explained("-f", one, "-f", two, "Why?")
    swapped = explained("-f", two, "-f", one, "Why?")

    begin = segments.shared_length(asked, rendered(files=texts, prompt="How?"))
    assert value["cached_tokens"] == built["num_tokens"] == begin
    assert value["divergence"] is None
    other = rendered(files=texts[::-1], prompt="Why?")
    assert swapped["cached_tokens"] == segments.shared_length(asked, other)
    assert swapped["cached_tokens"] < 20


def test_second_question_reuses_both_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("Press the button. " * 9)
    two.write_text("Pull the lever.\n" * 9)
    texts = [one.read_text(), two.read_text()]
    save("-f", one, "-f", two, "How?")
    files = ["-f", one, "-f", two]

    answer = json.loads(ok("generate", *files, "Why?", "--json").stdout)

    first = rendered(files=texts, prompt="How?")
    second = rendered(files=texts, prompt="Why?")
    assert answer["cached_tokens"] == segments.shared_length(first, second)
