"""Terminals: what others wrote is shown, and does nothing."""

import ast
import io
import json
import logging
import os
import pty
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import promptcache_cli
from promptcache import PrefixStore, UsageError
from promptcache.errors import PromptCacheWarning, warn
from promptcache.printable import printable, printable_json, printable_text
from promptcache.store.types import RequestUsage
from promptcache_cli import output
from promptcache_cli.main import cli
from tests.helpers import segments
from tests.helpers.commands import invoke, ok

# Sets the title, clears the screen, writes to the clipboard; the same for a terminal
# that takes C1; turns the direction of writing; is not seen; is no text.
HOSTILE = (
    "\x1b]0;title\x07\x1b[2J\x1b]52;c;ZXZpbA==\x07\x9b2J\x7f\r\x08"
    "\u202e\u2066\u200f\u061c\ufeff\u200b\u2060\U000e0041\u2028\u3164\U000e0100"
)
SHOWN = (
    "\\x1b]0;title\\x07\\x1b[2J\\x1b]52;c;ZXZpbA==\\x07\\x9b2J\\x7f\\r\\x08"
    "\\u202e\\u2066\\u200f\\u061c\\ufeff\\u200b\\u2060\\U000e0041\\u2028\\u3164"
    "\\U000e0100"
)


ACTIVE = {c for c in HOSTILE if not (c.isascii() and c.isprintable())}


def assert_harmless(text: str) -> None:
    """Check that nothing in a text does more than to be shown."""
    assert not ACTIVE & set(text)
    text.encode()


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts_in(part)


# The form


def test_what_is_not_shown_is_escaped() -> None:
    assert printable(HOSTILE) == printable_text(HOSTILE) == SHOWN


@pytest.mark.parametrize(
    "text", ["", "Ünïcödé", "日本 語", "a\u3000b\xa0c", "👍🏽", "C:\\x1b", "é", "❤️"]
)
def test_what_is_shown_stays(text: str) -> None:
    assert printable(text) == printable_text(text) == text


def test_a_line_stays_one_and_a_text_keeps_its_lines() -> None:
    text = "one\n\ttwo 👨\u200d👩 می\u200cخواهم"

    assert printable(text) == "one\\n\\ttwo 👨\\u200d👩 می\\u200cخواهم"
    assert printable_text(text) == text


def test_bytes_that_are_no_text_are_escaped() -> None:
    assert printable(b"a\xff".decode("utf-8", "surrogateescape")) == "a\\udcff"


@given(st.text(st.characters()))
def test_any_text_becomes_harmless_and_stays_so(text: str) -> None:
    line, lines = printable(text), printable_text(text)

    assert len(line.splitlines()) <= 1
    for shown in (line, lines):
        shown.encode()
        assert not any(
            ord(c) < 32 or 127 <= ord(c) < 160 for c in shown if c not in "\n\t"
        )
    assert (printable(line), printable_text(lines)) == (line, lines)


@given(st.lists(st.text(st.characters())))
def test_json_means_the_same(value: list[str]) -> None:
    encoded = printable_json(json.dumps(value, indent=2, ensure_ascii=False))

    assert json.loads(encoded) == value
    assert_harmless(encoded)


# Errors, warnings and logs


def test_errors_and_warnings_are_printable_for_all_who_print_them() -> None:
    with pytest.warns(PromptCacheWarning) as warned:
        warn(f"no {HOSTILE}")

    assert str(warned[0].message) == str(UsageError(f"no {HOSTILE}")) == f"no {SHOWN}"


def test_a_log_has_one_line_for_each_message() -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(output.LogFormatter())
    try:
        raise ValueError("\x1b[2J")
    except ValueError:
        details = sys.exc_info()

    for error in (None, details):
        handler.handle(
            logging.LogRecord("", 20, "", 0, "%s\nforged", ("\x1b[2J",), error)
        )

    first, second, *traceback = log.getvalue().splitlines()
    assert first.endswith(" INFO \\x1b[2J\\nforged")
    assert second.endswith(" INFO \\x1b[2J\\nforged")
    assert traceback[-1] == "ValueError: \\x1b[2J"


# Commands


@pytest.fixture
def hostile_store(tmp_path: Path) -> Path:
    """A store in which a name, a model and files are called as no command does."""
    path = tmp_path / "store"
    with PrefixStore(path) as store:
        key = segments.save(store, segments.tokens(40))
        store.pin(key, "name")
        found = store.lookup(segments.tokens(41), segments.TINY)
        store.usage_log.record(RequestUsage(segments.TINY, found, 40, 1, 0.1, 0.1))
        segments.save(store, segments.tokens(9, first=500))
    with sqlite3.connect(path / "index.db") as index:
        index.execute("UPDATE prefixes SET name = ? WHERE name = 'name'", [HOSTILE])
        index.execute("UPDATE fingerprints SET model = ?, source = ?", [HOSTILE] * 2)
    for folder in ("tmp", "quarantine"):
        name = f"{HOSTILE.replace('/', '')}.safetensors".encode() + b"\xff"
        (path / folder / os.fsdecode(name)).touch()
        (path / folder / f"{HOSTILE}.safetensors").touch()
    return path


