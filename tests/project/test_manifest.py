"""The manifest: prompts as a project's `promptcache.toml` gives them."""

import json
import tomllib
from collections.abc import Mapping
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptcache.errors import UsageError
from promptcache.project.manifest import (
    CHOICES_BY_INTEGER_KEY,
    MANIFEST_KEYS,
    PROMPT_KEYS,
    Manifest,
    ManifestError,
    PromptSpec,
    read_manifest,
)

NAME = "promptcache.toml"
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
TOOLS = [{"type": "function", "function": {"name": "roll"}}]
FULL = """
model = "mlx-community/Llama-3.2-3B-Instruct-4bit"

[prompts.narrator]
model = "./models/own"
adapter_path = "adapters"
system = "@narrator.txt"
files = ["manual.txt", "more/b.txt"]
prompt = "Where am I?"
messages = "messages.json"
tools = "tools.json"
chat_template_config = { enable_thinking = false, level = 3 }
kv_bits = 8
kv_group_size = 32
quantized_kv_start = 1
max_kv_size = 4096
prefill_step_size = 512
exact = false
pin = false

[prompts.plain]
files = ["manual.txt"]
raw = true
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the files that manifests name."""
    folder = tmp_path / "project"
    (folder / "more").mkdir(parents=True)
    (folder / "narrator.txt").write_text("You are Ödön.\n", "utf-8")
    (folder / "manual.txt").write_bytes(b"One\r\nTwo\rThree\n")
    (folder / "more" / "b.txt").write_text("B")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Ödön".encode("latin-1"))
    (folder / "messages.json").write_text(json.dumps(MESSAGES))
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    (folder / "cut.json").write_text('[{"role": "user"}')
    (folder / "table.json").write_text("{}")
    (folder / "numbers.json").write_text("[1, 2]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.json").write_bytes('["Ö"]'.encode("latin-1"))
    return folder


def read(folder: Path, text: str) -> Manifest:
    """Write a manifest into a folder and read it."""
    (folder / NAME).write_text(text, "utf-8", newline="")
    return read_manifest(folder / NAME)


def read_prompt(folder: Path, lines: str) -> PromptSpec:
    """Return the one prompt of a manifest with these lines."""
    (spec,) = read(folder, f"[prompts.x]\n{lines}").prompts
    return spec


def test_full_manifest_is_read(project: Path) -> None:
    manifest = read(project, FULL)

    assert manifest.path == (project / NAME).resolve()
    assert manifest.prompts[0] == PromptSpec(
        name="narrator",
        model=str(project / "models" / "own"),
        adapter_path=str(project / "adapters"),
        system="You are Ödön.\n",
        files=("One\nTwo\nThree\n", "B"),
        prompt="Where am I?",
        messages=tuple(MESSAGES),
        tools=tuple(TOOLS),
        chat_template_config={"enable_thinking": False, "level": 3},
        raw=False,
        pin=False,
        settings={
            "kv_bits": 8,
            "kv_group_size": 32,
            "quantized_kv_start": 1,
            "max_kv_size": 4096,
            "prefill_step_size": 512,
            "exact": False,
        },
    )
    assert manifest.prompts[1].raw
    assert manifest.prompts[1].files == ("One\nTwo\nThree\n",)
    assert manifest.prompts[1].model == "mlx-community/Llama-3.2-3B-Instruct-4bit"


def test_keys_have_defaults(project: Path) -> None:
    assert read_prompt(project, 'system = "S"') == PromptSpec(
        name="x",
        model=None,
        adapter_path=None,
        system="S",
        files=(),
        prompt=None,
        messages=(),
        tools=(),
        chat_template_config={},
        raw=False,
        pin=True,
        settings={},
    )


def test_prompts_keep_the_order_of_the_file(project: Path) -> None:
    names = ["zebra", "ant", "bee", "10", "2", "'a b'"]
    tables = (f"[prompts.{name}]\nprompt = 'P'\n" for name in names)

    found = [spec.name for spec in read(project, "".join(tables)).prompts]

    assert found == ["zebra", "ant", "bee", "10", "2", "a b"]


