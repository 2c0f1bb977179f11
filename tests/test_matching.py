"""Matching finds the longest cached prefix, at any token."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_invariants
from segments import (
    TINY,
    blob_nbytes,
    cached_tokens,
    check_match,
    encoder,
    expected_key,
    fingerprint,
    longest_shared,
    save,
    shared_length,
    tokens,
)
from strategies import prompts

from promptcache.chain import Chain
from promptcache.index import Index
from promptcache.store import PrefixStore

OTHER = fingerprint("other")


@contextmanager
def new_store() -> Iterator[PrefixStore]:
    """Open a store that is this example's own."""
    with tempfile.TemporaryDirectory() as folder, PrefixStore(folder) as store:
        yield store


@settings(deadline=None, max_examples=60)
@given(
    st.lists(prompts(), min_size=1, max_size=8),
    st.lists(prompts(), max_size=8),
    st.integers(0, 210),
)
def test_match_is_the_longest_common_prefix_with_anything_stored(
    stored: list[list[int]], others: list[list[int]], limit: int
) -> None:
    with new_store() as store:
        for prompt in stored:
            save(store, prompt)

        for prompt in [*stored, *others]:
            longest = longest_shared(prompt, stored)
            match = store.lookup(prompt, TINY)
            limited = store.lookup(prompt, TINY, limit=limit)

            assert match.cached_tokens == longest
            assert limited.cached_tokens == min(longest, limit)
            check_match(store, match, prompt)
            check_match(store, limited, prompt)


@settings(deadline=None, max_examples=15)
@given(st.lists(prompts(), min_size=2, max_size=8))
def test_stored_prompts_are_radix_trees(stored: list[list[int]]) -> None:
    with new_store() as store:
        for prompt in stored:
            save(store, prompt)

        assert all(cached_tokens(store, prompt) == len(prompt) for prompt in stored)
        check_invariants(store)


@settings(deadline=None, max_examples=15)
@given(st.lists(prompts(), min_size=1, max_size=4), prompts())
def test_fingerprints_never_match_each_other(
    stored: list[list[int]], prompt: list[int]
) -> None:
    with new_store() as store:
        for i, one in enumerate(stored):
            save(store, one, OTHER if i % 2 else TINY)

        for model, own in ((TINY, stored[::2]), (OTHER, stored[1::2])):
            for wanted in [*stored, prompt]:
                longest = longest_shared(wanted, own)
                assert cached_tokens(store, wanted, model) == longest


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 100, 2048, 2049, 4500])
def test_end_of_a_prefix_is_found_exactly(store: PrefixStore, length: int) -> None:
    save(store, tokens(length))

    match = store.lookup([*tokens(length), 7, 7], TINY)

    assert match.cached_tokens == length
    check_match(store, match, tokens(length))


@pytest.mark.parametrize("fork", [1, 31, 32, 33, 64, 99, 100, 2047, 2048, 2049])
def test_fork_is_found_exactly_and_stores_only_what_differs(
    store: PrefixStore, fork: int
) -> None:
    save(store, tokens(2500), width=100)
    before = blob_nbytes(store)
    forked = [*tokens(fork), *tokens(50, first=5000)]

    at_fork = cached_tokens(store, forked)
    save(store, forked, width=100)

    assert at_fork == fork
    assert cached_tokens(store, forked) == fork + 50
    rows = 50 * (100 * 4 + 4)
    assert rows < blob_nbytes(store) - before < rows + 2000
    check_invariants(store)


def test_prefix_of_what_is_stored_takes_no_room(store: PrefixStore) -> None:
    save(store, tokens(100))
    before = blob_nbytes(store)

    key = save(store, tokens(77))

    assert blob_nbytes(store) == before
    assert {p.num_tokens for p in store.prefixes()} == {77, 100}
    assert store.resolve(key).num_tokens == 77
    check_invariants(store)


def test_conversation_is_a_chain_of_what_each_turn_added(store: PrefixStore) -> None:
    turns = [tokens(length) for length in range(7, 500, 41)]
    for turn in turns:
        save(store, turn)

    match = store.lookup([*turns[-1], 1], TINY)

    bounds = [(part.start, part.stop) for part in match.slices]
    ends = [len(turn) for turn in turns]
    assert bounds == list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize("limit", [0, 1, 31, 32, 33, 39, 40, 41, 80, 99, 100, 1000])
def test_limit_is_respected_at_any_token(store: PrefixStore, limit: int) -> None:
    save(store, tokens(40))
    save(store, tokens(100))

    match = store.lookup(tokens(100), TINY, limit=limit)

    assert match.cached_tokens == min(limit, 100)
    assert all(part.start < part.stop for part in match.slices)
    check_match(store, match, tokens(100))


