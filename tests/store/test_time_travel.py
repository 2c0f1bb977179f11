"""Stores of earlier versions stay readable, and those of later ones untouched.

`formats/` has a store of each format of blobs, packed, the last one without its index.
Format 4 is the first that was released; what came before is a miss that `prune` sweeps.
"""

import os
import sqlite3
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from promptcache.errors import StoreFormatError
from promptcache.segments.blob_format import FORMAT_VERSION
from promptcache.store import PrefixStore
from promptcache.store.index import SCHEMA_VERSION
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants
from tests.helpers.metadata import change_metadata
from tests.helpers.segments import (
    TINY,
    blob_paths,
    check_match,
    expected_key,
    save,
    tokens,
    tree_hash,
)

FORMATS = Path(__file__).parent / "formats"
RELEASED = range(4, FORMAT_VERSION + 1)
OLDER = range(1, 4)
# What every one of these stores holds; the last needs its checkpoint, which formats
# have from 2 on.
PROMPTS = [tokens(70), [*tokens(40), *tokens(30, first=900)], [7, *tokens(45)]]

Unpack = Callable[[int], Path]


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """Return a function that gives a store of a format."""

    def unpacked(number: int) -> Path:
        folder = tmp_path / "store"
        folder.mkdir(mode=0o700)
        with tarfile.open(FORMATS / f"format-{number}.tar.xz") as archive:
            archive.extractall(folder, filter="fully_trusted")
        for parent, _, names in os.walk(folder):
            os.chown(parent, os.geteuid(), os.getegid())
            for name in names:
                os.chown(Path(parent, name), os.geteuid(), os.getegid())
        if not (folder / "index.db").exists():
            PrefixStore(folder).close()
        return folder

    return unpacked


def check_all(store: PrefixStore) -> None:
    for prompt in PROMPTS:
        match = store.lookup(prompt, TINY)
        assert match.cached_tokens == len(prompt)
        check_match(store, match, prompt)
    assert [entry.name for entry in store.pins()] == ["name"]
    assert store.verify().is_sound
    check_invariants(store)


def test_every_format_has_a_store_here() -> None:
    assert {path.name for path in FORMATS.iterdir()} == {
        f"format-{number}.tar.xz" for number in [*OLDER, *RELEASED]
    }


@pytest.mark.parametrize("number", RELEASED)
def test_store_of_a_released_format_is_read(unpack: Unpack, number: int) -> None:
    with PrefixStore(unpack(number)) as store:
        check_all(store)


@pytest.mark.parametrize("number", RELEASED)
def test_index_is_rebuilt_from_blobs_of_a_released_format(
    unpack: Unpack, number: int
) -> None:
    folder = unpack(number)
    (folder / "index.db").unlink()

    with PrefixStore(folder) as store:
        assert store.rebuilt == 5
        check_all(store)


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_index_of_an_older_schema_is_built_anew(unpack: Unpack, version: int) -> None:
    folder = unpack(FORMAT_VERSION)
    set_schema(folder, version)

    with PrefixStore(folder) as store:
        assert store.rebuilt == 5
        check_all(store)


@pytest.mark.parametrize("number", OLDER)
def test_older_format_is_a_miss_that_prune_sweeps(unpack: Unpack, number: int) -> None:
    with PrefixStore(unpack(number)) as store:
        assert len(blob_paths(store)) >= 2
        assert store.lookup(PROMPTS[0], TINY).cached_tokens == 0

        store.execute(store.plan_prune(PrunePolicy()))

        assert blob_paths(store) == []
        save(store, PROMPTS[0])
        check_invariants(store)


def set_schema(folder: Path, version: int) -> None:
    with closing(sqlite3.connect(folder / "index.db")) as connection:
        connection.execute(f"PRAGMA user_version={version}")
        connection.commit()


def test_store_of_a_newer_schema_is_refused_and_not_touched(unpack: Unpack) -> None:
    folder = unpack(FORMAT_VERSION)
    set_schema(folder, SCHEMA_VERSION + 1)
    before = tree_hash(folder)

    with pytest.raises(StoreFormatError, match="upgrade promptcache"):
        PrefixStore(folder)

    assert tree_hash(folder) == before


def test_blob_of_a_newer_format_is_a_miss_and_not_touched(unpack: Unpack) -> None:
    folder = unpack(FORMAT_VERSION)
    key = expected_key(TINY.digest, PROMPTS[0])
    path = folder / "blobs" / key[:2] / f"{key}.safetensors"
    change_metadata(path, format_version=str(FORMAT_VERSION + 1))
    before = path.read_bytes()

    with PrefixStore(folder) as store:
        (part,) = store.lookup(PROMPTS[0], TINY).slices
        with pytest.raises(StoreFormatError, match="upgrade promptcache"):
            store.segments.open_blob(part)
        assert store.verify(fix=True).damaged == ()
        store.execute(store.plan_prune(PrunePolicy()))

    assert path.read_bytes() == before