def test_paths_are_relative_to_the_manifest(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / NAME).write_text(FULL)
    monkeypatch.chdir(project / "more")

    manifest = read_manifest(f"../{NAME}")

    assert manifest.path == (project / NAME).resolve()
    assert manifest == read_manifest(project / NAME)
    assert manifest.prompts[0].system == "You are Ödön.\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("org/model", "org/model"),
        ("model", "model"),
        ("/models/own", "/models/own"),
        ("~/own", "~/own"),
        (".hidden/own", ".hidden/own"),
        ("./own", "{folder}/own"),
        ("../own", "{folder}/../own"),
        ("..", "{folder}/.."),
    ],
)
def test_model_is_a_folder_of_the_manifest_if_it_begins_so(
    given: str, expected: str, project: Path
) -> None:
    expected = expected.format(folder=project.resolve())
    prompts = "[prompts.x]\nprompt = 'P'\n"

    by_prompt = read(project, f"{prompts}model = '{given}'")
    by_default = read(project, f"model = '{given}'\n{prompts}")

    assert by_prompt.prompts[0].model == expected
    assert by_default.prompts[0].model == expected


def test_home_is_expanded(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project / "more"))

    spec = read_prompt(project, "files = ['~/b.txt']\nadapter_path = '~/adapter'")

    assert spec.files == ("B",)
    assert spec.adapter_path == str(project / "more" / "adapter")


def test_manifest_in_the_home_is_found(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / NAME).write_text(FULL)
    monkeypatch.setenv("HOME", str(project))

    assert read_manifest(f"~/{NAME}") == read_manifest(project / NAME)


def test_messages_and_tools_are_read_from_the_manifest(project: Path) -> None:
    spec = read_prompt(
        project,
        "messages = [{ role = 'user', content = 'Hi' },"
        " { role = 'assistant', content = 'Ho' }]\n"
        "[[prompts.x.tools]]\n"
        "type = 'function'\n"
        "function = { name = 'roll' }\n",
    )

    assert spec.messages == tuple(MESSAGES)
    assert spec.tools == tuple(TOOLS)


def test_prompt_is_read_from_a_file(project: Path) -> None:
    assert read_prompt(project, "prompt = '@more/b.txt'").prompt == "B"


@pytest.mark.parametrize("exact", [True, False])
def test_exact_is_given_or_not(exact: bool, project: Path) -> None:
    spec = read_prompt(project, f"prompt = 'P'\nexact = {str(exact).lower()}")

    assert spec.settings == {"exact": exact}


@pytest.mark.parametrize("text", [FULL, FULL.replace("\n", "\r\n")])
def test_byte_order_mark_and_line_endings_do_not_matter(
    text: str, project: Path
) -> None:
    assert read(project, f"\ufeff{text}") == read(project, FULL)


@pytest.mark.parametrize(
    "lines",
    [
        "system = 'S'",
        "files = ['manual.txt']",
        "prompt = 'P'",
        "messages = [{ role = 'user' }]",
        "tools = [{}]",
        "system = ''\nprompt = 'P'",
        "files = ['empty.txt', 'manual.txt']",
        "raw = true\nprompt = 'P'",
    ],
)
def test_one_part_is_enough(lines: str, project: Path) -> None:
    assert read_prompt(project, lines).name == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # No TOML
        ("a\nb", "line 1: Expected '=' after a key in a key/value pair"),
        ("\n\n[prompts.x\n", "line 3: Expected ']' at the end of a table declaration"),
        ("\na = [1\n", "line 2: Unclosed array"),
        ("", "prompts: no prompts, add a table such as [prompts.narrator]"),
        pytest.param(
            "a = " + "[" * 100_000, "cannot be read (nested too deeply)", id="deep"
        ),
        pytest.param(
            "a = " + "9" * 5000,
            "cannot be read (Exceeds the limit (4300 digits) for integer string "
            "conversion: value has 5000 digits; use sys.set_int_max_str_digits() to "
            "increase the limit)",
            id="long",
        ),
        # Not these keys
        ("modell = 'm'", "modell: unknown key, did you mean 'model'?"),
        ("version = 1", "version: unknown key"),
        ('"a\\nb" = 1', "'a\\nb': unknown key"),
        ("'' = 1", "'': unknown key"),
        # Not these types
        ("model = 1", "model: must be a text, not an integer"),
        ("model = ' '", "model: must not be empty"),
        ("prompts = []", "prompts: must be a table, not an array"),
        ("[prompts]", "prompts: no prompts, add a table such as [prompts.narrator]"),
        ("[prompts]\nmodel = 'm'", "prompts.model: must be a table, not a text"),
        # Not these names
        ("[prompts.'']", "prompts: '' cannot be a name, use printable characters"),
        ("[prompts.' ']", "prompts: ' ' cannot be a name, use printable characters"),
        (
            '[prompts."a\\u2028"]',
            "prompts: 'a\\u2028' cannot be a name, use printable characters",
        ),
        ("[prompts.'a b']\nx = 1", "prompts.'a b'.x: unknown key"),
    ],
)
def test_bad_manifest_is_refused_in_one_line(
    text: str, message: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / NAME).write_text(text, "utf-8")
    monkeypatch.chdir(project)

    with pytest.raises(ManifestError) as caught:
        read_manifest(NAME)

    assert str(caught.value) == f"{NAME}: {message}"


