"""Whatever is in a store, `verify --fix` ends with one that works."""

import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from promptcache import PrefixStore
from promptcache.errors import DamagedIndexError, StoreError
from promptcache.store.reports import PrunePolicy
from promptcache_cli.main import cli
from tests.helpers.forging import ODD, PROMPT, copied, forge, fuzz, watched
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import (
    TINY,
    blob_paths,
    check_match,
    save,
    tokens,
    tree_hash,
)


def run(folder: Path, *arguments: str) -> str:
    """Run a command, which must not end in a traceback."""
    command = [*arguments, "--store", str(folder)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    # The layouts of these blobs are none that can be shown.
    assert result.exit_code == 0 or "layout cannot be read" in result.output
    return result.output


def check_mended(folder: Path, outside: Path) -> None:
    """Mend a store, and assert that all that can be done to one can be done to it."""
    before = tree_hash(outside)
    with watched():
        run(folder, "verify", "--fix")
        run(folder, "prune", "--yes")
        assert not list((folder / "quarantine").iterdir())
        check_invariants(folder)
        run(folder, "ls", "--json")
        run(folder, "stats")
        with PrefixStore(folder) as store:
            assert store.verify().is_sound
            for prefix in store.prefixes()[:1]:
                run(folder, "show", prefix.key)
            key = save(store, PROMPT)
            check_match(store, store.lookup(PROMPT, TINY), PROMPT)
            store.pin(key, "new name")
            store.execute(store.plan_prune(PrunePolicy(max_nbytes=0)))
            assert [prefix.key for prefix in store.prefixes()] == [key]
        check_invariants(folder)
    assert tree_hash(outside) == before


def put_folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "inner").mkdir()
    (path / "inner" / "file").write_text("x")


def put_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def put_link_to_file(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "precious")


def put_dangling_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nothing")


def put_pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path, outside: Path) -> None:
    before = os.getcwd()
    # Its whole path would be too long.
    os.chdir(path.parent)
    try:
        with closing(socket.socket(socket.AF_UNIX)) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)
    path.chmod(0o600)


def put_file(path: Path, outside: Path) -> None:
    path.write_text("x")
    path.chmod(0o600)


KINDS = (put_folder, put_link, put_link_to_file, put_dangling_link, put_pipe)
FILES = (
    *("index.db", "index.db-wal", "index.db-shm", "index.db-journal"),
    *("prefixes.json", "CACHEDIR.TAG", "secret", "blob"),
)


def place(folder: Path, name: str) -> Path:
    if name in ("blob", "shelf"):
        blob = max(folder.glob("blobs/*/*.safetensors"))
        return blob if name == "blob" else blob.parent
    return folder / name