@pytest.mark.parametrize("limit", [-1, -100])
def test_negative_limit_matches_nothing(store: PrefixStore, limit: int) -> None:
    save(store, tokens(40))

    assert store.lookup(tokens(40), TINY, limit=limit).slices == ()


def test_empty_prompt_and_empty_store_match_nothing(store: PrefixStore) -> None:
    before = store.lookup(tokens(40), TINY)
    save(store, tokens(40))

    assert before.cached_tokens == 0
    assert before.key is None
    assert store.lookup([], TINY).slices == ()


def test_last_segment_names_the_match(store: PrefixStore) -> None:
    key = save(store, tokens(40))
    save(store, [*tokens(40), 7, 7])

    assert store.lookup([*tokens(40), 8], TINY).key == key


@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize("model", [TINY, OTHER])
def test_wrong_hash_never_yields_a_wrong_match(
    store: PrefixStore, length: int, model: object
) -> None:
    stored = [*tokens(40), *tokens(length - 40, first=500)]
    wanted = tokens(length)
    owner = TINY if model is TINY else OTHER
    save(store, stored, owner)

    tamper(store, Chain(TINY.digest, wanted), length // 32)

    match = store.lookup(wanted, TINY)
    assert match.cached_tokens in ({0, 40} if owner is TINY else {0})
    check_match(store, match, stored)


def test_same_hash_never_yields_the_segments_of_another_fingerprint(
    store: PrefixStore,
) -> None:
    save(store, tokens(64), OTHER)

    tamper(store, Chain(TINY.digest, tokens(64)), 2)

    assert store.lookup(tokens(64), TINY).slices == ()


def tamper(store: PrefixStore, chain: Chain, num_blocks: int) -> None:
    """Make the index say that segment 1 covers the blocks of a chain."""
    index = Index(store.path / "index.db")
    with index.writing():
        for i in range(1, num_blocks + 1):
            sql = "INSERT OR IGNORE INTO blocks (hash, segment_id) VALUES (?, 1)"
            index._execute(sql, [chain.block_hash(i)])
    index.close()


def test_two_segments_with_the_same_hash_are_both_looked_at(
    store: PrefixStore,
) -> None:
    save(store, [*tokens(32), *tokens(40, first=900)])
    save(store, [*tokens(31), *tokens(40, first=700)])
    wanted = [*tokens(31), *tokens(40, first=700)]

    tamper(store, Chain(TINY.digest, wanted), 2)

    assert cached_tokens(store, wanted) == len(wanted)


def test_encode_is_asked_for_missing_ranges_only(store: PrefixStore) -> None:
    save(store, tokens(100))
    wanted = [*tokens(90), *tokens(4000, first=200)]
    ranges: list[tuple[int, int]] = []
    encode = encoder(wanted)

    store.save(
        wanted,
        TINY,
        lambda start, end: (ranges.append((start, end)), encode(start, end))[1],
    )

    assert shared_length(wanted, tokens(100)) == 90
    assert ranges == [(90, 2048), (2048, 4090)]


def test_match_costs_the_same_however_much_is_stored(store: PrefixStore) -> None:
    for i in range(200):
        save(store, [i, *tokens(40)])
    save(store, tokens(500, first=300))
    index = Index(Path(store.path) / "index.db")
    statements: list[str] = []
    index._connection.set_trace_callback(statements.append)
    store.close()
    store._index = index

    assert cached_tokens(store, tokens(500, first=300)) == 500
    assert len(statements) < 12
    plans = [
        index._connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
        for sql in list(statements)
    ]
    steps = {row[3] for plan in plans for row in plan}
    tables = ("segments", "blocks", "prefixes", "fingerprints")
    assert not {
        step for step in steps if step.startswith("SCAN") and step[5:] in tables
    }
    assert any(step.startswith("SEARCH blocks") for step in steps)


@pytest.mark.parametrize("position", [0, 10, 63, 64, 99])
def test_match_ends_where_token_ids_differ_though_all_hashes_agree(
    store: PrefixStore, position: int
) -> None:
    """As if two prompts had the same chain hashes."""
    prompt = tokens(100)
    save(store, prompt[:64])
    save(store, prompt)
    index = store._index
    with index.writing():
        deepest = index.segment_id(expected_key(TINY.digest, prompt))
        assert deepest is not None
        for segment in index.path_to(deepest):
            if segment.start <= position < segment.end:
                data = bytearray(segment.token_ids)
                data[4 * (position - segment.start)] ^= 1
                sql = "UPDATE segments SET token_ids = ? WHERE id = ?"
                index._execute(sql, [bytes(data), segment.id])

    match = store.lookup(prompt, TINY)

    assert match.cached_tokens == position
