"""Removing and pruning free what they say, and nothing else goes."""

import random
import time

import pytest

from promptcache.errors import KeyNotFoundError
from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import (
    TINY,
    blob_nbytes,
    blob_paths,
    cached_tokens,
    expected_key,
    files_nbytes,
    save,
    tokens,
    tree_hash,
)
from tests.helpers.stores import (
    EVERYTHING,
    OTHER,
    STORED,
    check_nothing_lost,
    lose_rows,
)


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