def put(put_it: Callable[[Path, Path], None], path: Path, outside: Path) -> None:
    """Put something in the place of what is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    before = os.umask(0o077)
    try:
        put_it(path, outside)
    finally:
        os.umask(before)


@pytest.mark.parametrize("put_it", [*KINDS, put_socket])
def test_whatever_is_in_the_place_of_a_file_is_mended(
    filled: Path, put_it: Callable[[Path, Path], None]
) -> None:
    with copied(filled) as (folder, outside):
        for name in FILES:
            put(put_it, place(folder, name), outside)

        check_mended(folder, outside)


@pytest.mark.parametrize("names", [["shelf"], ["blobs", "tmp", "quarantine"]])
@pytest.mark.parametrize("put_it", [put_link, put_pipe, put_file])
def test_whatever_is_in_the_place_of_a_folder_is_mended(
    filled: Path, put_it: Callable[[Path, Path], None], names: list[str]
) -> None:
    with copied(filled) as (folder, outside):
        for name in names:
            put(put_it, place(folder, name), outside)

        check_mended(folder, outside)


@pytest.mark.parametrize("put_it", [put_folder, put_link_to_file, put_pipe])
@pytest.mark.parametrize("name", FILES)
def test_whatever_is_in_the_place_of_a_file_harms_nothing(
    filled: Path, put_it: Callable[[Path, Path], None], name: str
) -> None:
    with copied(filled) as (folder, outside):
        put(put_it, place(folder, name), outside)
        before = tree_hash(outside)

        with watched():
            try:
                store = PrefixStore(folder)
            except StoreError:
                assert tree_hash(outside) == before
                return
            with store:
                save(store, [8, *tokens(40)])
        assert tree_hash(outside) == before


def test_folder_in_the_place_of_a_blob_is_damage(store: PrefixStore) -> None:
    key = save(store, tokens(70))
    [path] = blob_paths(store)
    put(put_folder, path, path)

    assert [d.reason for d in store.verify().damaged] == ["blob is a folder"]
    assert [d.key for d in store.verify(fix=True).damaged] == [key]
    assert (store.path / "quarantine" / path.name / "inner" / "file").exists()

    store.execute(store.plan_prune(PrunePolicy()))
    assert not list((store.path / "quarantine").iterdir())
    assert save(store, tokens(70)) == key


def test_folder_that_no_row_knows_is_pruned(store: PrefixStore) -> None:
    path = store.path / "blobs" / "ab" / f"{'ab' * 16}.safetensors"
    path.parent.mkdir()
    put_folder(path, path)

    store.execute(store.plan_prune(PrunePolicy()))

    assert not path.exists()


ENTRY = {"key": "a" * 32, "segment_key": "b" * 32, "num_tokens": 3, "name": "n"}
LISTS = (
    *("[" * 100_000, '{"a":' * 100_000, "{}", "7", "null", "NaN", '"text"', "[[]]"),
    *("[NaN]", "[1e999, null]", f"[{'9' * 5000}]", "\x00", "\udcff"),
)


def entries(filled: Path, changes: dict[str, object]) -> str:
    """Return the list of a store with other values in each entry."""
    listed = json.loads((filled / "prefixes.json").read_text())
    return json.dumps([{**entry, **changes} for entry in listed] + [ENTRY])


CHANGES: list[dict[str, object]] = [
    *[{"name": value} for value in ([], {}, 7, "", "\ud800", "a\nb", True)],
    *[{"num_tokens": value} for value in (None, "3", -1, 0, 2**70, 1.5, True, [])],
    *[{"key": value} for value in (None, [], {}, 7, "\ud800")],
    *[{"segment_key": value} for value in (None, [], {}, 7, "\ud800")],
    *[{"manifest": value} for value in ([], 7, "\ud800")],
    {"other": 1},
]


def check_list(filled: Path, text: str) -> None:
    with copied(filled) as (folder, _):
        (folder / "prefixes.json").write_bytes(text.encode(errors="surrogateescape"))
        (folder / "index.db").unlink()

        with PrefixStore(folder) as store:
            assert store.rebuilt == 5
            assert store.lookup(PROMPT, TINY).cached_tokens == len(PROMPT)
            store.pin(store.segments.key_of(PROMPT, TINY), "again")
        check_invariants(folder)


@pytest.mark.parametrize("text", LISTS)
def test_list_of_names_may_be_any_json(filled: Path, text: str) -> None:
    check_list(filled, text)


@pytest.mark.parametrize("changes", CHANGES)
def test_list_of_names_may_have_any_values(
    filled: Path, changes: dict[str, object]
) -> None:
    check_list(filled, entries(filled, changes))


def test_list_of_names_that_is_endless_is_not_read(filled: Path) -> None:
    with copied(filled) as (folder, _):
        os.truncate(folder / "prefixes.json", 2**40)
        (folder / "index.db").unlink()

        with watched(), PrefixStore(folder) as store:
            assert store.rebuilt == 5


TIMES = {"prefixes": ("created_at", "used_at"), "segments": ("created_at", "used_at")}


@pytest.mark.parametrize("time", [-1, 1e12, "9e999"])
def test_absurd_times_are_damage(filled: Path, time: object) -> None:
    with copied(filled) as (folder, outside):
        with closing(sqlite3.connect(folder / "index.db")) as connection:
            for table, columns in TIMES.items():
                values = ", ".join(f"{column} = {time}" for column in columns)
                connection.execute(f"UPDATE {table} SET {values}")
            connection.execute(f"UPDATE evictions SET removed_at = {time}")
            connection.commit()

        with PrefixStore(folder) as store, pytest.raises(DamagedIndexError):
            store.prefixes()
        check_mended(folder, outside)


@fuzz(5)
@given(data=st.data())
def test_any_values_in_the_index_are_mended(filled: Path, data: st.DataObject) -> None:
    with copied(filled) as (folder, outside):
        with closing(sqlite3.connect(folder / "index.db")) as connection:
            for _ in range(data.draw(st.integers(1, 4))):
                forge(connection, data)
            connection.commit()

        check_mended(folder, outside)


@fuzz(3)
@given(text=ODD)
def test_odd_list_of_names_is_mended(filled: Path, text: str) -> None:
    with copied(filled) as (folder, outside):
        (folder / "prefixes.json").write_text(f"[{{{json.dumps(text)}: {text}}}]")

        check_mended(folder, outside)


CONTRADICTIONS = (
    "UPDATE segments SET priority = 2 - priority",
    "UPDATE segments SET nbytes = nbytes + 1",
    "UPDATE segments SET first_token = first_token + 1",
    "UPDATE segments SET sliceable = 1 - sliceable",
    "DELETE FROM blocks",
    "UPDATE blocks SET segment_id = 99",
    "UPDATE prefixes SET num_tokens = num_tokens - 1",
    "UPDATE prefixes SET segment_id = 99",
    "UPDATE fingerprints SET namespace = 'another'",
    "INSERT OR REPLACE INTO clock (id, noted_at) VALUES (0, NULL)",
)


@pytest.mark.parametrize("sql", CONTRADICTIONS)
def test_index_that_contradicts_the_blobs_is_rebuilt(filled: Path, sql: str) -> None:
    with copied(filled) as (folder, _):
        with closing(sqlite3.connect(folder / "index.db")) as connection:
            connection.execute(sql)
            connection.commit()

        with PrefixStore(folder) as store:
            assert store.verify().rebuilt == 5
            assert [pin.name for pin in store.pins()] == ["name"]
        check_invariants(folder)
