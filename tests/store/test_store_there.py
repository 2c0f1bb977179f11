"""Stores that are there, and stores that are not."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from promptcache import PrefixStore, StoreError, config
from tests.helpers import segments
from tests.helpers.commands import assert_fails, invoke, ok

READING = [
    ["ls"],
    ["show", "x"],
    ["stats"],
    ["explain", "Hello"],
    ["verify", "--fix"],
    ["prune"],
    ["rm", "x"],
    ["pin", "x", "y"],
    ["unpin", "x"],
]


@pytest.mark.parametrize("args", READING, ids=" ".join)
def test_commands_that_read_create_no_store(args: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    for name in ("nosuch", "nosuch/store", "empty"):
        path = tmp_path / name
        assert_fails(invoke(*args, "--store", path), 1, "there is no store", str(path))
    assert_fails(invoke(*args), 1, "there is no store", str(tmp_path / "store"))

    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.fixture
def default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the default store, which is not there yet."""
    monkeypatch.delenv("PROMPTCACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield config.default_store_dir()


@pytest.mark.parametrize("args", READING, ids=" ".join)
def test_default_store_that_is_still_to_come_is_empty(
    args: list[str], default: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(model_dir))

    result = invoke(*args)

    if args[0] in ("ls", "stats", "explain", "verify", "prune"):
        assert result.exit_code == 0
    else:
        assert_fails(result, 1, "promptcache ls")
    assert not default.exists()


def test_default_store_comes_with_the_first_save(
    default: Path, model_dir: Path
) -> None:
    assert ok("ls", "--json").stdout == "[]\n"

    ok("build", "-m", model_dir, "Hello")

    assert len(json.loads(ok("ls", "--json").stdout)) == 1
    assert default.is_dir()


@pytest.mark.parametrize("job", [["ls"], ["build", "Hello"]], ids=" ".join)
def test_link_to_a_store_that_is_not_there_says_so(
    job: list[str], tmp_path: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTCACHE_MODEL", str(model_dir))
    link, below = tmp_path / "link", tmp_path / "link" / "store"
    link.symlink_to("/nowhere/to/be/found")

    told = f"{link} is a link to /nowhere/to/be/found, which is not there"
    assert_fails(invoke(*job, "--store", link), 1, f"the store {told}")
    if job != ["ls"]:
        assert_fails(
            invoke(*job, "--store", below), 1, f"{below} cannot be found", told
        )
    with pytest.raises(StoreError, match="which is not there"):
        PrefixStore(link)


def test_link_to_a_store_leads_there(tmp_path: Path, store: PrefixStore) -> None:
    key = segments.save(store, segments.tokens(10))
    (tmp_path / "link").symlink_to(store.path)

    assert ok("ls", "-q", "--store", tmp_path / "link").stdout == f"{key}\n"


@pytest.mark.parametrize("flag", ["-n", "-y"])
def test_prune_of_a_model_that_is_not_there_names_those_that_are(
    store: PrefixStore, flag: str
) -> None:
    result = invoke("prune", "-m", "nosuch", flag)
    assert_fails(result, 1, "'nosuch'", "there are: none")
    segments.save(store, segments.tokens(10))
    segments.save(store, segments.tokens(10), segments.fingerprint("other"))

    result = invoke("prune", "-m", "nosuch", flag)

    assert_fails(result, 1, "no prefix is of model 'nosuch', there are: other, tiny")
    assert len(store.prefixes()) == 2


def test_git_ignores_a_store_in_its_work_tree(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        command = ["git", "-C", str(tmp_path), *args]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    with PrefixStore(tmp_path / "store") as store:
        segments.save(store, segments.tokens(10))

    assert git("status", "--porcelain", "--untracked-files=all") == ""


def test_a_store_among_other_files_leaves_them_to_git(tmp_path: Path) -> None:
    for name, content in (("notes.txt", "mine"), (".gitignore", "*.log\n")):
        folder = tmp_path / name.strip(".")
        folder.mkdir(mode=0o700)
        (folder / name).write_text(content)
        PrefixStore(folder).close()

        assert (folder / "CACHEDIR.TAG").exists()
        assert {p.read_text() for p in folder.glob("*") if p.name == name} == {content}
        assert (folder / ".gitignore").exists() == (name == ".gitignore")
