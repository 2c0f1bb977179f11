"""What is removed goes and what is shared stays: segments split where others hang."""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptcache.errors import DamagedBlobError, PromptCacheWarning
from promptcache.segments.chain import pack
from promptcache.segments.types import ResumeRules, SegmentInfo
from promptcache.store import PrefixStore
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.reports import PrunePolicy
from tests.helpers.blobs import write_blob
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import (
    TINY,
    blob_nbytes,
    blob_path,
    blob_paths,
    cached_tokens,
    check_match,
    encoder,
    expected_key,
    files_nbytes,
    flip,
    longest_shared,
    save,
    save_with_checkpoints,
    tokens,
    values,
)
from tests.helpers.strategies import prompts

SECRET = tokens(70)
PIRATE = [*tokens(40), *tokens(30, first=900)]
LONGER = [*PIRATE, *tokens(50, first=2000)]


def publish_root(store: PrefixStore, token_ids: Sequence[int]) -> str:
    """Publish the blob of a segment from the start that no row refers to."""
    key = expected_key(TINY.digest, token_ids)
    info = SegmentInfo(key, TINY.digest, TINY, 0, len(token_ids), False, 1.0)
    write_blob(BlobFolder(store.path), info, encoder(token_ids)(0, len(token_ids)))
    return key


def check_found(store: PrefixStore, prompts: Sequence[Sequence[int]]) -> None:
    for prompt in prompts:
        match = store.lookup(prompt, TINY)
        assert match.cached_tokens == len(prompt)
        check_match(store, match, prompt)


# Both a segment and its head are there


@pytest.mark.parametrize("position", [40, 41, 64, 69])
def test_of_a_segment_and_its_head_a_new_index_takes_the_one_that_has_all(
    store: PrefixStore, position: int
) -> None:
    for prompt in (SECRET, PIRATE, LONGER):
        save(store, prompt)
    store.pin(store.segments.key_of(SECRET, TINY), "secret")
    before = {prefix.key: prefix.name for prefix in store.prefixes()}
    publish_root(store, SECRET[:position])
    store.close()
    (store.path / "index.db").unlink()

    with PrefixStore(store.path) as rebuilt:
        assert rebuilt.rebuilt == 3
        check_invariants(rebuilt)
        check_found(rebuilt, [SECRET, PIRATE, LONGER])
        assert {prefix.key: prefix.name for prefix in rebuilt.prefixes()} == before
        assert rebuilt.verify().orphans == 1
        rebuilt.execute(rebuilt.plan_prune(PrunePolicy()))
        assert len(blob_paths(rebuilt)) == 3


@pytest.mark.parametrize("stored", [SECRET[:40], SECRET])
def test_verify_adopts_neither_a_segment_beside_its_head_nor_the_head(
    store: PrefixStore, stored: list[int]
) -> None:
    save(store, stored)
    save(store, PIRATE)
    publish_root(store, SECRET if len(stored) == 40 else SECRET[:40])

    report = store.verify()

    assert (report.rebuilt, report.orphans) == (0, 1)
    assert cached_tokens(store, SECRET) == len(stored)
    check_invariants(store)


def test_children_find_their_parent_in_whatever_segment_has_the_place(
    store: PrefixStore,
) -> None:
    for prompt in (SECRET, PIRATE, LONGER):
        save(store, prompt)
    key = publish_root(store, SECRET[:40])
    store.close()
    for path in blob_paths(store):
        if path.stem == expected_key(TINY.digest, SECRET):
            path.unlink()
    (store.path / "index.db").unlink()

    with PrefixStore(store.path) as rebuilt:
        assert rebuilt.rebuilt == 3
        check_found(rebuilt, [SECRET[:40], PIRATE, LONGER])
        assert cached_tokens(rebuilt, SECRET) == 40
        assert rebuilt.lookup(PIRATE, TINY).slices[0].key == key
        check_invariants(rebuilt)


# Removing


def random_ids(num_tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1 << 31), k=num_tokens)


def files_with(folder: Path, token_ids: Sequence[int]) -> list[str]:
    """Return the files that hold some of these tokens, or their values."""
    traces = [pack(token_ids[i : i + 2]) for i in range(0, len(token_ids) - 1, 2)]
    traces.append(values(token_ids, 0, len(token_ids)).tobytes()[-8:])
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(trace in path.read_bytes() for trace in traces)
    ]


