"""`verify` finds damage, sets it aside, and adopts orphans."""

import pytest

from promptcache.errors import StoreFormatError
from promptcache.segments.types import Match, SegmentSlice
from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants
from tests.helpers.metadata import make_newer
from tests.helpers.segments import (
    TINY,
    blob_nbytes,
    blob_path,
    blob_paths,
    cached_tokens,
    expected_key,
    flip,
    save,
    tokens,
    tree_hash,
)
from tests.helpers.stores import OTHER, STORED, check_nothing_lost, lose_rows


def test_sound_store_is_sound(filled: PrefixStore) -> None:
    before = tree_hash(filled.path)

    report = filled.verify()

    assert report.is_sound
    assert report.checked == len(blob_paths(filled)) == 5
    assert (report.damaged, report.missing, report.orphans) == ((), (), 0)
    assert (report.rebuilt, report.quarantined, report.fixed) == (0, (), False)
    assert tree_hash(filled.path) == before


def test_deleted_blob_is_missing_until_it_is_fixed(filled: PrefixStore) -> None:
    key = expected_key(TINY.digest, STORED[1])
    blob_path(filled, key).unlink()

    found = filled.verify()
    fixed = filled.verify(fix=True)
    after = filled.verify()

    assert (found.missing, found.is_sound) == ((key,), False)
    assert (fixed.missing, fixed.is_sound) == ((key,), True)
    assert (after.missing, after.is_sound) == ((), True)
    assert cached_tokens(filled, STORED[1]) == 100
    # It hung on the segment that is gone.
    assert cached_tokens(filled, STORED[3]) == 100
    assert cached_tokens(filled, STORED[2]) == len(STORED[2])
    check_invariants(filled)


def test_flipped_blob_is_damaged_until_it_is_set_aside(filled: PrefixStore) -> None:
    key = expected_key(TINY.digest, STORED[1])
    flip(blob_path(filled, key))

    found = filled.verify()
    fixed = filled.verify(fix=True)
    after = filled.verify()

    assert [d.key for d in found.damaged] == [d.key for d in fixed.damaged] == [key]
    assert "checksum of the data does not match" in found.damaged[0].reason
    assert (found.is_sound, found.quarantined) == (False, ())
    assert (fixed.is_sound, fixed.quarantined) == (True, ())
    assert (after.is_sound, after.damaged, after.quarantined) == (True, (), (key,))
    assert cached_tokens(filled, STORED[3]) == 100
    check_invariants(filled)


def test_damaged_root_takes_its_descendants_and_prune_sweeps_them(
    filled: PrefixStore,
) -> None:
    flip(blob_path(filled, expected_key(TINY.digest, STORED[0])))

    filled.verify(fix=True)
    filled.execute(filled.plan_prune(PrunePolicy()))

    assert [cached_tokens(filled, p) for p in STORED] == [0] * 4
    assert cached_tokens(filled, STORED[0], OTHER) == 100
    assert len(blob_paths(filled)) == 1
    assert not list((filled.path / "quarantine").iterdir())
    check_invariants(filled)


def test_segment_that_was_given_up_can_be_saved_again(filled: PrefixStore) -> None:
    key = expected_key(TINY.digest, STORED[1])
    flip(blob_path(filled, key))
    filled.segments.give_up(key)

    for prompt in STORED:
        save(filled, prompt)

    assert filled.verify().is_sound
    assert [cached_tokens(filled, p) for p in STORED] == [len(p) for p in STORED]
    check_invariants(filled)


def test_orphan_is_adopted_by_verify(filled: PrefixStore) -> None:
    lose_rows(filled)
    with PrefixStore(filled.path) as store:
        report = store.verify()

        assert (report.orphans, report.rebuilt, report.is_sound) == (2, 2, True)
        check_nothing_lost(store)


def test_orphan_is_swept_by_prune(filled: PrefixStore) -> None:
    lose_rows(filled)
    with PrefixStore(filled.path) as store:
        before = blob_nbytes(store)
        plan = store.plan_prune(PrunePolicy())
        report = store.execute(plan)

        assert len(report.garbage) == 2
        assert report.freed_nbytes == before - blob_nbytes(store)
        assert len(blob_paths(store)) == 3
        check_invariants(store)


def test_blob_of_a_newer_format_is_left_alone(filled: PrefixStore) -> None:
    key = expected_key(TINY.digest, STORED[2])
    make_newer(blob_path(filled, key))
    filled.close()
    (filled.path / "index.db").unlink()

    with PrefixStore(filled.path) as store:
        report = store.verify(fix=True)
        match = Match((SegmentSlice(key, 90, 130, 130),))
        with pytest.raises(StoreFormatError, match="upgrade promptcache"):
            store.segments.open_blob(match.slices[0])

        assert report.damaged == ()
        assert cached_tokens(store, STORED[2]) == 90
        assert blob_path(store, key).exists()


def test_prefix_saved_while_verify_is_reading_is_not_missing(
    filled: PrefixStore,
) -> None:
    saved: list[str] = []

    def save_once(done: int, total: int) -> None:
        if not saved:
            saved.append(save(filled, [9, *tokens(50)]))

    report = filled.verify(fix=True, progress=save_once)

    assert report.missing == ()
    assert cached_tokens(filled, [9, *tokens(50)]) == 51
    assert filled.verify().is_sound
    check_invariants(filled)


def test_prefix_removed_while_verify_is_reading_is_not_damaged(
    filled: PrefixStore,
) -> None:
    def remove_all(done: int, total: int) -> None:
        if done == 1:
            for prefix in filled.prefixes():
                filled.remove(prefix.key)

    report = filled.verify(progress=remove_all)

    assert report.damaged == ()
    assert report.missing == ()


def test_progress_counts_the_blobs(filled: PrefixStore) -> None:
    steps: list[tuple[int, int]] = []

    filled.verify(progress=lambda done, total: steps.append((done, total)))

    assert steps == [(i, 5) for i in range(1, 6)]
