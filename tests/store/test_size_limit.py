"""The size of a store stays below its limit."""

from pathlib import Path

import pytest

from promptcache.errors import StoreFullError
from promptcache.store import PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import (
    TINY,
    blob_path,
    blob_paths,
    cached_tokens,
    files_nbytes,
    save,
    tokens,
    tree_hash,
)
from tests.helpers.stores import OTHER, base_nbytes, save_and_record


def test_limit_holds_after_every_save(path: Path, tmp_path: Path) -> None:
    limit = base_nbytes(tmp_path) + 60_000
    with PrefixStore(path, max_nbytes=limit) as store:
        for i in range(40):
            prompt = [i % 7, *tokens(20 + i)]
            save(store, prompt, OTHER if i % 2 else TINY, width=20)

            assert files_nbytes(path) <= limit
            assert store.total_nbytes() == files_nbytes(path)
            check_invariants(store)
        assert 0 < len(blob_paths(store)) < 40


def test_making_room_takes_next_to_none(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are deleted before blobs, and until then only add to the WAL."""
    with PrefixStore(path) as store:
        for i in range(100):
            save(store, [i, *tokens(20)], width=100)
    full = files_nbytes(path)
    seen = []
    remove = BlobFolder.remove

    def watched(blobs: BlobFolder, key: str) -> int:
        seen.append(files_nbytes(path))
        return remove(blobs, key)

    monkeypatch.setattr(BlobFolder, "remove", watched)
    with PrefixStore(path, max_nbytes=full + 50_000) as store:
        save(store, tokens(100), width=2000)

    assert len(seen) > 50
    assert max(seen) < full + 250_000


def test_save_that_fails_leaves_the_limit_as_it_was(path: Path, tmp_path: Path) -> None:
    """The blob's header and the rows need room too, which is known afterwards."""
    base = base_nbytes(tmp_path)
    outcomes = set()
    for extra in range(-5000, 60_000, 1500):
        limit = base + extra
        folder = path / str(extra)
        PrefixStore(folder).close()
        with PrefixStore(folder, max_nbytes=limit) as store:
            before = files_nbytes(folder)
            try:
                save(store, tokens(100))
                outcomes.add("saved")
            except StoreFullError:
                outcomes.add("full")
            assert files_nbytes(folder) <= max(limit, before)

    assert outcomes == {"saved", "full"}


def test_limit_counts_files_that_are_not_ours(path: Path, tmp_path: Path) -> None:
    with PrefixStore(path, max_nbytes=base_nbytes(tmp_path) + 60_000) as store:
        save(store, tokens(100))
        (path / "notes.txt").write_bytes(bytes(200_000))

        with pytest.raises(StoreFullError):
            save(store, tokens(100, first=1))


def test_garbage_goes_before_anything_is_evicted(path: Path, tmp_path: Path) -> None:
    limit = base_nbytes(tmp_path) + 60_000
    with PrefixStore(path, max_nbytes=limit) as store:
        save(store, tokens(100))
        (path / "tmp" / "unfinished").write_bytes(bytes(50_000))
        (path / "quarantine" / "bad").write_bytes(bytes(10_000))

        save(store, tokens(100, first=1))

        assert cached_tokens(store, tokens(100)) == 100
        assert cached_tokens(store, tokens(100, first=1)) == 100
        assert not list((path / "tmp").iterdir())
        assert files_nbytes(path) <= limit


def test_limit_holds_where_blobs_were_deleted_by_hand(
    path: Path, tmp_path: Path
) -> None:
    limit = base_nbytes(tmp_path) + 100_000
    with PrefixStore(path, max_nbytes=limit) as store:
        keys = [save(store, [i, *tokens(100)], width=20) for i in range(4)]
        for key in keys[:2]:
            blob_path(store, key).unlink()

        for i in range(10, 20):
            save(store, [i, *tokens(250)], width=30)
            assert files_nbytes(path) <= limit


def test_pins_that_leave_no_room_make_the_store_full_and_nothing_goes(
    path: Path, tmp_path: Path
) -> None:
    with PrefixStore(path, max_nbytes=base_nbytes(tmp_path) + 100_000) as store:
        store.pin(save(store, tokens(300), width=50), "big")
        save(store, [9, *tokens(50)])
        before = tree_hash(path / "blobs")

        with pytest.raises(StoreFullError, match=r"do not fit .* are pinned, unpin"):
            save(store, tokens(300, first=1), width=50)

        assert tree_hash(path / "blobs") == before
        assert len(store.prefixes()) == 2
        check_invariants(store)


def test_store_too_small_for_anything_says_so(path: Path) -> None:
    with (
        PrefixStore(path, max_nbytes=10) as store,
        pytest.raises(StoreFullError, match="raise it with --max-size"),
    ):
        save(store, tokens(100))

    assert blob_paths(store) == []


def test_least_recently_used_prefix_goes_first(path: Path, tmp_path: Path) -> None:
    with PrefixStore(path, max_nbytes=base_nbytes(tmp_path) + 150_000) as store:
        for i in range(3):
            save(store, [i, *tokens(300)], width=30)
        store.usage_log.touch(store.lookup([0, *tokens(300)], TINY))

        save(store, [3, *tokens(300)], width=30)

        assert [cached_tokens(store, [i, *tokens(300)]) for i in range(4)] == [
            301,
            0,
            301,
            301,
        ]


def test_save_never_evicts_what_it_continues(path: Path, tmp_path: Path) -> None:
    with PrefixStore(path, max_nbytes=base_nbytes(tmp_path) + 130_000) as store:
        save(store, tokens(300), width=30)
        save(store, [9, *tokens(250)], width=30)

        starts = save_and_record(store, tokens(600), width=30)

        assert starts == [300]
        assert cached_tokens(store, tokens(600)) == 600
        assert cached_tokens(store, [9, *tokens(250)]) == 0