@pytest.mark.parametrize(("num_shared", "num_tokens"), [(3, 2500), (32, 50), (40, 50)])
def test_nothing_of_a_removed_prompt_is_left_but_what_is_shared(
    store: PrefixStore, num_shared: int, num_tokens: int
) -> None:
    shared = random_ids(num_shared, 1)
    secret = [*shared, *random_ids(num_tokens, 2)]
    pirate = [*shared, *random_ids(50, 3)]
    key = save(store, secret)
    save(store, pirate)
    assert files_with(store.path, secret[num_shared:])
    before = store.total_nbytes()
    planned = store.resolve(key).nbytes
    on_disk = blob_nbytes(store)

    with PrefixStore(store.path):
        report = store.remove(key)

    assert files_with(store.path, secret[num_shared:]) == []
    assert report.freed_nbytes == planned == on_disk - blob_nbytes(store)
    # Each token takes the eight bytes of its id and its value, and nothing else is.
    assert planned >= 8 * num_tokens
    assert report.kept_nbytes == store.total_nbytes() < before
    assert cached_tokens(store, secret) == num_shared
    check_found(store, [pirate])
    check_invariants(store)
    assert store.verify().is_sound


def test_removed_prompt_is_in_no_free_page_of_the_index_of_a_process_that_lives(
    store: PrefixStore,
) -> None:
    """The rows of many others stay, so that its pages are not given back as such."""
    secret = random_ids(60, 1)
    for i in range(8):
        save(store, [i, *random_ids(60, 10 + i)])
    key = save(store, secret)
    for i in range(8):
        save(store, [i, *random_ids(60, 50 + i)])

    store.remove(key)

    assert files_with(store.path, secret) == []