TEXT_NOT = "must be a text, not"
NOTHING = "nothing to build, give system, files, messages, tools or prompt"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("sytem = 'S'", ".sytem: unknown key, did you mean 'system'?"),
        # Types
        ("model = true", f".model: {TEXT_NOT} a boolean"),
        ("model = ''", ".model: must not be empty"),
        ("adapter_path = 1.5", f".adapter_path: {TEXT_NOT} a float"),
        ("adapter_path = ''", ".adapter_path: must not be empty"),
        ("system = 1", f".system: {TEXT_NOT} an integer"),
        ("system = 2026-01-02", f".system: {TEXT_NOT} a date"),
        ("system = 2026-01-02T03:04:05", f".system: {TEXT_NOT} a date"),
        ("system = 03:04:05", f".system: {TEXT_NOT} a time"),
        ("prompt = ['P']", f".prompt: {TEXT_NOT} an array"),
        ("prompt = {}", f".prompt: {TEXT_NOT} a table"),
        ("files = 'manual.txt'", ".files: must be an array, not a text"),
        ("files = ['manual.txt', 2]", f".files: item 2 {TEXT_NOT} an integer"),
        ("messages = 1", ".messages: must be a text or an array, not an integer"),
        ("messages = {}", ".messages: must be a text or an array, not a table"),
        ("tools = [{}, 'a']", ".tools: item 2 must be a table, not a text"),
        (
            "chat_template_config = 'a'",
            ".chat_template_config: must be a table, not a text",
        ),
        ("kv_bits = true", ".kv_bits: must be an integer, not a boolean"),
        ("max_kv_size = 8.0", ".max_kv_size: must be an integer, not a float"),
        ("exact = 1", ".exact: must be a boolean, not an integer"),
        ("raw = 'yes'", ".raw: must be a boolean, not a text"),
        ("pin = []", ".pin: must be a boolean, not an array"),
        # Ranges
        ("kv_bits = 7", ".kv_bits: must be one of (2, 3, 4, 5, 6, 8)"),
        pytest.param(
            f"kv_bits = 0x{'f' * 9999}",
            ".kv_bits: must be one of (2, 3, 4, 5, 6, 8)",
            id="long",
        ),
        ("kv_group_size = 16", ".kv_group_size: must be one of (32, 64, 128)"),
        ("quantized_kv_start = 0", ".quantized_kv_start: must be at least 1, not 0"),
        ("max_kv_size = -1", ".max_kv_size: must be at least 1, not -1"),
        ("prefill_step_size = 0", ".prefill_step_size: must be at least 1, not 0"),
        # Files
        (
            "system = '@no.txt'",
            ".system: cannot read no.txt (No such file or directory)",
        ),
        ("prompt = '@more'", ".prompt: cannot read more (Is a directory)"),
        ("prompt = '@'", ".prompt: cannot read '' (Is a directory)"),
        (
            'files = ["a\\nb"]',
            ".files: cannot read 'a\\nb' (No such file or directory)",
        ),
        (
            'files = ["a\\u0000"]',
            ".files: cannot read 'a\\x00' (embedded null byte)",
        ),
        (
            "files = ['manual.txt', 'latin.txt']",
            ".files: cannot read latin.txt (not UTF-8 text)",
        ),
        (
            "messages = 'no.json'",
            ".messages: cannot read no.json (No such file or directory)",
        ),
        (
            "messages = 'latin.json'",
            ".messages: cannot read latin.json (not UTF-8 text)",
        ),
        (
            "messages = 'cut.json'",
            ".messages: cut.json is not JSON "
            "(Expecting ',' delimiter: line 1 column 18 (char 17))",
        ),
        ("tools = 'deep.json'", ".tools: deep.json is not JSON (nested too deeply)"),
        ("tools = 'table.json'", ".tools: table.json must hold a JSON list of objects"),
        (
            "messages = 'numbers.json'",
            ".messages: numbers.json must hold a JSON list of objects",
        ),
        # Roles
        ("messages = [{ role = 'user' }, {}]", ".messages: message 2 needs a role"),
        ("messages = 'tools.json'", ".messages: message 1 needs a role"),
        # Raw
        *(
            (
                f"raw = true\nprompt = 'P'\n{key} = {value}",
                f".{key}: cannot go with raw, it needs the chat template",
            )
            for key, value in {
                "system": "''",
                "messages": "'messages.json'",
                "tools": "[]",
                "chat_template_config": "{}",
            }.items()
        ),
        # Nothing to build
        ("", f": {NOTHING}"),
        ("system = ''\nprompt = ''\nmessages = []\ntools = []", f": {NOTHING}"),
        ("files = ['empty.txt']\nmodel = 'm'", f": {NOTHING}"),
        ("raw = true", ": nothing to build, give files or prompt"),
    ],
)
def test_bad_prompt_is_refused_in_one_line(
    lines: str, message: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / NAME).write_text(f"[prompts.x]\n{lines}", "utf-8")
    monkeypatch.chdir(project)

    with pytest.raises(ManifestError) as caught:
        read_manifest(NAME)

    assert str(caught.value) == f"{NAME}: prompts.x{message}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (NAME, f"{NAME}: cannot be read (No such file or directory)"),
        ("./no/p.toml", "./no/p.toml: cannot be read (No such file or directory)"),
        ("more", "more: cannot be read (Is a directory)"),
        ("latin.txt", "latin.txt: cannot be read (not UTF-8 text)"),
        ("a\nb\0", "'a\\nb\\x00': cannot be read (embedded null byte)"),
    ],
)
def test_unreadable_manifest_is_named_as_given(
    path: str, message: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)

    with pytest.raises(UsageError) as caught:
        read_manifest(path)

    assert str(caught.value) == message


