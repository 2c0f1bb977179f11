"""`promptcache sync`: the store holds what a manifest names, and nothing is lost."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptcache import PrefixStore
from tests.helpers import tiny
from tests.helpers.adventures import LOOK, ROLL, TEMPLATE, WALK
from tests.helpers.commands import assert_fails, invoke, ok, tree_hash
from tests.helpers.marks import all_but

MANIFEST = """
model = "./narrator"

[prompts.story]
system = "@story.txt"
tools = "tools.json"

[prompts.manual]
model = "./other"
files = ["manual.txt"]
"""
STEP_FIELDS = ["name", "action", "key", "reason", "stale"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a manifest, its sources and two models; commands run there."""
    folder = tmp_path / "project"
    for seed, name in enumerate(("narrator", "other")):
        model = tiny.save_model(folder / name, tiny.LLAMA, seed=seed)
        tiny.save_tokenizer(model, TEMPLATE)
    (folder / "story.txt").write_text("You narrate.\nBe brief and kind, always.")
    (folder / "manual.txt").write_text("Press the button. " * 20)
    (folder / "tools.json").write_text(json.dumps([ROLL, LOOK]))
    (folder / "promptcache.toml").write_text(MANIFEST)
    monkeypatch.chdir(folder)
    return folder


def change(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def sync(*args: str | Path, code: int = 0) -> dict[str, tuple[str, str]]:
    """Return action and reason of each step by name."""
    result = invoke("sync", *args, "--json")
    assert result.exit_code == code, result.output
    value = json.loads(result.stdout)
    assert list(value) == ["steps", "dry_run"]
    assert value["dry_run"] == bool({"--check", "--dry-run", "-n"} & {*args})
    for step in value["steps"]:
        assert list(step) == STEP_FIELDS
        assert step["key"] is None or re.fullmatch("[0-9a-f]{32}", step["key"])
        assert step["stale"] == (step["action"] != "keep")
    return {step["name"]: (step["action"], step["reason"]) for step in value["steps"]}


def actions(*args: str | Path, code: int = 0) -> dict[str, str]:
    return {name: action for name, (action, _) in sync(*args, code=code).items()}


def pins() -> dict[str, str]:
    """Return the key of each name."""
    with PrefixStore() as store:
        return {str(pin.name): pin.key for pin in store.pins()}


def state(tmp_path: Path) -> tuple[str, str]:
    return tree_hash(tmp_path / "store" / "blobs"), ok("ls", "--json").stdout


KEPT = {"story": "keep", "manual": "keep"}


# Building


@pytest.mark.usefixtures("project")
def test_first_sync_builds_and_pins_the_second_keeps() -> None:
    first = sync()
    keys = pins()
    second = sync()

    reason = "nothing cached for {} yet"
    assert first == {
        "story": ("build", reason.format("narrator")),
        "manual": ("build", reason.format("other")),
    }
    assert set(keys) == {"story", "manual"}
    assert second == dict.fromkeys(KEPT, ("keep", "up to date"))
    assert pins() == keys


@pytest.mark.usefixtures("project")
def test_what_is_built_serves_every_question() -> None:
    ok("sync")
    lengths = {
        p["name"]: p["num_tokens"] for p in json.loads(ok("ls", "--json").stdout)
    }
    parts = ["-s", "@story.txt", "--tools", "tools.json"]
    asked = ["--max-tokens", "1", "--json", "Why?"]

    story = json.loads(ok("generate", "-m", "./narrator", *parts, *asked).stdout)
    manual = ["generate", "-m", "./other", "-f", "manual.txt", *asked]

    assert story["cached_tokens"] == lengths["story"]
    assert json.loads(ok(*manual).stdout)["cached_tokens"] == lengths["manual"]


@pytest.mark.usefixtures("project")
def test_people_read_a_table() -> None:
    first, second = ok("sync"), ok("sync", "--check")

    headers, *rows = first.stdout.splitlines()
    assert headers.split() == ["NAME", "ACTION", "KEY", "REASON"]
    assert [row.split()[:2] for row in rows] == [
        ["story", "build"],
        ["manual", "build"],
    ]
    assert rows[0].split()[2] == pins()["story"][:12]
    assert rows[0].endswith("nothing cached for narrator yet")
    assert first.stderr.splitlines()[-1] == "Done: 2 built"
    assert second.stderr == "To do: 2 keep\n"


def new_weights(project: Path) -> None:
    tiny.save_model(project / "narrator", tiny.LLAMA, seed=7)
    tiny.save_tokenizer(project / "narrator", TEMPLATE)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "source": (
        lambda p: change(p / "story.txt", "kind", "polite"),
        "'kind, always.<|end|><|user|>' became 'polite,",
    ),
    "date": (
        lambda p: change(p / "story.txt", "You", "2026-11-23: You"),
        "a date appears: '2026-11-23'",
    ),
    "template": (
        lambda p: tiny.save_tokenizer(p / "narrator", "<|bos|>" + TEMPLATE),
        "another chat template",
    ),
    "weights": (new_weights, "other weights"),
    "tools reordered": (
        lambda p: (p / "tools.json").write_text(json.dumps([LOOK, ROLL])),
        "another order of the tools, from look on",
    ),
    "argument": (
        lambda p: change(
            p / "promptcache.toml",
            "[prompts.story]",
            '[prompts.story]\nchat_template_config = { effort = "high" }',
        ),
        "another template argument: effort was not given and is 'high'",
    ),
    "KV bits": (
        lambda p: change(
            p / "promptcache.toml", "[prompts.story]", "[prompts.story]\nkv_bits = 8"
        ),
        "other KV bits: none became 8",
    ),
    "eviction": (lambda p: ok("rm", "-y", pins()["story"]), "was evicted"),
}


