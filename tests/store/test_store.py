"""The store keeps what was saved, under its limit, whatever happens to it."""

import os
import random
import resource
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from promptcache.errors import (
    DamagedBlobError,
    DamagedIndexError,
    KeyNotFoundError,
    StoreError,
    StoreFormatError,
    StoreFullError,
    UsageError,
)
from promptcache.segments.fingerprint import Fingerprint
from promptcache.segments.types import EncodedSegment, Match, Priority, SegmentSlice
from promptcache.store import PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.index import Index
from promptcache.store.reports import PrunePolicy
from tests.helpers import workers
from tests.helpers.invariants import check_invariants, read_rows
from tests.helpers.metadata import change_metadata, make_newer, make_older
from tests.helpers.segments import (
    NEEDS_CHECKPOINT,
    TINY,
    blob_nbytes,
    blob_path,
    blob_paths,
    cached_tokens,
    check_match,
    encoder,
    expected_key,
    files_nbytes,
    fingerprint,
    flip,
    longest_shared,
    save,
    save_checkpoint,
    save_with_checkpoints,
    tokens,
    tree_hash,
)
from tests.helpers.strategies import prompts

OTHER = fingerprint("other")
EVERYTHING = PrunePolicy(max_nbytes=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def filled(store: PrefixStore) -> Iterator[PrefixStore]:
    """A store with a chain, two forks, a pin inside a segment, and another model."""
    for prompt in STORED:
        save(store, prompt)
    store.pin(save(store, STORED[0][:77]), "inside")
    store.pin(expected_key(TINY.digest, STORED[1]), "end")
    save(store, STORED[0], OTHER)
    yield store


STORED = [
    tokens(100),
    tokens(150),
    [*tokens(90), *tokens(40, first=500)],
    [*tokens(120), *tokens(40, first=600)],
]


def check_nothing_lost(store: PrefixStore) -> None:
    """Assert that everything of `filled` is there, and its pins."""
    check_invariants(store)
    for prompt in STORED:
        match = store.lookup(prompt, TINY)
        assert match.cached_tokens == len(prompt)
        check_match(store, match, prompt)
    assert cached_tokens(store, STORED[0], OTHER) == 100
    assert store.resolve("inside").num_tokens == 77
    assert store.resolve("inside").key == expected_key(TINY.digest, tokens(77))
    assert store.resolve("end").key == expected_key(TINY.digest, STORED[1])


# Saving and finding


def test_what_was_saved_is_found_with_its_values(store: PrefixStore) -> None:
    key = save(store, tokens(100))

    match = store.lookup(tokens(120), TINY)

    assert key == expected_key(TINY.digest, tokens(100)) == match.key
    assert match.cached_tokens == 100
    check_match(store, match, tokens(120))
    check_invariants(store)


def test_store_is_found_again_when_it_is_reopened(filled: PrefixStore) -> None:
    before = filled.prefixes()
    filled.close()

    with PrefixStore(filled.path) as store:
        assert store.rebuilt == 0
        assert store.prefixes() == before
        check_nothing_lost(store)


def test_many_stores_share_a_folder(store: PrefixStore) -> None:
    with PrefixStore(store.path) as other:
        key = save(other, tokens(100))

        assert cached_tokens(store, tokens(100)) == 100
        store.remove(key)
        assert cached_tokens(other, tokens(100)) == 0


def test_threads_share_a_store(store: PrefixStore) -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(10):
                prompt = [number, *tokens(50 + i)]
                save(store, prompt)
                assert cached_tokens(store, prompt) == len(prompt)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert problems == []
    check_invariants(store)


def test_saving_again_encodes_nothing(store: PrefixStore) -> None:
    key = save(store, tokens(100))

    def refuse(start: int, end: int) -> EncodedSegment:
        raise AssertionError(f"asked for [{start}, {end})")

    assert store.segments.save(tokens(100), TINY, refuse) == key


def test_step_on_the_way_is_not_listed(store: PrefixStore) -> None:
    save(store, tokens(50), is_prefix=False)
    key = save(store, tokens(100))

    assert [prefix.key for prefix in store.prefixes()] == [key]


def test_key_of_is_what_save_returns(store: PrefixStore) -> None:
    wanted = store.segments.key_of(tokens(77), TINY)

    assert save(store, tokens(77)) == wanted


def test_failed_encode_keeps_what_was_there(store: PrefixStore) -> None:
    save(store, tokens(50))

    def fail(start: int, end: int) -> EncodedSegment:
        raise ValueError("no state")

    with pytest.raises(ValueError, match="no state"):
        store.segments.save(tokens(100), TINY, fail)

    assert cached_tokens(store, tokens(100)) == 50
    check_invariants(store)


def test_interrupted_save_keeps_the_pieces_it_finished(store: PrefixStore) -> None:
    encode = encoder(tokens(5000))

    def encode_two(start: int, end: int) -> EncodedSegment:
        if start >= 4096:
            raise KeyboardInterrupt
        return encode(start, end)

    with pytest.raises(KeyboardInterrupt):
        store.segments.save(tokens(5000), TINY, encode_two)

    assert cached_tokens(store, tokens(5000)) == 4096
    assert [prefix.num_tokens for prefix in store.prefixes()] == [4096]
    check_invariants(store)


def test_hit_is_counted_and_dated(store: PrefixStore) -> None:
    save(store, tokens(100))
    before = store.prefixes()[0]

    store.usage_log.touch(store.lookup(tokens(120), TINY))

    after = store.prefixes()[0]
    assert after.hits == before.hits + 1
    assert after.used_at > before.used_at


def test_empty_match_counts_for_nothing(store: PrefixStore) -> None:
    save(store, tokens(100))

    store.usage_log.touch(Match())

    assert store.prefixes()[0].hits == 0


def test_blob_of_a_match_that_went_away_is_damage(store: PrefixStore) -> None:
    key = save(store, tokens(100))
    match = store.lookup(tokens(100), TINY)
    store.remove(key)

    with pytest.raises(DamagedBlobError, match="blob is missing"):
        store.segments.open_blob(match.slices[0])


def test_blob_of_another_range_is_damage(store: PrefixStore) -> None:
    key = save(store, tokens(100))

    with pytest.raises(DamagedBlobError, match="another range"):
        store.segments.open_blob(SegmentSlice(key, 0, 50, 99))


def test_report_tells_all_of_a_prefix(filled: PrefixStore) -> None:
    report = filled.report("inside")

    assert report.token_ids == tuple(tokens(77))
    assert report.fingerprint == TINY
    assert [(s.start, s.end) for s in report.segments] == [(0, 100)]
    assert report.prefix == filled.resolve("inside")


def test_report_of_a_fork_has_the_ids_of_its_own_path(filled: PrefixStore) -> None:
    report = filled.report(expected_key(TINY.digest, STORED[3]))

    assert list(report.token_ids) == STORED[3]
    assert [(s.start, s.end) for s in report.segments] == [
        (0, 100),
        (100, 150),
        (120, 160),
    ]


# The size limit


def base_nbytes(tmp_path: Path) -> int:
    """Return the size of a store with nothing in it, not even in its WAL."""
    PrefixStore(tmp_path / "empty").close()
    with PrefixStore(tmp_path / "empty") as store:
        return store.total_nbytes()


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


def save_and_record(
    store: PrefixStore, token_ids: list[int], *, width: int = 1, remove: str = ""
) -> list[int]:
    """Save a prefix and return the starts of the ranges that were asked for.

    Args:
        remove: Key of a prefix to remove while the first range is encoded.
    """
    starts: list[int] = []
    encode = encoder(token_ids, width=width)

    def encode_and_record(start: int, end: int) -> EncodedSegment:
        if remove and not starts:
            store.remove(remove)
        starts.append(start)
        return encode(start, end)

    store.segments.save(token_ids, TINY, encode_and_record)
    return starts


def test_save_starts_again_when_what_it_continues_went_away(
    store: PrefixStore,
) -> None:
    key = save(store, tokens(50))

    starts = save_and_record(store, tokens(100), remove=key)

    assert starts == [50, 0]
    assert cached_tokens(store, tokens(100)) == 100
    store.execute(store.plan_prune(PrunePolicy()))
    check_invariants(store)


# Keys, names and pins


def test_key_may_be_abbreviated_while_it_is_unique(store: PrefixStore) -> None:
    keys = [save(store, [i]) for i in range(20)]

    for key in keys:
        length = next(n for n in range(33) if sum(k[:n] == key[:n] for k in keys) == 1)
        assert store.resolve(key[:length]).key == key
        if length > 1:
            with pytest.raises(KeyNotFoundError, match=r"is ambiguous, .* begin with"):
                store.resolve(key[: length - 1])


@pytest.mark.parametrize("key", ["", "zz", "%", "_", "0" * 32, "' OR 1=1"])
def test_unknown_key_is_not_found(store: PrefixStore, key: str) -> None:
    save(store, tokens(5))

    with pytest.raises(KeyNotFoundError, match="no prefix has the key or name"):
        store.resolve(key)


def test_name_that_looks_like_a_key_is_the_name(store: PrefixStore) -> None:
    first, second = save(store, tokens(5)), save(store, tokens(6, first=1))
    store.pin(first, second[:4])

    assert store.resolve(second[:4]).key == first
    assert store.resolve(second).key == second


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[31m", "a\0"])
def test_name_has_to_be_printable(store: PrefixStore, name: str) -> None:
    key = save(store, tokens(5))

    with pytest.raises(UsageError, match="cannot be a name"):
        store.pin(key, name)


def test_pinned_prefix_survives_prune(filled: PrefixStore) -> None:
    filled.execute(filled.plan_prune(EVERYTHING))

    kept = {prefix.name for prefix in filled.prefixes()}
    assert kept >= {"inside", "end"}
    assert cached_tokens(filled, STORED[1]) == 150
    assert cached_tokens(filled, STORED[2]) == 90
    assert cached_tokens(filled, STORED[0], OTHER) == 0
    check_invariants(filled)


def test_unpinned_prefix_does_not_survive_prune(filled: PrefixStore) -> None:
    filled.unpin("inside")
    prefix = filled.unpin("end")

    filled.execute(filled.plan_prune(EVERYTHING))

    assert prefix.name is None
    assert filled.prefixes() == []
    assert blob_paths(filled) == []


def test_pin_moves_to_the_prefix_that_got_it_last(filled: PrefixStore) -> None:
    key = expected_key(TINY.digest, STORED[3])

    moved = filled.pin(key, "end")

    assert (moved.key, moved.name) == (key, "end")
    assert [p.key for p in filled.prefixes() if p.name == "end"] == [key]


def test_prefix_has_one_name(filled: PrefixStore) -> None:
    filled.pin("end", "renamed")

    with pytest.raises(KeyNotFoundError):
        filled.resolve("end")
    assert filled.resolve("renamed").key == expected_key(TINY.digest, STORED[1])


def test_unknown_name_cannot_be_unpinned(filled: PrefixStore) -> None:
    key = filled.resolve("end").key

    for name in ("unknown", key, key[:8]):
        with pytest.raises(KeyNotFoundError, match="no prefix is pinned as"):
            filled.unpin(name)


def test_leaf_of_an_interrupted_build_can_be_pinned(store: PrefixStore) -> None:
    key = save(store, tokens(50), is_prefix=False)

    store.pin(key, "half")
    store.execute(store.plan_prune(EVERYTHING))

    assert cached_tokens(store, tokens(50)) == 50


# Removing


def test_nbytes_of_a_prefix_is_what_removing_it_frees(filled: PrefixStore) -> None:
    rng = random.Random(1)
    while prefixes := filled.prefixes():
        prefix = rng.choice(prefixes)
        before = blob_nbytes(filled)

        report = filled.remove(prefix.key)

        assert before - blob_nbytes(filled) == prefix.nbytes == report.freed_nbytes
        assert report.kept_nbytes == files_nbytes(filled.path)
        check_invariants(filled)
    assert blob_paths(filled) == []


def test_remove_keeps_what_others_share(filled: PrefixStore) -> None:
    filled.remove(expected_key(TINY.digest, STORED[1]))
    filled.remove(expected_key(TINY.digest, STORED[3]))

    assert cached_tokens(filled, STORED[1]) == 100
    assert cached_tokens(filled, STORED[2]) == len(STORED[2])
    assert cached_tokens(filled, STORED[0], OTHER) == 100


def test_removed_pin_stays_away_when_the_index_is_lost(filled: PrefixStore) -> None:
    filled.remove("end")
    filled.close()
    (filled.path / "index.db").unlink()

    with PrefixStore(filled.path) as store:
        assert [p.name for p in store.prefixes() if p.name] == ["inside"]


def test_unknown_key_cannot_be_removed(filled: PrefixStore) -> None:
    before = tree_hash(filled.path)

    with pytest.raises(KeyNotFoundError):
        filled.remove("unknown")

    assert tree_hash(filled.path) == before


# Pruning


@pytest.mark.parametrize(
    "policy",
    [
        PrunePolicy(),
        EVERYTHING,
        PrunePolicy(older_than=0),
        PrunePolicy(model="tiny"),
        PrunePolicy(max_nbytes=100_000, older_than=5, model="other"),
    ],
)
def test_plan_changes_nothing(filled: PrefixStore, policy: PrunePolicy) -> None:
    (filled.path / "tmp" / "unfinished").write_bytes(b"1")
    before = tree_hash(filled.path)

    plan = filled.plan_prune(policy, now=time.time() + 10)

    assert tree_hash(filled.path) == before
    assert [garbage.path for garbage in plan.garbage] == ["tmp/unfinished"]


def test_prune_does_what_its_plan_said(filled: PrefixStore) -> None:
    plan = filled.plan_prune(EVERYTHING)
    before = blob_nbytes(filled)

    report = filled.execute(plan)

    assert report.removals == plan.removals
    assert report.freed_nbytes == before - blob_nbytes(filled)
    assert report.kept_nbytes == files_nbytes(filled.path)
    assert plan.over_nbytes > 0


def test_prune_by_model_takes_that_model_only(filled: PrefixStore) -> None:
    report = filled.execute(filled.plan_prune(PrunePolicy(model="other")))

    assert [r.reason for r in report.removals] == ["of model other"]
    check_nothing_lost_but_other(filled)


def check_nothing_lost_but_other(store: PrefixStore) -> None:
    assert [cached_tokens(store, p) for p in STORED] == [len(p) for p in STORED]
    assert cached_tokens(store, STORED[0], OTHER) == 0


def test_prune_by_age_takes_what_was_not_used(store: PrefixStore) -> None:
    save(store, tokens(50))
    save(store, [9, *tokens(50)])
    now = time.time()
    plan_now = store.plan_prune(PrunePolicy(older_than=60), now=now)

    plan_later = store.plan_prune(PrunePolicy(older_than=60), now=now + 120)
    report = store.execute(plan_later)

    assert plan_now.removals == ()
    assert [r.reason for r in report.removals] == ["not used for 2 m"] * 2


def test_plan_keeps_what_got_a_pin_or_a_child_meanwhile(store: PrefixStore) -> None:
    pinned, parent, idle = (save(store, [i, *tokens(50)]) for i in range(3))
    plan = store.plan_prune(EVERYTHING)
    store.pin(pinned, "name")
    save(store, [1, *tokens(60)])

    report = store.execute(plan)

    assert [removal.key for removal in report.removals] == [idle]
    assert cached_tokens(store, [0, *tokens(50)]) == 51
    assert cached_tokens(store, [1, *tokens(60)]) == 61
    assert parent
    check_invariants(store)


def test_plan_keeps_an_orphan_that_was_adopted_meanwhile(filled: PrefixStore) -> None:
    lose_rows(filled)
    plan = filled.plan_prune(PrunePolicy())
    filled.verify()
    before = blob_nbytes(filled)

    report = filled.execute(plan)

    assert len(plan.garbage) == 2
    assert blob_nbytes(filled) == before
    assert (report.garbage, report.freed_nbytes) == ((), 0)
    check_nothing_lost(filled)


def test_prune_gives_the_room_of_the_index_back(store: PrefixStore) -> None:
    empty = files_nbytes(store.path)
    for i in range(60):
        save(store, [i, *tokens(1000)])

    report = store.execute(store.plan_prune(EVERYTHING))

    assert report.kept_nbytes < empty + 50_000


# Recovery


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


def lose_rows(store: PrefixStore) -> None:
    """Make orphans of a segment, which is pinned, and its child."""
    index = Index(store.path / "index.db")
    assert len(index.remove_subtree(expected_key(TINY.digest, STORED[1]))) == 2
    index.database.close()


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


# Checkpoints


@pytest.fixture
def resumable(store: PrefixStore) -> Iterator[PrefixStore]:
    """A store whose prefixes can be resumed at checkpoints only, with a fork and a pin.

    There are checkpoints on the way at 40, which is a boundary, and at 300.
    """
    save(store, TURNS[1], is_prefix=False, resumption=NEEDS_CHECKPOINT)
    save_checkpoint(store, tokens(40), priority=Priority.BOUNDARY)
    save_checkpoint(store, tokens(300))
    save_checkpoint(store, TURNS[0], is_prefix=True)
    save_checkpoint(store, TURNS[1], is_prefix=True)
    save_with_checkpoints(store, TURNS[2])
    store.pin(expected_key(TINY.digest, TURNS[0]), "first")
    yield store


# So long that no checkpoint is thinned out.
TURNS = [tokens(700), tokens(1100), [*tokens(800), *tokens(300, first=5000)]]


def found(store: PrefixStore, prompt: list[int]) -> int:
    """Return where a run resumes a prompt."""
    match = store.lookup(prompt, TINY)
    check_match(store, match, prompt)
    return match.cached_tokens


def checkpoint_key(prompt: list[int]) -> str:
    return expected_key(TINY.digest, prompt, "checkpoint")


def check_all_resumable(store: PrefixStore) -> None:
    """Assert that everything of `resumable` is there."""
    check_invariants(store)
    for prompt in TURNS:
        assert found(store, prompt) == len(prompt)
        assert found(store, [*prompt, 9]) == len(prompt)
    assert found(store, tokens(699)) == 300
    assert found(store, tokens(299)) == 40
    assert found(store, tokens(39)) == 0
    listed = {(prefix.num_tokens, prefix.name) for prefix in store.prefixes()}
    assert len(store.prefixes()) == 3
    assert listed == {(700, "first"), (1100, None)}


def test_checkpointed_prefix_is_listed_once(resumable: PrefixStore) -> None:
    keys = {prefix.key for prefix in resumable.prefixes()}

    assert keys == {expected_key(TINY.digest, prompt) for prompt in TURNS}
    assert len(resumable.prefixes()) == 3
    check_all_resumable(resumable)


def test_rows_without_a_checkpoint_at_their_end_are_listed_once(
    store: PrefixStore,
) -> None:
    """As an interrupted build leaves them."""
    save(store, tokens(100), is_prefix=False, resumption=NEEDS_CHECKPOINT)
    save_checkpoint(store, tokens(40))
    before = [prefix.num_tokens for prefix in store.prefixes()]

    save_checkpoint(store, tokens(100), is_prefix=True)

    assert before == [100]
    assert [prefix.num_tokens for prefix in store.prefixes()] == [100]


def test_report_of_a_checkpointed_prefix_tells_its_rows_and_its_state(
    resumable: PrefixStore,
) -> None:
    report = resumable.report("first")

    assert report.token_ids == tuple(tokens(700))
    assert [(s.start, s.end) for s in report.segments] == [(0, 1100), (700, 700)]


def test_checkpoint_has_a_key_of_its_own_and_its_prefix_the_usual_one(
    store: PrefixStore,
) -> None:
    key = save_with_checkpoints(store, tokens(100))

    assert key == expected_key(TINY.digest, tokens(100)) == store.prefixes()[0].key
    assert store.lookup(tokens(101), TINY).key == key
    assert {path.stem for path in blob_paths(store)} == {
        key,
        checkpoint_key(tokens(100)),
    }


def test_nbytes_of_a_checkpointed_prefix_is_what_removing_it_frees(
    resumable: PrefixStore,
) -> None:
    rng = random.Random(2)
    # What is left of rows counts as a prefix, too.
    for _ in range(5):
        prefix = rng.choice(resumable.prefixes() or [None])
        if prefix is None:
            break
        before = blob_nbytes(resumable)

        report = resumable.remove(prefix.key)

        assert before - blob_nbytes(resumable) == prefix.nbytes == report.freed_nbytes
        check_invariants(resumable)
    assert blob_paths(resumable) == []


def test_remove_frees_the_rows_and_their_loose_checkpoints(store: PrefixStore) -> None:
    key = save_with_checkpoints(store, tokens(1000), [40, 500])
    assert len(blob_paths(store)) == 4

    store.remove(key)

    assert blob_paths(store) == []
    assert store.prefixes() == []


def test_remove_keeps_the_rows_that_another_checkpoint_needs(
    resumable: PrefixStore,
) -> None:
    for prompt in TURNS[1:]:
        resumable.remove(expected_key(TINY.digest, prompt))

    assert found(resumable, TURNS[0]) == 700
    assert found(resumable, TURNS[1]) == 700
    assert found(resumable, tokens(699)) == 300
    check_invariants(resumable)


def test_pinned_checkpoint_and_its_rows_survive_prune(resumable: PrefixStore) -> None:
    resumable.execute(resumable.plan_prune(EVERYTHING))

    assert [prefix.name for prefix in resumable.prefixes()] == ["first"]
    assert found(resumable, TURNS[0]) == 700
    assert found(resumable, TURNS[1]) == 700
    # Those on the way are not what was pinned.
    assert found(resumable, tokens(699)) == 0
    assert len(blob_paths(resumable)) == 2
    check_invariants(resumable)


def test_pinned_checkpoint_survives_pressure(path: Path, tmp_path: Path) -> None:
    limit = base_nbytes(tmp_path) + 120_000
    with PrefixStore(path, max_nbytes=limit) as store:
        key = save_with_checkpoints(store, tokens(300), [40], width=10)
        store.pin(key, "kept")

        for i in range(20):
            save_with_checkpoints(store, [900 + i, *tokens(300)], [40], width=10)

            assert files_nbytes(path) <= limit
            assert found(store, tokens(300)) == 300
        check_invariants(store)


def test_end_of_an_interrupted_build_stays_resumable_when_it_is_pinned(
    store: PrefixStore,
) -> None:
    save(store, tokens(100), is_prefix=False, resumption=NEEDS_CHECKPOINT)
    save_checkpoint(store, tokens(100))

    store.pin(expected_key(TINY.digest, tokens(100)), "half")
    store.execute(store.plan_prune(EVERYTHING))

    assert cached_tokens(store, tokens(100)) == 100


@pytest.mark.parametrize("extra", [60_000, 100_000, 150_000])
def test_limit_holds_after_every_checkpoint(
    path: Path, tmp_path: Path, extra: int
) -> None:
    limit = base_nbytes(tmp_path) + extra
    with PrefixStore(path, max_nbytes=limit) as store:
        for i in range(8):
            prompt = [i % 3, *tokens(150 + i)]
            save(store, prompt, is_prefix=False, resumption=NEEDS_CHECKPOINT)
            for position in (26, 71, 90, 120, 130, len(prompt)):
                is_prefix = position == len(prompt)
                save_checkpoint(store, prompt[:position], width=50, is_prefix=is_prefix)

                assert files_nbytes(path) <= limit
            assert cached_tokens(store, prompt) == len(prompt)
            check_invariants(store)


def test_checkpoint_that_does_not_fit_takes_nothing_with_it(
    path: Path, tmp_path: Path
) -> None:
    limit = base_nbytes(tmp_path) + 120_000
    with PrefixStore(path, max_nbytes=limit) as store:
        store.pin(save_with_checkpoints(store, tokens(300)), "kept")
        save(store, tokens(400), is_prefix=False, resumption=NEEDS_CHECKPOINT)

        with pytest.raises(StoreFullError, match="do not fit"):
            save_checkpoint(store, tokens(400), width=10_000)

        assert files_nbytes(path) <= limit
        assert found(store, tokens(400)) == 300
        check_invariants(store)


def test_checkpoint_hangs_on_rows_that_are_stored(store: PrefixStore) -> None:
    with pytest.raises(StoreError, match="has been evicted meanwhile"):
        save_checkpoint(store, tokens(100))
    save(store, tokens(99), resumption=NEEDS_CHECKPOINT)
    with pytest.raises(StoreError, match="has been evicted meanwhile"):
        save_checkpoint(store, tokens(100))

    assert len(blob_paths(store)) == 1


def test_checkpoint_that_is_there_is_not_written_again(resumable: PrefixStore) -> None:
    before = tree_hash(resumable.path / "blobs")

    key = save_checkpoint(resumable, TURNS[0], is_prefix=True)

    assert key == expected_key(TINY.digest, TURNS[0])
    assert tree_hash(resumable.path / "blobs") == before
    check_all_resumable(resumable)


def test_processes_that_save_the_same_checkpoint_do_not_disturb_each_other(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, tokens(100), resumption=NEEDS_CHECKPOINT)
    others: list[PrefixStore] = []
    writer = store.segments
    add = writer._add

    def add_slowly(*args: object) -> bool:
        if not others:
            others.append(PrefixStore(store.path))
            save_checkpoint(others[0], tokens(100))
        return add(*args)

    monkeypatch.setattr(writer, "_add", add_slowly)

    save_checkpoint(store, tokens(100), is_prefix=True)

    assert cached_tokens(store, tokens(100)) == 100
    others[0].close()
    check_invariants(store)


def test_thinning_keeps_pins_the_first_boundary_and_the_newest(
    store: PrefixStore,
) -> None:
    save(store, tokens(2000), is_prefix=False, resumption=NEEDS_CHECKPOINT)
    save_checkpoint(store, tokens(40), priority=Priority.BOUNDARY)
    for position in range(1000, 1120, 10):
        key = save_checkpoint(store, tokens(position), is_prefix=True)
        if position == 1050:
            store.pin(key, "pinned")

    save_checkpoint(store, tokens(2000))

    rows = read_rows(store.path).values()
    kept = {row.start for row in rows if row.is_checkpoint}
    assert {40, 1050, 2000} <= kept
    assert len(kept) <= 5
    listed = {prefix.num_tokens for prefix in store.prefixes()}
    assert listed == kept - {40, 2000}
    assert found(store, tokens(1999)) == max(kept - {2000})
    check_invariants(store)


def stems(store: PrefixStore) -> set[str]:
    return {path.stem for path in blob_paths(store)}


def test_eviction_of_a_checkpoint_leaves_the_rows_usable(
    resumable: PrefixStore,
) -> None:
    resumable.unpin("first")
    before = {key for key in stems(resumable) if key != checkpoint_key(TURNS[1])}

    assert resumable._index.remove_leaf(checkpoint_key(TURNS[1]))

    assert found(resumable, TURNS[1]) == 700
    assert save_and_record(resumable, TURNS[1]) == []
    save_checkpoint(resumable, TURNS[1])
    assert found(resumable, TURNS[1]) == 1100
    assert stems(resumable) == {*before, checkpoint_key(TURNS[1])}
    check_invariants(resumable)


def test_hit_of_a_checkpoint_is_counted_and_dated(resumable: PrefixStore) -> None:
    before = resumable.resolve("first")

    resumable.usage_log.touch(resumable.lookup(tokens(800), TINY))

    after = resumable.resolve("first")
    assert after.hits == before.hits + 1
    assert after.used_at > before.used_at
    leaves = {leaf.key: leaf.used_at for leaf in resumable._index.leaves()}
    assert leaves[checkpoint_key(TURNS[0])] == after.used_at
    assert leaves[checkpoint_key(TURNS[1])] < after.used_at


def test_least_recently_used_checkpoint_goes_first(store: PrefixStore) -> None:
    save_with_checkpoints(store, tokens(1000), [40, 500])
    store.usage_log.touch(store.lookup(tokens(700), TINY))

    plan = store.plan_prune(EVERYTHING)

    order = [removal.key for removal in plan.removals]
    assert order[-1] == expected_key(TINY.digest, tokens(1000))
    assert order[-2] == expected_key(TINY.digest, tokens(500), "checkpoint")


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


def set_version(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={version}")


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


@pytest.mark.parametrize("delete", [True, False])
def test_damaged_checkpoint_is_given_up_alone(
    resumable: PrefixStore, delete: bool
) -> None:
    path = blob_path(resumable, checkpoint_key(TURNS[1]))
    path.unlink() if delete else flip(path)

    report = resumable.verify(fix=True)

    assert [d.key for d in report.damaged] == ([] if delete else [path.stem])
    assert list(report.missing) == ([path.stem] if delete else [])
    assert found(resumable, TURNS[1]) == 700
    assert found(resumable, TURNS[2]) == 1100
    save_checkpoint(resumable, TURNS[1], is_prefix=True)
    check_all_resumable(resumable)


def test_damaged_rows_take_their_checkpoints_with_them(resumable: PrefixStore) -> None:
    names = resumable.segments.give_up(expected_key(TINY.digest, TURNS[1]))

    assert names == ["first"]
    assert [found(resumable, prompt) for prompt in TURNS] == [0] * 3
    resumable.execute(resumable.plan_prune(PrunePolicy()))
    assert blob_paths(resumable) == []
    check_invariants(resumable)


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


# Many processes


def test_processes_open_a_new_store_together(path: Path) -> None:
    jobs = [workers.start("open_store", path, i) for i in range(6)]

    keys = [output.strip() for output in workers.finish(jobs)]

    with PrefixStore(path) as store:
        assert {p.key for p in store.prefixes()} == set(keys)
        check_invariants(store)


@pytest.mark.parametrize("damage", ["garbage", "missing"])
def test_processes_rebuild_a_lost_index_together(
    filled: PrefixStore, damage: str
) -> None:
    filled.close()
    index = filled.path / "index.db"
    if damage == "missing":
        index.unlink()
    else:
        index.write_bytes(random.Random(0).randbytes(50_000))
    jobs = [workers.start("open_store", filled.path, 9000 + i) for i in range(6)]

    workers.finish(jobs)

    with PrefixStore(filled.path) as store:
        for i in range(6):
            assert cached_tokens(store, [9000 + i, *tokens(40)]) == 41
        check_nothing_lost(store)


def test_processes_save_forks_of_each_other(path: Path) -> None:
    jobs = [workers.start("save_some", path, i) for i in range(3)]

    workers.finish(jobs)

    prompts_ = [workers.prompt_of(100 * j + i) for j in range(3) for i in range(25)]
    with PrefixStore(path) as store:
        for prompt in prompts_:
            match = store.lookup(prompt, TINY)
            assert match.cached_tokens == len(prompt)
            check_match(store, match, prompt)
        assert store.verify().is_sound
        check_invariants(store)


def test_prune_never_breaks_a_save(path: Path) -> None:
    PrefixStore(path).close()
    jobs = [
        workers.start("prune_some", path),
        workers.start("save_for_a_while", path, 0),
    ]

    outputs = workers.finish(jobs)

    with PrefixStore(path) as store:
        for seed in map(int, outputs[1].split()):
            prompt = workers.prompt_of(seed)
            assert cached_tokens(store, prompt) == len(prompt)
        check_invariants(store)


@pytest.mark.parametrize("seed", range(6))
def test_killed_process_loses_nothing_it_said_it_saved(path: Path, seed: int) -> None:
    process = workers.start("save_forever", path, 1000 * seed)
    assert process.stdout
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0, 0.3))
    process.kill()
    rest, _ = process.communicate()
    saved = [1000 * seed, *map(int, rest.split())]

    check_invariants(path)
    with PrefixStore(path) as store:
        for i in saved:
            prompt = workers.prompt_of(i)
            match = store.lookup(prompt, TINY)
            assert match.cached_tokens == len(prompt)
            check_match(store, match, prompt)
        assert store.rebuilt == 0
        plan = store.plan_prune(PrunePolicy())
        assert len(plan.garbage) <= 1
        store.execute(plan)
        assert {p.stem for p in blob_paths(store)} == store._index.segment_keys()
        assert not list((path / "tmp").iterdir())
        assert store.verify().is_sound
        check_invariants(store)


def test_build_lock_ends_with_the_process_that_holds_it(store: PrefixStore) -> None:
    process = workers.start("hold_build", store.path)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    waited = []

    def kill() -> None:
        waited.append(True)
        process.kill()

    with store.segments.building("ab" * 16, kill):
        pass

    process.communicate()
    assert waited == [True]
    assert store.plan_prune(PrunePolicy()).garbage == ()


def test_build_lock_is_no_garbage_while_it_is_held(store: PrefixStore) -> None:
    with store.segments.building("ab" * 16, lambda: None):
        plan = store.plan_prune(PrunePolicy())

    assert plan.garbage == ()
    assert not list((store.path / "tmp").iterdir())


# Everything at random


class StoreMachine(RuleBasedStateMachine):
    """Any operations in any order."""

    @initialize(extra=st.integers(20_000, 150_000))
    def open(self, extra: int) -> None:
        self.folder = Path(os.environ["PROMPTCACHE_DIR"]).parent / str(random.random())
        with PrefixStore(self.folder) as store:
            self.limit = store.total_nbytes() + extra
        self.store = PrefixStore(self.folder, max_nbytes=self.limit)
        self.prompts: list[list[int]] = []
        self.checkpointed: list[list[int]] = []
        self.pinned: dict[str, tuple[Fingerprint, list[int]]] = {}

    @rule(prompt=prompts(), width=st.integers(1, 60))
    def save(self, prompt: list[int], width: int) -> None:
        before = {path: path.stat().st_mtime_ns for path in blob_paths(self.store)}
        total = files_nbytes(self.folder)
        try:
            save(self.store, prompt, width=width)
            assert cached_tokens(self.store, prompt) == len(prompt)
            assert files_nbytes(self.folder) <= self.limit
        except StoreFullError:
            assert before.keys() <= set(blob_paths(self.store))
            assert files_nbytes(self.folder) <= max(self.limit, total)
        self.prompts.append(prompt)

    @rule(prompt=prompts())
    def look_up(self, prompt: list[int]) -> None:
        match = self.store.lookup(prompt, TINY)
        assert match.cached_tokens <= longest_shared(prompt, self.prompts)
        check_match(self.store, match, prompt)
        self.store.usage_log.touch(match)

    @rule(prompt=prompts(), width=st.integers(1, 60), data=st.data())
    def save_checkpointed(
        self, prompt: list[int], width: int, data: st.DataObject
    ) -> None:
        """Save under the model that can be resumed at checkpoints only."""
        places = data.draw(st.sets(st.integers(1, len(prompt)), max_size=4))
        total = files_nbytes(self.folder)
        try:
            save_with_checkpoints(self.store, prompt, places, OTHER, width=width)
            match = self.store.lookup(prompt, OTHER)
            assert match.cached_tokens == len(prompt)
            assert files_nbytes(self.folder) <= self.limit
        # Rows at its end may have gone to make room for a checkpoint on the way.
        except StoreError:
            assert files_nbytes(self.folder) <= max(self.limit, total)
        self.checkpointed.append(prompt)

    @rule(prompt=prompts())
    def look_up_checkpointed(self, prompt: list[int]) -> None:
        match = self.store.lookup(prompt, OTHER)
        assert match.cached_tokens <= longest_shared(prompt, self.checkpointed)
        assert not match.slices or match.slices[-1].start == match.cached_tokens
        check_match(self.store, match, prompt)
        self.store.usage_log.touch(match)

    @precondition(lambda self: self.store.prefixes())
    @rule(data=st.data(), name=st.sampled_from("ab"))
    def pin(self, data: st.DataObject, name: str) -> None:
        prefix = data.draw(st.sampled_from(self.store.prefixes()))
        report = self.store.report(prefix.key)
        pinned = report.fingerprint, list(report.token_ids)
        if cached_tokens(self.store, pinned[1], pinned[0]) < prefix.num_tokens:
            # What a checkpoint that was evicted or damaged has left.
            return
        self.store.pin(prefix.key, name)
        self.pinned = {n: p for n, p in self.pinned.items() if p != pinned}
        self.pinned[name] = pinned

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pinned)))
        self.store.unpin(name)
        del self.pinned[name]

    @precondition(lambda self: self.store.prefixes())
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        prefix = data.draw(st.sampled_from(self.store.prefixes()))
        before = blob_nbytes(self.store)
        self.store.remove(prefix.key)
        assert before - blob_nbytes(self.store) == prefix.nbytes
        self.pinned.pop(prefix.name or "", None)

    @rule(nbytes=st.none() | st.integers(0, 200_000))
    def prune(self, nbytes: int | None) -> None:
        plan = self.store.plan_prune(PrunePolicy(max_nbytes=nbytes))
        before = blob_nbytes(self.store)
        report = self.store.execute(plan)
        assert report.removals == plan.removals
        assert report.garbage == plan.garbage
        swept = sum(g.nbytes for g in report.garbage if not g.path.startswith("blobs"))
        assert before - blob_nbytes(self.store) + swept == report.freed_nbytes
        assert nbytes is None or plan.over_nbytes or report.kept_nbytes <= nbytes

    @rule(lose_index=st.booleans())
    def reopen(self, lose_index: bool) -> None:
        keys = self.store._index.segment_keys()
        self.store.close()
        if lose_index:
            (self.folder / "index.db").unlink()
        self.store = PrefixStore(self.folder, max_nbytes=self.limit)
        assert self.store._index.segment_keys() >= keys

    @precondition(lambda self: bool(blob_paths(self.store)))
    @rule(data=st.data(), delete=st.booleans())
    def damage(self, data: st.DataObject, delete: bool) -> None:
        path = data.draw(st.sampled_from(blob_paths(self.store)))
        known = path.stem in self.store._index.segment_keys()
        if delete:
            path.unlink()
        else:
            flip(path)
        report = self.store.verify(fix=True)
        assert [d.key for d in report.damaged] == ([] if delete else [path.stem])
        assert list(report.missing) == ([path.stem] if delete and known else [])
        names = {prefix.name for prefix in self.store.prefixes()}
        self.pinned = {n: p for n, p in self.pinned.items() if n in names}

    @invariant()
    def store_is_sound(self) -> None:
        if hasattr(self, "store"):
            check_invariants(self.store)

    @invariant()
    def pinned_prefixes_are_there(self) -> None:
        if hasattr(self, "store"):
            named = {p.name: p.key for p in self.store.prefixes() if p.name}
            assert named.keys() == self.pinned.keys()
            for name, (model, prompt) in self.pinned.items():
                assert named[name] == expected_key(model.digest, prompt)
                assert cached_tokens(self.store, prompt, model) == len(prompt)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


def test_any_operations_in_any_order_keep_the_store_sound() -> None:
    run_state_machine_as_test(
        StoreMachine,
        # Without shrinking, which takes minutes with real files.
        settings=settings(
            deadline=None,
            max_examples=25,
            stateful_step_count=20,
            phases=[Phase.explicit, Phase.reuse, Phase.generate],
        ),
    )


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


def test_blob_that_cannot_be_opened_just_now_is_no_damage(store: PrefixStore) -> None:
    save(store, tokens(40))
    part = store.lookup(tokens(40), TINY).slices[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))

    try:
        with pytest.raises(StoreError, match="Too many open files") as caught:
            store.segments.open_blob(part)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert not isinstance(caught.value, DamagedBlobError)
    assert store.verify().damaged == ()