@pytest.mark.parametrize(
    "args",
    [
        ["ls"],
        ["show", HOSTILE],
        ["stats"],
        ["prune", "-n"],
        ["prune", "-n", "--max-size", "0"],
        ["prune", "-n", "-m", HOSTILE],
        ["verify"],
        ["rm", "-n", HOSTILE],
        ["unpin", HOSTILE],
        ["pin", HOSTILE, HOSTILE],
        ["rm", HOSTILE * 2],
        [HOSTILE],
        ["ls", f"--{HOSTILE}"],
        ["ls", "--store", f"{HOSTILE}/x"],
        ["prune", "--max-size", HOSTILE],
        ["generate", "-f", HOSTILE],
    ],
    ids=lambda args: " ".join(args).replace(HOSTILE, "X"),
)
def test_no_command_lets_a_store_or_an_argument_at_the_terminal(
    hostile_store: Path, args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hostile_store.parent)

    result = invoke(*args)

    assert result.stdout + result.stderr
    assert_harmless(result.stdout + result.stderr)


@pytest.mark.parametrize("args", [["ls"], ["stats"], ["prune", "-n"], ["verify"]])
def test_json_stays_exact(hostile_store: Path, args: list[str]) -> None:
    result = invoke(*args, "--json")

    assert_harmless(result.stdout)
    assert any(HOSTILE in text for text in texts_in(json.loads(result.stdout)))


def test_stored_prompts_are_shown_and_not_obeyed(model_dir: Path) -> None:
    prompt = f"You narrate.\n{HOSTILE}"
    ok("build", "-m", model_dir, "-s", prompt, "--name", "n")

    shown = ok("show", "n")
    explained = ok("explain", "-m", model_dir, "-s", "You narrate.\n\x1b[3J", "Hello")

    assert f"\n<|system|>You narrate.\n{SHOWN}<|end|>" in shown.stdout
    assert_harmless(shown.stdout)
    assert_harmless(explained.stdout)
    assert "\\x1b[3J" in explained.stdout
    assert json.loads(ok("show", "n", "--json").stdout)["text"] == (
        f"<|system|>{prompt}<|end|><|user|>"
    )


def test_what_was_said_is_shown_and_not_obeyed(model_dir: Path) -> None:
    # Else it would end the line.
    said, shown = HOSTILE.replace("\r", ""), SHOWN.replace("\\r", "")

    result = ok(
        *["chat", "-m", model_dir, "--max-tokens", "1"],
        stdin=f"a {said} b\n/history\n/{said}\n",
    )

    assert f"user: a {shown} b\n" in result.stderr
    assert f"No command /{shown}, " in result.stderr
    assert_harmless(result.stderr)


def answering_with_escape(model_dir: Path, folder: Path, args: list[str]) -> Path:
    """Return a model whose answer has an ESC in it."""
    answer = ok("generate", "-m", model_dir, *args, "--json").stdout
    shutil.copytree(model_dir, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    id_by_token = tokenizer["model"]["vocab"]
    token_by_id = {token_id: token for token, token_id in id_by_token.items()}
    answered = next(i for i in json.loads(answer)["token_ids"] if i in token_by_id)
    # What stands for ESC in byte-level tokenizers.
    escape = chr(256 + 27)
    id_by_token[token_by_id[answered]] = id_by_token[escape]
    id_by_token[escape] = answered
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_answers_are_exact_in_a_pipe_and_shown_on_a_terminal(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--raw", "Hello", "--max-tokens", "6"]
    model = answering_with_escape(model_dir, tmp_path / "model", args)
    args = ["generate", "-m", str(model), *args]
    piped = ok(*args).stdout
    ours, terminal = pty.openpty()

    monkeypatch.setattr(sys, "stdout", os.fdopen(terminal, "w"))
    with pytest.raises(SystemExit):
        cli(args)
    sys.stdout.close()

    shown = os.read(ours, 1000).decode().replace("\r\n", "\n")
    assert "\x1b" in piped
    assert shown == printable_text(piped)
    assert "\x1b" not in shown


def test_printing_is_left_to_one_module() -> None:
    folder = Path(promptcache_cli.__file__).parent
    printers = set()
    for path in folder.glob("*.py"):
        calls = (
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)
        )
        names = {ast.unparse(call.func) for call in calls}
        if any(
            n in ("print", "click.echo", "click.secho") or n.endswith(".write")
            for n in names
        ):
            printers.add(path.name)

    # One line of bytes, before anything can be imported.
    assert printers == {"output.py", "__main__.py"}
