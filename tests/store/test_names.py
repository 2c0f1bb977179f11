"""Prefixes are found by their keys and names, which protect them."""

import pytest

from promptcache.errors import KeyNotFoundError, UsageError
from promptcache.store import PrefixStore
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import (
    TINY,
    blob_paths,
    cached_tokens,
    expected_key,
    save,
    tokens,
)
from tests.helpers.stores import EVERYTHING, OTHER, STORED


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
