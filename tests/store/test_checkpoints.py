"""Prefixes that can be resumed at their checkpoints only."""

import random
from pathlib import Path

import pytest

from promptcache.errors import StoreError, StoreFullError
from promptcache.segments.types import Priority
from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants, read_rows
from tests.helpers.segments import (
    NEEDS_CHECKPOINT,
    TINY,
    blob_nbytes,
    blob_path,
    blob_paths,
    cached_tokens,
    expected_key,
    files_nbytes,
    flip,
    save,
    save_checkpoint,
    save_with_checkpoints,
    tokens,
    tree_hash,
)
from tests.helpers.stores import (
    EVERYTHING,
    TURNS,
    base_nbytes,
    check_all_resumable,
    checkpoint_key,
    found,
    save_and_record,
)


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
    with pytest.raises(StoreError, match="was evicted meanwhile"):
        save_checkpoint(store, tokens(100))
    save(store, tokens(99), resumption=NEEDS_CHECKPOINT)
    with pytest.raises(StoreError, match="was evicted meanwhile"):
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