@pytest.mark.parametrize("name", all_but(["KV bits", "eviction"], CHANGES))
def test_changed_prompt_is_stale_until_it_is_rebuilt(
    name: str, project: Path, tmp_path: Path
) -> None:
    make, reason = CHANGES[name]
    ok("sync")
    before = pins()

    make(project)

    left = state(tmp_path)
    check = sync("--check", code=1)
    assert check["story"][0] == "build"
    assert reason in check["story"][1]
    assert check["manual"] == ("keep", "up to date")
    assert sync("--dry-run") == check
    assert state(tmp_path) == left
    assert sync() == check
    after = pins()
    assert set(after) == {"story", "manual"}
    assert (after["story"] == before["story"]) == (name == "eviction")
    assert after["manual"] == before["manual"]
    assert actions("--check") == KEPT


# Pins


def test_prompt_that_is_named_no_longer_is_unpinned(project: Path) -> None:
    ok("sync")
    keys = pins()
    ok("pin", ok("build", "-q", "-m", "./other", "-s", "By hand").stdout[:32], "hand")
    text = MANIFEST.partition("[prompts.manual]")[0]
    (project / "promptcache.toml").write_text(text)

    assert sync("--check", code=1)["manual"] == (
        "unpin",
        "the manifest no longer names it",
    )
    assert actions() == {"story": "keep", "manual": "unpin"}

    assert set(pins()) == {"story", "hand"}
    assert ok("ls", "-q").stdout.count(keys["manual"]) == 1
    assert actions("--check") == {"story": "keep"}


def test_prompt_that_is_not_to_be_pinned_is_built(project: Path) -> None:
    change(
        project / "promptcache.toml", "[prompts.story]", "[prompts.story]\npin=false"
    )

    assert actions() == {"story": "build", "manual": "build"}
    assert set(pins()) == {"manual"}
    assert actions("--check") == KEPT


@pytest.mark.parametrize("pin", ["true", "false"])
def test_keys_that_are_shown_are_those_that_show_knows(project: Path, pin: str) -> None:
    manifest = project / "promptcache.toml"
    change(manifest, "[prompts.story]", f"[prompts.story]\npin = {pin}")
    parts = ["-s", "@story.txt", "--tools", "tools.json"]

    def keys(*args: str) -> dict[str, str | None]:
        steps = json.loads(invoke("sync", *args, "--json").stdout)["steps"]
        return {step["name"]: step["key"] for step in steps}

    first = keys("--check")
    # What the story says is stored now, as a part of this.
    ok("build", "-m", "./narrator", *parts, "Why?")
    stale, second = actions("--check", code=1), keys("--check")
    done, kept = keys(), keys("--check")

    assert first == second == {"story": None, "manual": None}
    assert stale == {"story": "pin" if pin == "true" else "build", "manual": "build"}
    assert done == kept
    for key in kept.values():
        assert key is not None
        assert json.loads(ok("show", key, "--json").stdout)["key"] == key


