"""An index that is lost or damaged is rebuilt from the blobs."""

import random
import shutil
from pathlib import Path

import pytest

from promptcache.errors import DamagedIndexError
from promptcache.store import PrefixStore
from promptcache.store.index import Index
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants, read_rows
from tests.helpers.metadata import change_metadata, make_older
from tests.helpers.segments import (
    TINY,
    blob_path,
    blob_paths,
    cached_tokens,
    expected_key,
    save,
    tokens,
)
from tests.helpers.stores import (
    STORED,
    TURNS,
    check_all_resumable,
    check_nothing_lost,
    checkpoint_key,
    found,
    set_version,
)


@pytest.mark.parametrize("leftover", [[], ["index.db-wal"], ["index.db-shm"]])
def test_deleted_index_is_rebuilt_with_nothing_lost(
    filled: PrefixStore, leftover: list[str]
) -> None:
    copies = {name: (filled.path / name).read_bytes() for name in leftover}
    num_segments = len(blob_paths(filled))
    filled.close()
    (filled.path / "index.db").unlink()
    for name, data in copies.items():
        (filled.path / name).write_bytes(data)
        (filled.path / name).chmod(0o600)

    with PrefixStore(filled.path) as store:
        assert store.rebuilt == num_segments
        check_nothing_lost(store)


@pytest.mark.parametrize("nbytes", [100, 4096, 200_000])
def test_index_of_random_bytes_is_rebuilt_with_nothing_lost(
    filled: PrefixStore, nbytes: int
) -> None:
    filled.close()
    (filled.path / "index.db").write_bytes(random.Random(nbytes).randbytes(nbytes))

    with PrefixStore(filled.path) as store:
        check_nothing_lost(store)
        assert store.verify().rebuilt == len(blob_paths(store))


@pytest.mark.parametrize("seed", range(5))
def test_verify_rebuilds_an_index_that_is_damaged_inside(
    filled: PrefixStore, seed: int
) -> None:
    filled.close()
    damage_pages(filled.path / "index.db", seed)

    with PrefixStore(filled.path) as store:
        report = store.verify()

        assert report.is_sound
        check_nothing_lost(store)


def damage_pages(path: Path, seed: int) -> None:
    """Overwrite all pages but the first with random bytes."""
    data = bytearray(path.read_bytes())
    data[4096:] = random.Random(seed).randbytes(len(data) - 4096)
    path.write_bytes(data)


def test_damage_inside_the_index_is_told_as_such(filled: PrefixStore) -> None:
    filled.close()
    damage_pages(filled.path / "index.db", 0)

    with (
        PrefixStore(filled.path) as store,
        pytest.raises(DamagedIndexError, match="run `promptcache verify`"),
    ):
        store.lookup(STORED[0], TINY)


def test_process_killed_before_it_rebuilt_the_index_loses_nothing(
    filled: PrefixStore,
) -> None:
    filled.close()
    (filled.path / "index.db").unlink()

    def die(index: Index) -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        Index(filled.path / "index.db", populate=die)

    with PrefixStore(filled.path) as store:
        check_nothing_lost(store)


def test_store_without_its_pins_file_keeps_everything_else(
    filled: PrefixStore,
) -> None:
    filled.close()
    (filled.path / "index.db").unlink()
    (filled.path / "prefixes.json").write_bytes(b"{garbage")

    with PrefixStore(filled.path) as store:
        assert [cached_tokens(store, p) for p in STORED] == [len(p) for p in STORED]


def test_orphan_of_a_wrong_key_is_not_adopted(filled: PrefixStore) -> None:
    key = expected_key(TINY.digest, STORED[2])
    shutil.copy(blob_path(filled, key), filled.path / "blobs" / key[:2] / "x")
    filled.close()
    path = blob_path(filled, key)
    data = path.read_bytes()
    position = data.index((500).to_bytes(4, "little"), 8)
    path.write_bytes(data[:position] + b"\x01" + data[position + 1 :])
    (filled.path / "index.db").unlink()

    with PrefixStore(filled.path) as store:
        assert cached_tokens(store, STORED[2]) == 90
        assert store.rebuilt == 4
        check_invariants(store)


def test_prefix_inside_a_segment_is_listed_again_with_a_lost_index(path: Path) -> None:
    with PrefixStore(path) as store:
        save(store, tokens(100))
        save(store, tokens(70))
        before = {prefix.key for prefix in store.prefixes()}
    (path / "index.db").unlink()

    with PrefixStore(path) as store:
        after = {prefix.key for prefix in store.prefixes()}

    assert len(before) == 2
    assert after == before


@pytest.mark.parametrize("damage", ["missing", "garbage", "old"])
def test_lost_index_is_rebuilt_with_its_checkpoints(
    resumable: PrefixStore, damage: str
) -> None:
    before = rows_without_ids(resumable)
    resumable.close()
    index = resumable.path / "index.db"
    if damage == "missing":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(random.Random(0).randbytes(50_000))
    else:
        set_version(index, 1)

    with PrefixStore(resumable.path) as store:
        assert store.rebuilt == len(before)
        assert rows_without_ids(store) == before
        check_all_resumable(store)


def rows_without_ids(store: PrefixStore) -> list[tuple[object, ...]]:
    """Return what the index says of each segment, whatever order they came in."""
    rows = read_rows(store.path)
    return sorted(
        (row.key, rows[row.parent_id].key if row.parent_id else "", *row[3:])
        for row in rows.values()
    )


def test_blob_of_an_older_format_is_not_found_and_prune_sweeps_it(
    filled: PrefixStore,
) -> None:
    key = expected_key(TINY.digest, STORED[2])
    make_older(blob_path(filled, key))
    filled.close()
    set_version(filled.path / "index.db", 1)

    with PrefixStore(filled.path) as store:
        assert store.rebuilt == 4
        assert cached_tokens(store, STORED[2]) == 90
        report = store.execute(store.plan_prune(PrunePolicy()))

        assert f"blobs/{key[:2]}/{key}.safetensors" in {g.path for g in report.garbage}
        assert not blob_path(store, key).exists()
        assert cached_tokens(store, STORED[1]) == 150
        check_invariants(store)


def test_orphaned_checkpoint_is_adopted_with_its_rows(resumable: PrefixStore) -> None:
    before = rows_without_ids(resumable)
    index = Index(resumable.path / "index.db")
    index.remove_subtree(expected_key(TINY.digest, TURNS[1]))
    index.database.close()

    report = resumable.verify()

    assert report.rebuilt == len(before)
    assert rows_without_ids(resumable) == before
    check_all_resumable(resumable)


def test_checkpoint_under_the_key_of_another_position_is_not_adopted(
    resumable: PrefixStore,
) -> None:
    path = blob_path(resumable, checkpoint_key(TURNS[1]))
    change_metadata(path, start="1099", end="1099")
    resumable.close()
    (resumable.path / "index.db").unlink()

    with PrefixStore(resumable.path) as store:
        assert found(store, TURNS[1]) == 700
        check_invariants(store)
