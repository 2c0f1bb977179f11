"""`promptcache ls`, `show`, `rm`, `pin`, `unpin`, `prune` and `verify`."""

import json
import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from promptcache import PrefixStore
from tests.helpers import segments
from tests.helpers.commands import assert_fails, invoke, ok, tree_hash

LS_FIELDS = {
    "key": str,
    "name": (str, type(None)),
    "model": str,
    "num_tokens": int,
    "nbytes": int,
    "created_at": str,
    "used_at": str,
    "hits": int,
    "pinned": bool,
    "namespace": str,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The folder of the store that commands use."""
    return tmp_path / "store"


@pytest.fixture
def keys(path: Path) -> list[str]:
    """Two prefixes of one model, one built on the other, and one of another."""
    with PrefixStore(path) as store:
        first = segments.save(store, segments.tokens(40))
        second = segments.save(store, segments.tokens(100), width=50)
        other = segments.save(
            store, segments.tokens(10, first=500), segments.fingerprint("other")
        )
    return [first, second, other]


def listed() -> dict[str, Any]:
    """Return what `ls --json` tells by key."""
    return {prefix["key"]: prefix for prefix in json.loads(ok("ls", "--json").stdout)}


def blob(path: Path, key: str) -> Path:
    return path / "blobs" / key[:2] / f"{key}.safetensors"


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


# ls


def test_empty_store_lists_nothing(store: PrefixStore) -> None:
    result = ok("ls")

    assert result.stdout == ""
    assert re.fullmatch(r"0 prefixes, .* of 10\.0 GB used\n", result.stderr)


def test_empty_store_is_an_empty_list(store: PrefixStore) -> None:
    assert ok("ls", "--json").stdout == "[]\n"


def test_ls_json_has_its_fields(keys: list[str]) -> None:
    prefixes = listed()

    assert sorted(prefixes) == sorted(keys)
    for prefix in prefixes.values():
        assert list(prefix) == list(LS_FIELDS)
        for name, kind in LS_FIELDS.items():
            assert isinstance(prefix[name], kind), name
    assert [prefixes[key]["num_tokens"] for key in keys] == [40, 100, 10]
    assert [prefixes[key]["model"] for key in keys] == ["tiny", "tiny", "other"]


def test_nbytes_is_what_removing_would_free(keys: list[str], path: Path) -> None:
    first, second, other = keys
    prefixes = listed()

    assert prefixes[first]["nbytes"] == 0
    assert prefixes[second]["nbytes"] == blob(path, second).stat().st_size
    assert prefixes[other]["nbytes"] == blob(path, other).stat().st_size


def test_ls_prints_a_table(keys: list[str]) -> None:
    ok("pin", keys[0], "first")

    result = ok("ls")

    header, *rows = result.stdout.splitlines()
    assert header.split() == ["KEY", "NAME", "MODEL", "TOKENS", "SIZE", "HITS", "USED"]
    assert len(rows) == 3
    row = next(row for row in rows if row.startswith(keys[0][:12]))
    assert row.split()[1:4] == ["first", "tiny", "40"]
    assert re.fullmatch(r"3 prefixes, .* of 10\.0 GB used\n", result.stderr)


def test_quiet_ls_prints_the_keys(keys: list[str]) -> None:
    result = ok("ls", "-q")

    assert sorted(result.stdout.split()) == sorted(keys)
    assert result.stderr == ""


def test_ls_does_not_wait_for_a_writer(keys: list[str], path: Path) -> None:
    writer = sqlite3.connect(path / "index.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    started = time.monotonic()

    result = ok("ls", "-q")

    writer.rollback()
    writer.close()
    assert sorted(result.stdout.split()) == sorted(keys)
    assert time.monotonic() - started < 5


# show


def test_show_tells_the_text_and_the_segments(model_dir: Path) -> None:
    key = ok("build", "-m", model_dir, "-s", "You narrate.", "--name", "n").stdout

    result = ok("show", "n")

    assert f"key      {key}" in result.stdout
    assert "[0, 15)" in result.stdout
    assert "2 × KVCache" in result.stdout
    assert result.stdout.endswith("\n<|system|>You narrate.<|end|><|user|>\n")
    assert result.stderr == ""


def test_show_json_holds_the_fields_of_ls(model_dir: Path) -> None:
    key = ok("build", "-m", model_dir, "-s", "You narrate.").stdout.strip()

    shown = json.loads(ok("show", key[:6], "--json").stdout)

    assert {name: shown[name] for name in LS_FIELDS} == listed()[key]
    assert shown["text"] == "<|system|>You narrate.<|end|><|user|>"
    assert shown["source"] == str(model_dir)
    assert [(s["start"], s["end"]) for s in shown["segments"]] == [(0, 15)]
    assert isinstance(shown["segments"][0]["nbytes"], int)


def test_show_without_the_tokenizer_is_a_warning(model_dir: Path, path: Path) -> None:
    key = ok("build", "-m", model_dir, "Hello").stdout.strip()
    hidden = model_dir.with_name("hidden")
    model_dir.rename(hidden)

    try:
        result = ok("show", key)
    finally:
        hidden.rename(model_dir)

    assert f"key      {key}" in result.stdout
    assert re.fullmatch(r"promptcache: warning: no text to show.*\n", result.stderr)


def test_show_of_a_damaged_prefix_fails(model_dir: Path, path: Path) -> None:
    key = ok("build", "-m", model_dir, "Hello").stdout.strip()
    blob(path, key).unlink()

    assert_fails(invoke("show", key), 1, "missing")


# rm


def test_rm_removes_and_prints_the_key(keys: list[str], path: Path) -> None:
    result = ok("rm", keys[2][:8])

    assert result.stdout == f"{keys[2]}\n"
    assert re.fullmatch(r"Removed 1, freed .*\n", result.stderr)
    assert sorted(listed()) == sorted(keys[:2])
    assert not blob(path, keys[2]).exists()


def test_rm_keeps_what_others_share(keys: list[str], path: Path) -> None:
    ok("rm", keys[1])

    assert blob(path, keys[0]).exists()
    assert not blob(path, keys[1]).exists()


def test_rm_takes_several_names_and_keys(keys: list[str]) -> None:
    ok("pin", keys[0], "first")

    ok("rm", "-q", "first", keys[1], keys[2], keys[2])

    assert listed() == {}


def test_quiet_rm_prints_the_keys_only(keys: list[str]) -> None:
    result = ok("rm", "-q", "-y", keys[1])

    assert (result.stdout, result.stderr) == (f"{keys[1]}\n", "")


def test_rm_json_tells_what_was_freed(keys: list[str]) -> None:
    nbytes = listed()[keys[1]]["nbytes"]

    report = json.loads(ok("rm", "--json", keys[1]).stdout)

    assert report["removed"] == [
        {"key": keys[1], "reason": "asked for", "nbytes": nbytes}
    ]
    assert report["freed_nbytes"] == nbytes
    assert report["dry_run"] is False


def test_dry_rm_changes_nothing(keys: list[str], path: Path) -> None:
    before = tree_hash(path)

    result = ok("rm", "-n", keys[1])

    assert result.stdout == f"{keys[1]}\n"
    assert tree_hash(path) == before


def test_dry_rm_tells_what_it_would_free(keys: list[str]) -> None:
    nbytes = listed()[keys[1]]["nbytes"]

    report = json.loads(ok("rm", "--dry-run", "--json", keys[1]).stdout)

    assert report["dry_run"] is True
    assert report["removed"][0]["nbytes"] == nbytes
    assert report["freed_nbytes"] == nbytes


def test_one_unknown_key_removes_nothing(keys: list[str], path: Path) -> None:
    before = tree_hash(path)

    assert_fails(invoke("rm", keys[0], "nosuch"), 1, "nosuch")

    assert tree_hash(path) == before


@pytest.mark.parametrize("command", [["rm"], ["show"], ["pin"]], ids=" ".join)
def test_ambiguous_key_is_one_line(path: Path, command: list[str]) -> None:
    with PrefixStore(path) as store:
        keys = [segments.save(store, segments.tokens(3, first=i)) for i in range(20)]
    starts = [key[0] for key in keys]
    ambiguous = next(start for start in starts if starts.count(start) > 1)
    args = [*command, ambiguous, *(["name"] if command == ["pin"] else [])]

    assert_fails(invoke(*args), 1, "ambiguous")


# pin and unpin


def test_pin_names_a_prefix(keys: list[str]) -> None:
    result = ok("pin", keys[0][:10], "first")

    assert result.stdout == ""
    assert result.stderr == f"Pinned {keys[0][:12]} as first\n"
    assert (listed()[keys[0]]["name"], listed()[keys[0]]["pinned"]) == ("first", True)


def test_pin_json_shows_the_prefix(keys: list[str]) -> None:
    shown = json.loads(ok("pin", keys[0], "first", "--json").stdout)

    assert shown == listed()[keys[0]]


def test_name_moves_to_the_prefix_pinned_last(keys: list[str]) -> None:
    ok("pin", "-q", keys[0], "name")

    ok("pin", "-q", keys[1], "name")

    assert [listed()[key]["name"] for key in keys] == [None, "name", None]


def test_unpin_takes_the_name_away(keys: list[str]) -> None:
    ok("pin", keys[0], "first")

    result = ok("unpin", "first")

    assert (result.stdout, result.stderr) == ("", f"Unpinned {keys[0][:12]}\n")
    assert listed()[keys[0]]["pinned"] is False


@pytest.mark.parametrize("name", ["", "  ", "two\nlines"])
def test_what_cannot_be_a_name_is_refused(keys: list[str], name: str) -> None:
    assert_fails(invoke("pin", keys[0], name), 2, "name")


# prune


def test_prune_with_nothing_to_do_says_so(keys: list[str], path: Path) -> None:
    result = ok("prune")

    assert result.stdout == ""
    assert result.stderr.startswith("Nothing to do")
    assert sorted(listed()) == sorted(keys)


def test_prune_to_a_size_tells_the_reasons(keys: list[str]) -> None:
    result = ok("prune", "--max-size", "0")

    header, *rows = result.stdout.splitlines()
    assert header.split() == ["WHAT", "SIZE", "REASON"]
    assert sorted(row[:12] for row in rows) == sorted(key[:12] for key in keys)
    assert all(row.endswith("over the size limit of 0 B") for row in rows)
    assert listed() == {}


def test_prune_json_has_its_fields(keys: list[str], path: Path) -> None:
    (path / "tmp" / "left.safetensors").write_bytes(b"x" * 10)
    nbytes = {key: blob(path, key).stat().st_size for key in keys}

    report = json.loads(ok("prune", "--model", "other", "--json").stdout)

    assert list(report) == [
        "removed",
        "garbage",
        "foreign",
        "freed_nbytes",
        "kept_nbytes",
        "dry_run",
    ]
    assert report["removed"] == [
        {
            "key": keys[2],
            "reason": "of model other",
            "nbytes": nbytes[keys[2]],
            "cut_at": None,
        }
    ]
    assert report["garbage"] == [{"path": "tmp/left.safetensors", "nbytes": 10}]
    assert report["freed_nbytes"] == nbytes[keys[2]] + 10
    # SQLite's files beside the index go when the command ends.
    files = [file for file in path.rglob("*") if file.is_file()]
    assert report["kept_nbytes"] >= sum(file.stat().st_size for file in files) > 0
    assert report["dry_run"] is False


@pytest.mark.parametrize(
    "options",
    [["--max-size", "0"], ["--older-than", "0s"], ["--model", "tiny"]],
    ids=" ".join,
)
@pytest.mark.parametrize("flag", ["-n", "--dry-run"])
def test_dry_prune_changes_nothing_and_shows_the_same(
    keys: list[str], path: Path, options: list[str], flag: str
) -> None:
    (path / "tmp" / "left.safetensors").write_bytes(b"x" * 10)
    before = tree_hash(path)

    dry = json.loads(ok("prune", flag, "--json", *options).stdout)
    assert tree_hash(path) == before
    done = json.loads(ok("prune", "--json", *options).stdout)

    assert dry["dry_run"] is True
    for name in ("removed", "garbage", "freed_nbytes"):
        assert dry[name] == done[name]
    assert tree_hash(path) != before


def test_prune_by_age_keeps_what_is_young(keys: list[str]) -> None:
    ok("prune", "--older-than", "1h")

    assert sorted(listed()) == sorted(keys)


def test_prune_keeps_pins_and_says_that_the_limit_is_not_met(keys: list[str]) -> None:
    ok("pin", keys[1], "second")

    result = ok("prune", "--max-size", "0")

    assert sorted(listed()) == sorted(keys[:2])
    warnings = [w for w in result.stderr.splitlines() if "warning" in w]
    assert len(warnings) == 1
    assert "pinned" in warnings[0]


def test_quiet_prune_says_nothing(keys: list[str]) -> None:
    result = ok("prune", "-q", "-y", "--model", "other")

    assert result.stderr == ""
    assert keys[2][:12] in result.stdout


# verify


def test_sound_store_has_nothing_to_tell(keys: list[str]) -> None:
    result = ok("verify")

    assert result.stdout == ""
    assert result.stderr.startswith("3 blobs checked, 0 damaged")


def test_verify_json_has_its_fields(keys: list[str]) -> None:
    report = json.loads(ok("verify", "--json").stdout)

    expected = {"checked": 3, "damaged": [], "orphans": 0, "missing": 0, "rebuilt": 0}
    assert {name: report[name] for name in expected} == expected


def test_damage_is_told_and_exits_with_1(keys: list[str], path: Path) -> None:
    flip(blob(path, keys[2]))
    blob(path, keys[1]).unlink()

    result = invoke("verify")

    assert result.exit_code == 1
    rows = result.stdout.splitlines()[1:]
    assert len(rows) == 2
    assert any(keys[2] in row and "checksum" in row for row in rows)
    assert any(keys[1] in row and "missing" in row for row in rows)
    assert "--fix" in result.stderr


def test_damage_in_json_names_key_and_reason(keys: list[str], path: Path) -> None:
    flip(blob(path, keys[2]))

    result = invoke("verify", "--json")

    assert result.exit_code == 1
    (damage,) = json.loads(result.stdout)["damaged"]
    assert sorted(damage) == ["key", "reason"]
    assert damage["key"] == keys[2]


def test_fix_takes_damage_out(keys: list[str], path: Path) -> None:
    flip(blob(path, keys[2]))

    assert invoke("verify", "--fix").exit_code == 0

    assert sorted(listed()) == sorted(keys[:2])
    assert json.loads(ok("verify", "--json").stdout)["damaged"] == []


def test_lost_index_is_rebuilt(keys: list[str], path: Path) -> None:
    before = {key: prefix["num_tokens"] for key, prefix in listed().items()}
    (path / "index.db").unlink()

    report = json.loads(ok("verify", "--json").stdout)

    assert report["rebuilt"] == 3
    assert {k: p["num_tokens"] for k, p in listed().items()} == before


def test_lost_index_is_one_warning_of_ls(keys: list[str], path: Path) -> None:
    os.truncate(path / "index.db", 100)

    result = ok("ls", "-q")

    assert sorted(result.stdout.split()) == sorted(keys)
    assert re.fullmatch(r"promptcache: warning: the index .*\n", result.stderr)


def test_old_prefixes_show_their_age(path: Path) -> None:
    with PrefixStore(path) as store:
        key = segments.save(store, segments.tokens(10))
        match = store.lookup(segments.tokens(11), segments.TINY)
        store.usage_log.touch(match)

    (prefix,) = listed().values()

    assert (prefix["key"], prefix["hits"]) == (key, 1)
    assert prefix["used_at"] >= prefix["created_at"]
    assert time.strftime("%Y") in prefix["used_at"]


def test_rm_counts_a_prefix_once_that_is_named_twice(keys: list[str]) -> None:
    nbytes = listed()[keys[1]]["nbytes"]

    report = json.loads(ok("rm", "--json", keys[1], keys[1][:12]).stdout)

    assert [r["key"] for r in report["removed"]] == [keys[1]]
    assert report["freed_nbytes"] == nbytes
