"""Files in a store that no promptcache put there: named, counted, never evicted for."""

import json
from pathlib import Path

import pytest

from promptcache import PrefixStore, PrunePolicy
from promptcache.errors import StoreFullError
from tests.helpers.commands import ok
from tests.helpers.segments import cached_tokens, save, tokens

LIMIT = 4_000_000
# 500 tokens in rows of 1 kB.
WIDTH = 256
FIRST = [10_000 * i for i in range(1, 8)]


def filled(path: Path, *, num_prefixes: int = 5) -> PrefixStore:
    """Return a store with some prefixes of half a megabyte each."""
    store = PrefixStore(path, max_nbytes=LIMIT, min_free_nbytes=0)
    for first in FIRST[:num_prefixes]:
        save(store, tokens(500, first=first), width=WIDTH)
    return store


def put(path: Path, nbytes: int) -> None:
    """Put a file of some size into a store."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\0" * nbytes)


def num_kept(store: PrefixStore) -> int:
    """Return how many of the prefixes are there in full."""
    return sum(cached_tokens(store, tokens(500, first=f)) == 500 for f in FIRST)


@pytest.mark.parametrize(
    "name",
    [
        "index (conflicted copy).db",
        "blobs/0a/0a.safetensors",
        "blobs/0a/.0a0b.safetensors.icloud",
        "blobs/notes/a.txt",
        "photo.jpg",
        "holiday/photo.jpg",
    ],
)
def test_foreign_file_is_named(tmp_path: Path, name: str) -> None:
    with filled(tmp_path / "store", num_prefixes=1) as store:
        put(store.path / name, 1000)

        found = store.verify().foreign

        assert [tuple(file) for file in found] == [(name, 1000)]
        assert store.plan_prune(PrunePolicy()).foreign == found


def test_own_files_are_not_foreign(tmp_path: Path) -> None:
    with filled(tmp_path / "store", num_prefixes=2) as store:
        store.pin(save(store, tokens(70)), "seventy")
        put(store.path / "chats" / "one.jsonl", 10)
        put(store.path / "tmp" / "left", 10)
        put(store.path / "quarantine" / "x.safetensors", 10)

        assert store.verify().foreign == ()


def test_no_prefix_goes_for_foreign_files(tmp_path: Path) -> None:
    with filled(tmp_path / "store") as store:
        put(store.path / "copy.safetensors", 3_500_000)

        with pytest.raises(StoreFullError, match=r"3\.5 MB .*copy\.safetensors"):
            save(store, tokens(500, first=FIRST[5]), width=WIDTH)

        assert num_kept(store) == 5


def test_prune_evicts_for_its_own_files_only(tmp_path: Path) -> None:
    with filled(tmp_path / "store") as store:
        put(store.path / "copy.safetensors", 3_500_000)

        plan = store.plan_prune(PrunePolicy(max_nbytes=LIMIT))
        smaller = store.plan_prune(PrunePolicy(max_nbytes=2_000_000))

        assert plan.removals == ()
        assert plan.over_nbytes > 2_000_000
        # 2.6 MB are to become 2.
        assert len(smaller.removals) == 2


def test_small_foreign_files_are_made_room_for(tmp_path: Path) -> None:
    with filled(tmp_path / "store", num_prefixes=7) as store:
        put(store.path / ".DS_Store", 100_000)

        save(store, tokens(500, first=90_000), width=WIDTH)

        assert store.total_nbytes() <= LIMIT
        assert num_kept(store) >= 5


def test_store_goes_on_beside_foreign_files_that_fit(tmp_path: Path) -> None:
    with filled(tmp_path / "store", num_prefixes=1) as store:
        put(store.path / "copy.safetensors", 2_000_000)

        for first in FIRST[1:]:
            save(store, tokens(500, first=first), width=WIDTH)

        assert store.total_nbytes() <= LIMIT
        assert num_kept(store) >= 2


def test_prune_and_verify_say_what_to_do(tmp_path: Path) -> None:
    filled(tmp_path / "store", num_prefixes=1).close()
    put(tmp_path / "store" / "copy.safetensors", 3_500_000)
    put(tmp_path / "store" / "copy.jpg", 100_000)
    options = ["--store", str(tmp_path / "store")]

    pruned = ok("prune", "--json", "--max-size", "3MB", *options)
    verified = ok("verify", *options)

    advice = (
        "3.6 MB of the store are files that are not promptcache's, copy.safetensors "
        "and 1 more, move them somewhere else"
    )
    assert advice in pruned.stderr
    assert advice in verified.stderr
    assert json.loads(pruned.stdout)["foreign"] == [
        {"path": "copy.safetensors", "nbytes": 3_500_000},
        {"path": "copy.jpg", "nbytes": 100_000},
    ]