@settings(deadline=None, max_examples=8)
@given(st.lists(prompts(), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_what_is_removed_goes_and_what_is_shared_stays(
    stored: list[list[int]], random_: random.Random
) -> None:
    with tempfile.TemporaryDirectory() as folder, PrefixStore(folder) as store:
        for prompt in stored:
            save(store, prompt)
        left = {store.segments.key_of(prompt, TINY): prompt for prompt in stored}
        while left:
            key = random_.choice(sorted(left))
            removed = left.pop(key)
            planned, before = store.resolve(key).nbytes, blob_nbytes(store)

            report = store.remove(key)

            freed = before - blob_nbytes(store)
            assert planned == report.freed_nbytes == freed
            check_found(store, list(left.values()))
            assert cached_tokens(store, removed) == longest_shared(
                removed, left.values()
            )
            check_invariants(store)
        assert blob_paths(store) == []


@pytest.mark.parametrize("first", ["end", "inside"])
def test_prefix_that_ends_inside_keeps_what_it_needs(
    store: PrefixStore, first: str
) -> None:
    save(store, SECRET)
    inside = save(store, SECRET[:50])
    store.pin(inside, "inside")

    if first == "end":
        store.remove(store.segments.key_of(SECRET, TINY))

        assert cached_tokens(store, SECRET) == 50
        assert [p.key for p in store.pins()] == [inside]
        (match,) = store.lookup(SECRET[:50], TINY).slices
        assert (match.stop, match.end) == (50, 50)
        store.remove("inside")
        assert blob_paths(store) == []
    else:
        assert store.remove("inside").freed_nbytes == 0
        check_found(store, [SECRET])
    check_invariants(store)


def test_names_of_what_is_shared_survive_a_split_and_a_lost_index(
    store: PrefixStore,
) -> None:
    save(store, SECRET)
    store.pin(save(store, SECRET[:50]), "inside")
    store.pin(save(store, SECRET[:45]), "before")
    save(store, PIRATE)
    store.remove(store.segments.key_of(SECRET, TINY))
    store.close()
    (store.path / "index.db").unlink()

    with PrefixStore(store.path) as rebuilt:
        assert {p.name: p.num_tokens for p in rebuilt.pins()} == {
            "inside": 50,
            "before": 45,
        }
        check_found(rebuilt, [SECRET[:50], PIRATE])
        check_invariants(rebuilt)


def test_checkpoints_of_what_goes_go_and_those_of_what_is_shared_stay(
    store: PrefixStore,
) -> None:
    save_with_checkpoints(store, SECRET, [20, 40, 60])
    save_with_checkpoints(store, PIRATE)

    store.remove(store.segments.key_of(SECRET, TINY))

    for prompt in (SECRET[:20], PIRATE):
        match = store.lookup(prompt, TINY)
        assert match.cached_tokens == len(prompt)
        check_match(store, match, prompt)
    assert cached_tokens(store, SECRET) == 20
    check_invariants(store)
    store.remove(store.segments.key_of(PIRATE, TINY))
    assert blob_paths(store) == []


def test_segment_that_cannot_be_cut_is_not_split(store: PrefixStore) -> None:
    whole = ResumeRules(sliceable=False)
    save(store, SECRET, resumption=whole)
    save(store, [*SECRET, *tokens(40, first=500)], resumption=whole)

    report = store.remove(store.segments.key_of(SECRET, TINY))

    assert report.freed_nbytes == 0
    check_found(store, [[*SECRET, *tokens(40, first=500)]])


def test_damaged_segment_is_not_split_into_one_that_looks_sound(
    store: PrefixStore,
) -> None:
    key = save(store, SECRET)
    save(store, PIRATE)
    flip(blob_path(store, key))

    with pytest.raises(DamagedBlobError, match=r"checksum .* `promptcache verify"):
        store.remove(key)

    assert [prefix.key for prefix in store.prefixes() if prefix.key == key]
    store.verify(fix=True)
    assert store.prefixes() == []


def test_head_has_the_header_of_the_whole(store: PrefixStore) -> None:
    key = save(store, SECRET)
    save(store, PIRATE)
    folder = BlobFolder(store.path)
    whole = folder.read_header(key)

    store.remove(key)

    head = folder.read_header(expected_key(TINY.digest, SECRET[:40]))
    assert head.data_start == whole.data_start
    assert (head.versions, head.layout) == (whole.versions, whole.layout)
    assert head.info == replace(whole.info, key=head.info.key, end=40, is_prefix=False)
    assert [s.shape[0] for s in head.tensors] == [40, 40]


# Evicting


def a_byte_less(store: PrefixStore) -> PrunePolicy:
    """Return a limit that is exceeded by one byte; the WAL does not count."""
    store._index.database.shrink()
    return PrunePolicy(max_nbytes=store.total_nbytes() - 1)


def save_dated(store: PrefixStore, number: int, now: float) -> list[int]:
    """Save a prompt whose first twelve tokens others have, too, as of a time."""
    prompt = [*tokens(12), number, *random_ids(200, number)]
    key = save(store, prompt, width=50)
    set_times(store, key, now)
    return prompt


def set_times(store: PrefixStore, key: str, now: float) -> None:
    with store._index.database.writing():
        for column in ("created_at", "used_at"):
            store._index.database.execute(
                f"UPDATE segments SET {column} = ? WHERE key = ?", [now, key]
            )


def test_oldest_of_dated_prompts_that_share_a_head_goes_first(
    store: PrefixStore,
) -> None:
    dated = [save_dated(store, i, 100.0 + i) for i in range(4)]
    before = {store.resolve(store.segments.key_of(p, TINY)).nbytes for p in dated}
    # The oldest has the head that all share, its size is what its own tokens take.
    assert max(before) - min(before) < 1500

    for i in range(3):
        plan = store.plan_prune(a_byte_less(store))
        assert sum(removal.nbytes for removal in plan.removals) in before
        nbytes = blob_nbytes(store)

        report = store.execute(plan)

        assert report.freed_nbytes == nbytes - blob_nbytes(store)
        assert report.removals == plan.removals
        assert cached_tokens(store, dated[i]) == 12
        check_found(store, dated[i + 1 :])
        check_invariants(store)


def test_many_bytes_are_not_held_for_a_few_shared_tokens(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store") as store:
        large = [*tokens(12), *random_ids(2000, 1)]
        save(store, large, width=100)
        small = [*tokens(12), *random_ids(30, 2)]
        save(store, small)
    limit = 700_000
    with PrefixStore(tmp_path / "store", max_nbytes=limit) as store:
        assert blob_nbytes(store) > limit
        save(store, [*tokens(12), *random_ids(40, 3)])

        assert blob_nbytes(store) < 20_000
        assert store.total_nbytes() <= limit
        check_found(store, [small, tokens(12)])
        assert store.num_evicted == 1
        check_invariants(store)


def test_use_of_what_is_shared_keeps_no_tail(store: PrefixStore) -> None:
    """Nor does it count for more than it went through."""
    dated = [save_dated(store, i, 100.0 + i) for i in range(3)]
    for prompt in (dated[1], dated[2]):
        store.usage_log.touch(store.lookup(prompt, TINY))

    leaves = [leaf for leaf in store._index.leaves() if leaf.cut_at == 12]

    assert [leaf.used_at for leaf in leaves] == [100.0]
    store.usage_log.touch(store.lookup([*dated[0][:50], 7], TINY))
    (leaf,) = (leaf for leaf in store._index.leaves() if leaf.cut_at == 12)
    assert leaf.used_at > 1000
    # What hangs there now was the use.
    save(store, [*dated[0][:50], 7])
    ages = {s.cut_at: s.used_at for s in store._index.leaves() if s.cut_at}
    assert ages[12] > 1000 and ages[50] == 100.0


def test_prune_by_age_cuts_what_nobody_used(store: PrefixStore) -> None:
    old, new = save_dated(store, 1, 100.0), save_dated(store, 2, time.time())

    report = store.execute(store.plan_prune(PrunePolicy(older_than=3600)))

    assert [removal.cut_at for removal in report.removals] == [12]
    assert cached_tokens(store, old) == 12
    check_found(store, [new])
    assert [p.num_tokens for p in store.prefixes()] == [len(new)]


def test_prune_of_a_model_keeps_what_is_pinned_and_nothing_after_it(
    store: PrefixStore,
) -> None:
    save(store, SECRET)
    store.pin(save(store, SECRET[:50]), "inside")
    plan = store.plan_prune(PrunePolicy(model="tiny"))

    store.execute(plan)

    assert [removal.cut_at for removal in plan.removals] == [50]
    assert cached_tokens(store, SECRET) == 50
    store.unpin("inside")
    store.execute(store.plan_prune(PrunePolicy(model="tiny")))
    assert blob_paths(store) == []


@pytest.mark.parametrize("change", ["child", "pin", "gone", "cut"])
def test_split_is_not_done_where_something_came_to_hang_meanwhile(
    store: PrefixStore, change: str
) -> None:
    key = save(store, SECRET)
    save(store, PIRATE)
    plan = store.plan_prune(a_byte_less(store))
    assert [removal.cut_at for removal in plan.removals] == [40]

    if change == "child":
        save(store, [*SECRET[:60], 7, 8])
    elif change == "pin":
        store.pin(key, "name")
    elif change == "gone":
        store.remove(store.segments.key_of(PIRATE, TINY))
        store.remove(key)
    else:
        store.remove(key)
    report = store.execute(plan)

    assert (report.removals, report.freed_nbytes) == ((), 0)
    wanted = {"child": 70, "pin": 70, "gone": 0, "cut": 40}
    assert cached_tokens(store, SECRET) == wanted[change]
    check_invariants(store)


def test_damaged_segment_that_is_to_be_split_makes_room_as_a_whole(
    tmp_path: Path,
) -> None:
    with PrefixStore(tmp_path / "store") as store:
        flip(blob_path(store, save(store, SECRET, width=2000)))
        store.pin(save(store, PIRATE), "lost")
    limit = files_nbytes(tmp_path / "store") + 1000
    with PrefixStore(tmp_path / "store", max_nbytes=limit) as store:
        with pytest.warns(
            PromptCacheWarning, match="removed.*lost is no longer pinned"
        ):
            save(store, [5, *tokens(40)])

        check_found(store, [[5, *tokens(40)]])
        assert store.total_nbytes() <= limit
        check_invariants(store)


@settings(deadline=None, max_examples=6)
@given(st.lists(prompts(), min_size=2, max_size=8), st.integers(0, 7))
def test_eviction_frees_what_it_plans_and_keeps_what_is_pinned(
    stored: list[list[int]], number: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, PrefixStore(folder) as store:
        for i, prompt in enumerate(stored):
            set_times(store, save(store, prompt), 100.0 + i)
        pinned = stored[number % len(stored)]
        store.pin(store.segments.key_of(pinned, TINY), "pinned")
        while True:
            plan = store.plan_prune(a_byte_less(store))
            if not plan.removals:
                break
            before = blob_nbytes(store)
            report = store.execute(plan)
            assert report.removals == plan.removals
            assert report.freed_nbytes == before - blob_nbytes(store)
            check_found(store, [pinned])
            check_invariants(store)
        # Nothing is left but what it needs.
        ends = {prefix.num_tokens for prefix in store.prefixes()}
        assert ends == {len(p) for p in stored if p == pinned[: len(p)]}
        tail = store.lookup(pinned, TINY).slices[-1]
        assert tail.end == len(pinned)