def test_prompt_is_unpinned_and_pinned_again_as_the_manifest_says(
    project: Path,
) -> None:
    manifest = project / "promptcache.toml"
    ok("sync")
    change(manifest, "[prompts.story]", "[prompts.story]\npin = false")

    assert sync()["story"] == ("unpin", "the manifest says pin = false")
    assert set(pins()) == {"manual"}
    change(manifest, "pin = false", "pin = true")
    assert sync()["story"] == ("pin", "stored, but not pinned")
    assert set(pins()) == {"story", "manual"}


def test_manifests_leave_each_others_prompts_alone(project: Path) -> None:
    second = project / "more" / "second.toml"
    second.parent.mkdir()
    second.write_text('[prompts.song]\nmodel = "../narrator"\nsystem = "You sing."\n')

    ok("sync")
    assert actions(second) == {"song": "build"}

    assert actions() == KEPT
    assert actions(second, "--check") == {"song": "keep"}
    assert set(pins()) == {"story", "manual", "song"}


def test_pins_belong_to_their_manifest_after_the_index_is_lost(
    project: Path, tmp_path: Path
) -> None:
    ok("sync")
    keys = pins()
    for path in (tmp_path / "store").glob("index.db*"):
        path.unlink()

    ok("ls")
    assert actions("--check") == KEPT
    assert pins() == keys
    text = MANIFEST.partition("[prompts.manual]")[0]
    (project / "promptcache.toml").write_text(text)
    assert actions() == {"story": "keep", "manual": "unpin"}
    assert set(pins()) == {"story"}


@pytest.mark.usefixtures("project")
def test_prefix_of_a_longer_stored_prompt_is_pinned_as_itself() -> None:
    parts = ["-m", "./narrator", "-s", "@story.txt", "--tools", "tools.json"]
    ok("generate", *parts, "--save", "--max-tokens", "1", "I open the door")
    (long,) = json.loads(ok("ls", "--json").stdout)

    first = sync()

    assert first["story"] == ("pin", "stored, but not pinned")
    built = json.loads(ok("build", *parts, "--json").stdout)
    assert pins()["story"] == built["key"] != long["key"]
    assert built["cached_tokens"] == built["num_tokens"] < long["num_tokens"]
    ok("rm", "-y", long["key"])
    ok("prune", "--max-size", "0", "-y")
    assert actions("--check")["story"] == "keep"


