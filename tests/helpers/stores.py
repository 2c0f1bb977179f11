"""Stores with prefixes that many tests use, and whether they hold them still."""

import sqlite3
from contextlib import closing
from pathlib import Path

from promptcache.segments.types import EncodedSegment
from promptcache.store import PrefixStore
from promptcache.store.index import Index
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import (
    TINY,
    cached_tokens,
    check_match,
    encoder,
    expected_key,
    fingerprint,
    tokens,
)

OTHER = fingerprint("other")
EVERYTHING = PrunePolicy(max_nbytes=0)

STORED = [
    tokens(100),
    tokens(150),
    [*tokens(90), *tokens(40, first=500)],
    [*tokens(120), *tokens(40, first=600)],
]
# So long that no checkpoint is thinned out.
TURNS = [tokens(700), tokens(1100), [*tokens(800), *tokens(300, first=5000)]]


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


def checkpoint_key(prompt: list[int]) -> str:
    return expected_key(TINY.digest, prompt, "checkpoint")


def found(store: PrefixStore, prompt: list[int]) -> int:
    """Return where a run resumes a prompt."""
    match = store.lookup(prompt, TINY)
    check_match(store, match, prompt)
    return match.cached_tokens


def base_nbytes(tmp_path: Path) -> int:
    """Return the size of a store with nothing in it, not even in its WAL."""
    PrefixStore(tmp_path / "empty").close()
    with PrefixStore(tmp_path / "empty") as store:
        return store.total_nbytes()


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


def set_version(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={version}")


def lose_rows(store: PrefixStore) -> None:
    """Make orphans of a segment, which is pinned, and its child."""
    index = Index(store.path / "index.db")
    assert len(index.remove_subtree(expected_key(TINY.digest, STORED[1]))) == 2
    index.database.close()