scalars = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.datetimes()
    | st.times()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
texts = st.sampled_from(["S", "", "@b.txt"])
objects = st.sampled_from(["m.json", [], [{"role": "user", "content": "Hi"}]])
good_values: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["org/model", "./own"]),
    "adapter_path": st.just("adapter"),
    "system": texts,
    "files": st.lists(st.just("b.txt"), max_size=2),
    "prompt": texts,
    "messages": objects,
    "tools": objects,
    "chat_template_config": st.dictionaries(st.text(max_size=3), values, max_size=2),
    **{key: st.sampled_from([32, 64, 128]) for key in CHOICES_BY_INTEGER_KEY},
    "kv_bits": st.sampled_from([2, 3, 4, 5, 6, 8]),
    **{key: st.booleans() for key in ("exact", "raw", "pin")},
}


@st.composite
def manifests(draw: st.DrawFn) -> dict[str, Any]:
    """Draw the content of a good manifest, at times with some place spoiled."""
    prompt = st.fixed_dictionaries({}, optional=good_values)
    names = st.sampled_from(["a", "b c", "ü"])
    prompts = draw(st.dictionaries(names, prompt, min_size=1, max_size=2))
    manifest = {"model": draw(good_values["model"]), "prompts": prompts}
    if draw(st.booleans()):
        place = draw(st.sampled_from([manifest, prompts, *prompts.values()]))
        keys = st.sampled_from([*MANIFEST_KEYS, *PROMPT_KEYS]) | st.text(max_size=3)
        place[draw(keys)] = draw(values)
    return manifest


def to_toml(value: Any) -> str:
    """Return a value as TOML, tables inline."""
    if isinstance(value, Mapping):
        pairs = (f"{to_toml(key)} = {to_toml(v)}" for key, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, str | bool):
        # TOML wants DEL escaped, JSON does not.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def check_outcome(path: Path) -> None:
    """Raise unless a file is a manifest or is refused in one line."""
    try:
        manifest = read_manifest(path)
    except ManifestError as error:
        assert str(error).isprintable()
        assert str(error).startswith(f"{path}: ")
        assert not str(error).endswith(".")
    else:
        assert manifest.prompts
        assert all(isinstance(spec, PromptSpec) for spec in manifest.prompts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the manifests that Hypothesis writes."""
    folder = tmp_path_factory.mktemp("manifests")
    (folder / "b.txt").write_text("B")
    (folder / "m.json").write_text(json.dumps(MESSAGES))
    return folder


@given(manifest=manifests())
def test_any_toml_is_a_manifest_or_refused(
    manifest: dict[str, Any], folder: Path
) -> None:
    lines = (f"{to_toml(key)} = {to_toml(v)}\n" for key, v in manifest.items())
    document = "".join(lines)
    assert list(tomllib.loads(document)) == list(manifest)
    (folder / NAME).write_text(document, "utf-8")

    check_outcome(folder / NAME)


@given(content=st.binary() | st.text("[]{}=\"'.a1\n#-:T ").map(str.encode))
def test_any_file_is_a_manifest_or_refused(content: bytes, folder: Path) -> None:
    (folder / NAME).write_bytes(content)

    check_outcome(folder / NAME)