def test_sync_runs_from_any_directory(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("sync")
    monkeypatch.chdir(tmp_path)

    assert actions("project/promptcache.toml", "--check") == KEPT
    assert actions(project / "promptcache.toml") == KEPT
    (project / "link.toml").symlink_to(project / "promptcache.toml")
    assert actions(project / "link.toml") == KEPT


# Names


def rename(project: Path, before: str, after: str) -> None:
    change(project / "promptcache.toml", f"[prompts.{before}]", f"[prompts.{after}]")


def test_prompt_gets_its_new_name_and_loses_the_old_one(project: Path) -> None:
    ok("sync")
    keys = pins()
    rename(project, "story", "tale")

    assert actions() == {"tale": "pin", "manual": "keep"}

    assert pins() == {"tale": keys["story"], "manual": keys["manual"]}


@pytest.mark.parametrize("file", ["promptcache.toml", "second.toml"])
def test_prompts_of_the_same_content_are_kept_both(file: str, project: Path) -> None:
    with (project / file).open("a") as manifest:
        table = '[prompts.again]\nmodel = "./other"\nfiles = ["manual.txt"]\n'
        manifest.write(table)

    ok("sync")
    ok("sync", file)

    assert invoke("sync", "--check").exit_code == 0
    assert invoke("sync", file, "--check").exit_code == 0


def test_name_given_by_hand_to_the_same_prefix_stays(project: Path) -> None:
    ok("sync")
    ok("pin", pins()["story"], "hand")

    ok("sync")

    assert "hand" in pins()


@pytest.mark.parametrize(
    ("tools", "reason"),
    [([ROLL, LOOK, WALK], "walk added"), ([ROLL], "look removed")],
)
def test_changed_list_of_tools_is_the_reason(
    tools: list[Any], reason: str, project: Path
) -> None:
    ok("sync")
    (project / "tools.json").write_text(json.dumps(tools))

    assert sync("--check", code=1)["story"][1] == f"other tools: {reason}"


# Doing nothing


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(("option", "code"), [("--check", 1), ("-n", 0)])
def test_plan_of_a_first_sync_changes_nothing(
    option: str, code: int, tmp_path: Path
) -> None:
    assert actions(option, code=code) == {"story": "build", "manual": "build"}

    assert not (tmp_path / "store").exists()


# Errors


@pytest.mark.parametrize(
    ("before", "after", "code", "words"),
    [
        ("@story.txt", "@lost.txt", 2, ("prompts.story.system", "lost.txt")),
        ("manual.txt", "lost.txt", 2, ("prompts.manual.files", "lost.txt")),
        ("./other", "./lost", 1, ("prompts.manual", "lost", "no such folder")),
        ("system =", "sistem =", 2, ("prompts.story.sistem", "'system'")),
    ],
)
def test_error_is_one_line_with_the_file_and_the_key(
    before: str, after: str, code: int, words: tuple[str, ...], project: Path
) -> None:
    change(project / "promptcache.toml", before, after)

    for option in ("--check", "--quiet"):
        assert_fails(invoke("sync", option), code, "promptcache.toml", *words)
    assert pins() == {}


def test_template_that_refuses_is_told_with_the_prompt(project: Path) -> None:
    refusing = "{{ raise_exception('no tools here') }}"
    tiny.save_tokenizer(project / "narrator", refusing)

    result = invoke("sync")

    words = ("promptcache.toml", "prompts.story", "no tools here")
    assert_fails(result, 2, *words)


@pytest.mark.usefixtures("project")
def test_manifest_that_is_not_there_is_named() -> None:
    assert_fails(invoke("sync", "lost.toml"), 2, "lost.toml", "No such file")


def test_volatile_text_is_warned_of_where_it_is_built(project: Path) -> None:
    change(project / "story.txt", "always.", "always. Today is 2026-11-23.")

    first, second = ok("sync", "-q"), ok("sync", "-q")

    assert first.stderr.count("promptcache: warning: date '2026-11-23'") == 1
    assert second.stderr == ""


# What one sync settles


def write(project: Path, **prompts: str) -> None:
    """Write a manifest of prompts with these system prompts."""
    tables = (
        f'[prompts.{name}]\nmodel = "./other"\nsystem = "{system}"\n'
        for name, system in prompts.items()
    )
    (project / "promptcache.toml").write_text("".join(tables))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": "One"}, {"a": "Two", "b": "One"}),
        ({"a": "One", "b": "Two"}, {"a": "Two", "b": "One"}),
        ({"a": "One"}, {"b": "Two", "a": "One"}),
        ({"a": "One", "b": "Two"}, {"b": "One"}),
    ],
    ids=str,
)
def test_one_sync_gives_every_name_its_prompt(
    before: dict[str, str], after: dict[str, str], project: Path
) -> None:
    write(project, **before)
    ok("sync")
    keys = {system: pins()[name] for name, system in before.items()}
    write(project, **after)

    ok("sync")

    assert actions("--check") == dict.fromkeys(after, "keep")
    assert set(pins()) == set(after)
    for name, system in after.items():
        assert pins()[name] == keys.get(system, pins()[name])


def test_other_text_and_no_pin_at_once_take_the_old_pin_away(project: Path) -> None:
    write(project, a="One")
    ok("sync")
    write(project, a="Two")
    with (project / "promptcache.toml").open("a") as manifest:
        manifest.write("pin = false\n")

    ok("sync")

    assert pins() == {}
    assert invoke("sync", "--check").exit_code == 0
