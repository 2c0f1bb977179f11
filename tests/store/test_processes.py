"""Processes share a store, also where one is killed."""

import random
import time
from pathlib import Path

import pytest

from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers import workers
from tests.helpers.invariants import check_invariants
from tests.helpers.marks import all_but
from tests.helpers.segments import TINY, blob_paths, cached_tokens, check_match, tokens
from tests.helpers.stores import check_nothing_lost


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


@pytest.mark.parametrize("seed", all_but([0, 1], range(6)))
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
