"""`promptcache build` and `promptcache generate`."""

import json
import re
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from click.testing import Result

from promptcache import PrefixStore
from tests.helpers.commands import GENERATE_FIELDS, assert_fails, invoke, ok, tree_hash

HEX = re.compile(r"[0-9a-f]{32}\n")
BUILD_FIELDS = {
    "key": str,
    "name": (str, type(None)),
    "model": str,
    "num_tokens": int,
    "cached_tokens": int,
    "nbytes": int,
    "seconds": float,
    "volatile": list,
}


@pytest.fixture(autouse=True)
def model(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(model_dir))


def parsed(result: Result, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of a command with exactly these fields of these types."""
    value = json.loads(result.stdout)
    assert list(value) == list(fields)
    for name, kind in fields.items():
        assert isinstance(value[name], kind), name
        assert not isinstance(value[name], bool)
    return dict(value)


def expected_text(model_dir: Path, prompt: str, max_tokens: int) -> str:
    """Return what plain mlx-lm answers to a user."""
    model, tokenizer = mlx_lm.load(str(model_dir))[:2]
    messages = [{"role": "user", "content": prompt}]
    token_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text: str = mlx_lm.generate(model, tokenizer, token_ids, max_tokens=max_tokens)
    return text


# build


def test_build_prints_the_key_alone() -> None:
    result = ok("build", "-s", "You narrate.", "--name", "narrator")

    assert HEX.fullmatch(result.stdout)
    assert re.fullmatch(
        r"15 tokens of llama, 0 were there already, \d+\.\d s\n", result.stderr
    )
    assert ok("ls", "-q").stdout == result.stdout


def test_quiet_build_says_nothing() -> None:
    result = ok("build", "-q", "-s", "You narrate.")

    assert HEX.fullmatch(result.stdout)
    assert result.stderr == ""


def test_build_json_has_its_fields() -> None:
    args = ["build", "-s", "You narrate.", "--name", "narrator", "--json"]

    first = parsed(ok(*args), BUILD_FIELDS)
    second = parsed(ok(*args), BUILD_FIELDS)

    assert (first["num_tokens"], first["cached_tokens"]) == (15, 0)
    assert (second["num_tokens"], second["cached_tokens"]) == (15, 15)
    assert (first["name"], first["model"]) == ("narrator", "llama")
    assert first["key"] == second["key"]
    assert first["nbytes"] > 15 * 1024


def test_build_without_a_prompt_serves_every_question() -> None:
    built = parsed(ok("build", "-s", "You narrate.", "--json"), BUILD_FIELDS)

    for question in ("I open the door", "Why?"):
        answered = parsed(
            ok("generate", "-s", "You narrate.", question, "--json"), GENERATE_FIELDS
        )
        assert answered["cached_tokens"] == built["num_tokens"]
        assert answered["key"] == built["key"]


def test_build_of_a_file_serves_every_question(tmp_path: Path) -> None:
    manual = tmp_path / "manual.txt"
    manual.write_text("Press the button. " * 20)

    built = parsed(ok("build", "-f", str(manual), "--json"), BUILD_FIELDS)

    answered = parsed(
        ok("generate", "-f", str(manual), "How?", "--json"), GENERATE_FIELDS
    )
    assert answered["cached_tokens"] == built["num_tokens"] > 300


def test_build_with_a_prompt_stores_it_whole() -> None:
    built = parsed(ok("build", "-s", "S", "Hello", "--json"), BUILD_FIELDS)

    answered = parsed(ok("generate", "-s", "S", "Hello", "--json"), GENERATE_FIELDS)
    assert answered["prompt_tokens"] == built["num_tokens"]
    assert answered["cached_tokens"] == built["num_tokens"] - 1


def test_text_option_takes_a_file(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("You narrate.")

    from_file = ok("build", "-s", f"@{tmp_path / 'system.txt'}").stdout

    assert from_file == ok("build", "-s", "You narrate.").stdout


@pytest.mark.parametrize(
    ("args", "stdin", "same"),
    [
        (["-s", "-"], "You narrate.", ["-s", "You narrate."]),
        (["--raw", "-f", "-"], "You narrate.", ["--raw", "You narrate."]),
        (["--raw", "-"], "You narrate.", ["--raw", "You narrate."]),
        (["-"], "Hello", ["Hello"]),
    ],
    ids=str,
)
def test_dash_of_build_is_stdin(args: list[str], stdin: str, same: list[str]) -> None:
    assert ok("build", *args, stdin=stdin).stdout == ok("build", *same).stdout


def test_messages_and_tools_come_from_files(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "roll"}}]
    (tmp_path / "messages.json").write_text(json.dumps(messages))
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    args = ["--messages", f"{tmp_path}/messages.json", "--tools"]

    key = ok("build", *args, f"{tmp_path}/tools.json").stdout.strip()

    shown = json.loads(ok("show", key, "--json").stdout)
    assert shown["text"].startswith('<|tools|>[{"type": "function"')
    assert shown["text"].endswith("<|user|>Hello<|end|><|assistant|>")


def test_name_that_is_none_is_refused_before_any_prefill() -> None:
    assert_fails(invoke("build", "-s", "You narrate.", "--name", ""), 2, "name")

    assert ok("ls", "-q").stdout == ""


def test_build_into_a_store_that_is_too_small_fails() -> None:
    result = invoke("build", "-s", "You narrate.", "--max-size", "1kB")

    assert_fails(result, 1, "--max-size")


# generate


def test_generate_prints_only_the_text(model_dir: Path) -> None:
    result = ok("generate", "Hello", "--max-tokens", "12")

    assert result.stdout == expected_text(model_dir, "Hello", 12) + "\n"
    assert result.stderr == ""


def test_warm_text_equals_cold_text(model_dir: Path) -> None:
    args = ["generate", "Hello", "--max-tokens", "12"]
    ok(*args, "--save")

    warm = ok(*args, "--save", "-u")

    assert warm.stdout == expected_text(model_dir, "Hello", 12) + "\n"
    assert "7 cached" in warm.stderr
    assert warm.stdout == ok(*args, "--no-cache").stdout


def test_usage_is_one_line_on_stderr() -> None:
    ok("build", "Hello")

    result = ok("generate", "Hello", "--max-tokens", "3", "-u")

    assert re.fullmatch(
        r"8 prompt tokens, 7 cached, 1 prefilled, 3 generated, "
        r"\d+\.\d{3} s to the first token\n",
        result.stderr,
    )


def test_generate_json_has_its_fields() -> None:
    cold = parsed(
        ok("generate", "Hello", "--max-tokens", "5", "--save", "--json"),
        GENERATE_FIELDS,
    )
    warm = parsed(
        ok("generate", "Hello", "--max-tokens", "5", "--json"), GENERATE_FIELDS
    )

    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 7)
    assert warm["token_ids"] == cold["token_ids"]
    assert all(isinstance(token_id, int) for token_id in warm["token_ids"])
    assert warm["text"] == cold["text"]
    assert (warm["generation_tokens"], warm["finish_reason"]) == (5, "length")
    assert warm["ttft_seconds"] == warm["load_seconds"] + warm["prefill_seconds"]
    assert warm["key"] == cold["key"]


@pytest.mark.parametrize(
    ("args", "is_saved"),
    [
        ([], False),
        (["--save"], True),
        (["--no-save"], False),
        (["--no-cache"], False),
        (["-s", "x" * 600], True),
        (["-s", "x" * 600, "--no-save"], False),
    ],
    ids=lambda v: " ".join(a[:9] for a in v) if isinstance(v, list) else str(v),
)
def test_flags_decide_what_is_saved(
    args: list[str], is_saved: bool, store: PrefixStore
) -> None:
    ok("generate", "Hello", "--max-tokens", "2", *args)

    assert bool(ok("ls", "-q").stdout) is is_saved


def test_no_cache_opens_no_store(tmp_path: Path) -> None:
    ok("generate", "Hello", "--max-tokens", "2", "--no-cache")

    assert not (tmp_path / "store").exists()


def test_dash_of_generate_is_stdin() -> None:
    args = ["--max-tokens", "6"]

    piped = ok("generate", "-", *args, stdin="Hello")

    assert piped.stdout == ok("generate", "Hello", *args).stdout


def test_seed_makes_sampling_repeat_itself() -> None:
    args = ["generate", "Hello", "--max-tokens", "12", "--temp", "1", "--seed"]
    ok("build", "Hello")

    assert ok(*args, "1").stdout == ok(*args, "1", "--no-cache").stdout
    assert ok(*args, "1").stdout != ok(*args, "2").stdout


def test_sampling_options_reach_the_model() -> None:
    plain = ok("generate", "Hello", "--max-tokens", "30").stdout

    penalized = ok(
        "generate", "Hello", "--max-tokens", "30", "--repetition-penalty", "1.9"
    )

    assert penalized.stdout != plain


# Trouble


def test_warning_is_one_line_and_the_text_is_right(
    model_dir: Path, tmp_path: Path
) -> None:
    ok("build", "Hello")
    blob = next((tmp_path / "store" / "blobs").rglob("*.safetensors"))
    blob.write_bytes(b"garbage")

    result = ok("generate", "Hello", "--max-tokens", "5")

    assert result.stdout == expected_text(model_dir, "Hello", 5) + "\n"
    assert re.fullmatch(r"promptcache: warning: cached segment .*\n", result.stderr)


def test_store_that_cannot_be_opened_is_one_warning(
    model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")

    result = ok(
        "generate", "Hello", "--max-tokens", "5", "--store", tmp_path / "file" / "x"
    )

    assert result.stdout == expected_text(model_dir, "Hello", 5) + "\n"
    assert re.fullmatch(r"promptcache: warning: going on .*\n", result.stderr)


def test_rebuilt_index_is_one_warning(tmp_path: Path) -> None:
    ok("build", "Hello")
    (tmp_path / "store" / "index.db").unlink()

    result = ok("generate", "Hello", "--max-tokens", "2", "--json")

    assert json.loads(result.stdout)["cached_tokens"] == 7
    assert re.fullmatch(r"promptcache: warning: the index .*\n", result.stderr)


BAD_INPUTS = [
    pytest.param(["-m", "/no/such/model", "Hello"], 1, ["/no/such/model"], id="model"),
    pytest.param(["--adapter-path", "/no/such", "Hello"], 1, ["adapter"], id="adapter"),
    pytest.param([""], 2, ["empty"], id="empty"),
    pytest.param(["  \n"], 2, ["empty"], id="blank"),
    pytest.param([], 2, ["no prompt"], id="nothing"),
    pytest.param(["--raw", "-s", "S", "Hello"], 2, ["--raw"], id="raw and system"),
    pytest.param(["--messages", "@TEXT"], 2, ["not JSON"], id="messages no JSON"),
    pytest.param(["--tools", "@DEEP", "Hello"], 2, ["too deeply"], id="deep tools"),
    pytest.param(["--messages", "@OBJECT"], 2, ["list"], id="messages no list"),
    pytest.param(["--messages", "@ROLELESS"], 2, ["role"], id="message without role"),
    pytest.param(["--messages", "@EMPTY"], 2, ["no prompt"], id="no messages"),
    pytest.param(["--tools", "@OBJECT", "Hello"], 2, ["list"], id="tools no list"),
    pytest.param(["--tools", "@NUMBERS", "Hello"], 2, ["list"], id="tools of numbers"),
    pytest.param(["-f", "@BINARY", "Hello"], 2, ["UTF-8"], id="binary file"),
    pytest.param(["--store", "@TEXT", "Hello"], 2, ["--store"], id="store is a file"),
    pytest.param(
        ["--kv-bits", "8", "--kv-group-size", "7", "--quantized-kv-start", "0", "Hi"],
        2,
        [],
        id="groups of 7",
    ),
    pytest.param(
        ["--kv-bits", "7", "--kv-group-size", "32", "--quantized-kv-start", "0", "Hi"],
        2,
        [],
        id="7 bits",
    ),
]
GENERATE_BAD_INPUTS = [
    pytest.param(["--max-tokens", "0", "Hello"], 2, ["--max-tokens"], id="no tokens"),
    pytest.param(["--max-tokens", "-5", "Hello"], 2, ["-1"], id="negative tokens"),
    pytest.param(["--no-cache", "--save", "Hello"], 2, ["--no-cache"], id="no cache"),
    pytest.param(["--top-k", "99999", "--temp", "1", "Hello"], 2, [], id="top-k"),
    pytest.param(["--min-p", "3", "--temp", "1", "Hello"], 2, [], id="min-p 3"),
    pytest.param(["--repetition-penalty", "-1", "Hello"], 2, [], id="penalty -1"),
]


@pytest.fixture
def bad_files(tmp_path: Path) -> dict[str, str]:
    contents = {
        "@TEXT": b"no JSON",
        "@DEEP": b"[" * 200_000,
        "@OBJECT": b'{"role": "user"}',
        "@ROLELESS": b'[{"content": "Hello"}]',
        "@EMPTY": b"[]",
        "@NUMBERS": b"[1, 2]",
        "@BINARY": b"\xff\xfe\x00",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in contents}


@pytest.mark.parametrize(("args", "code", "words"), BAD_INPUTS)
@pytest.mark.parametrize("command", ["build", "generate"])
def test_bad_input_is_one_line(
    bad_files: dict[str, str],
    command: str,
    args: list[str],
    code: int,
    words: list[str],
) -> None:
    result = invoke(command, *(bad_files.get(arg, arg) for arg in args))

    assert_fails(result, code, *words)


@pytest.mark.parametrize(("args", "code", "words"), GENERATE_BAD_INPUTS)
def test_bad_input_of_generate_is_one_line(
    args: list[str], code: int, words: list[str]
) -> None:
    assert_fails(invoke("generate", *args), code, *words)


def test_bad_input_changes_no_store(store: PrefixStore) -> None:
    store.close()
    before = tree_hash(store.path)

    invoke("generate", "")
    invoke("build", "--raw", "-s", "S", "Hello")

    assert tree_hash(store.path) == before


def test_window_model_resumes_at_any_token(make_model: Any) -> None:
    model = make_model("gemma3_text")
    system = "You are the keeper of the lighthouse at the end of the long pier."
    options = ("generate", "-m", model, "-s", system, "--max-tokens", "6", "--json")
    built = json.loads(ok("build", "-m", model, "-s", system, "--json").stdout)

    warm = json.loads(ok(*options, "Who goes there?").stdout)

    cold = json.loads(ok(*options, "Who goes there?", "--no-cache").stdout)
    assert warm["cached_tokens"] == built["num_tokens"] > 32
    assert warm["token_ids"] == cold["token_ids"]


# Draft models and exact mode


def test_draft_model_resumes_with_the_same_tokens(model_dir: Path) -> None:
    question = "Where does the lighthouse keeper sleep?"
    options = ("--draft-model", model_dir, "--max-tokens", "8", "--json")
    cold = json.loads(ok("generate", question, *options, "--save").stdout)

    warm = json.loads(ok("generate", question, *options).stdout)

    assert warm["cached_tokens"] == warm["prompt_tokens"] - 1
    assert warm["token_ids"] == cold["token_ids"]
    plain = json.loads(ok("generate", question, "--max-tokens", "8", "--json").stdout)
    assert plain["token_ids"] == cold["token_ids"]
    assert plain["cached_tokens"] == 0


def test_missing_draft_model_is_one_line() -> None:
    result = invoke("generate", "Hello", "--draft-model", "/no/such/folder")

    assert_fails(result, 1, "/no/such/folder", "not found")


def test_exact_mode_finds_what_was_built_exactly() -> None:
    prompt = "The sea, the sea, the wide and open sea. " * 4
    sizes = ("--prefill-step-size", "32")
    ok("build", "--raw", prompt, "--exact", *sizes)

    warm = ok("generate", "--raw", f"{prompt}!", "--exact", *sizes, "--json")
    tight = ok("generate", "--raw", f"{prompt}!", *sizes, "--json")

    assert json.loads(warm.stdout)["cached_tokens"] % 32 == 0
    assert json.loads(warm.stdout)["cached_tokens"] > 0
    assert json.loads(tight.stdout)["cached_tokens"] == 0


# The daily write budget


LONG = "I open the door, and look at what is behind it. " * 30


def test_build_beyond_what_may_be_written_in_a_day_is_one_line() -> None:
    result = invoke("build", LONG, "--daily-writes", "1kB")

    assert_fails(result, 1, "in a day", "--daily-writes")
    assert not json.loads(ok("ls", "--json").stdout)


def test_generation_beyond_what_may_be_written_in_a_day_is_not_saved() -> None:
    options = ("--max-tokens", "4", "--save", "--daily-writes")

    refused = ok("generate", LONG, *options, "1kB")
    saved = ok("generate", LONG, *options, "1GB")

    assert "in a day" in refused.stderr
    assert refused.stdout == saved.stdout
    assert saved.stderr == ""
    assert len(json.loads(ok("ls", "--json").stdout)) == 1


@pytest.mark.parametrize("command", ["chat", "sync", "serve"])
def test_other_commands_that_write_have_a_daily_budget_too(command: str) -> None:
    assert "--daily-writes SIZE" in ok(command, "--help").stdout
