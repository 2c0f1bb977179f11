"""Matching finds the longest cached prefix, at any token."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from promptcache.kvcache.kv_quantization import KVSettings
from promptcache.models.prefill_plan import PrefillPlan
from promptcache.segments.chain import Chain
from promptcache.segments.types import AT_ANY_TOKEN, EncodedSegment, Match, ResumeRules
from promptcache.store import PrefixStore
from promptcache.store.index import Index
from promptcache.store.lookup import longest_stored
from promptcache.store.writer import SegmentWriter
from tests.helpers.forging import TIMES
from tests.helpers.invariants import check_invariants
from tests.helpers.places import IN_MEMORY
from tests.helpers.segments import (
    NEEDS_CHECKPOINT,
    TINY,
    blob_nbytes,
    cached_tokens,
    check_match,
    encoder,
    expected_key,
    fingerprint,
    longest_shared,
    save,
    save_checkpoint,
    save_with_checkpoints,
    shared_length,
    tokens,
)
from tests.helpers.strategies import prompts

OTHER = fingerprint("other")


@contextmanager
def new_store() -> Iterator[PrefixStore]:
    """Open a store that is this example's own."""
    place = tempfile.TemporaryDirectory(dir=IN_MEMORY)
    with place as folder, PrefixStore(folder) as store:
        yield store


@settings(deadline=None, max_examples=30 * TIMES)
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
            generating = store.lookup(prompt[:-1], TINY)
            limited = rows_of(store, prompt, min(limit, len(prompt)))

            assert match.cached_tokens == longest
            assert generating.cached_tokens == min(longest, len(prompt) - 1)
            assert limited.cached_tokens == min(longest, limit)
            for found in (match, generating, limited):
                check_match(store, found, prompt)


def rows_of(store: PrefixStore, prompt: list[int], limit: int) -> Match:
    """Return what is stored of the first tokens of a prompt."""
    return longest_stored(store._index, Chain(TINY.digest, prompt), limit=limit)


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


@pytest.mark.parametrize("limit", [0, 1, 31, 32, 33, 39, 40, 41, 80, 99, 100])
def test_limit_of_rows_is_respected_at_any_token(
    store: PrefixStore, limit: int
) -> None:
    save(store, tokens(40))
    save(store, tokens(100))

    match = rows_of(store, tokens(100), limit)

    assert match.cached_tokens == limit
    assert all(part.start < part.stop for part in match.slices)
    check_match(store, match, tokens(100))


@pytest.mark.parametrize("limit", [-1, -100])
def test_negative_limit_of_rows_matches_nothing(store: PrefixStore, limit: int) -> None:
    save(store, tokens(40))

    assert rows_of(store, tokens(40), limit).slices == ()


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
    with index.database.writing():
        for i in range(1, num_blocks + 1):
            sql = "INSERT OR IGNORE INTO blocks (hash, segment_id) VALUES (?, 1)"
            index.database.execute(sql, [chain.block_hash(i)])
    index.database.close()


def test_two_segments_with_the_same_hash_are_both_looked_at(
    store: PrefixStore,
) -> None:
    save(store, [*tokens(32), *tokens(40, first=900)])
    save(store, [*tokens(31), *tokens(40, first=700)])
    wanted = [*tokens(31), *tokens(40, first=700)]

    tamper(store, Chain(TINY.digest, wanted), 2)

    assert cached_tokens(store, wanted) == len(wanted)


def save_and_record(
    store: PrefixStore,
    token_ids: list[int],
    *,
    resumption: ResumeRules = AT_ANY_TOKEN,
    cut_at: tuple[int, ...] = (),
) -> list[tuple[int, int]]:
    """Save a prefix and return the ranges that were asked for."""
    ranges: list[tuple[int, int]] = []
    encode = encoder(token_ids, resumption=resumption)

    def encode_and_record(start: int, end: int) -> EncodedSegment:
        ranges.append((start, end))
        return encode(start, end)

    store.segments.save(token_ids, TINY, encode_and_record, cut_at=cut_at)
    return ranges


def test_encode_is_asked_for_missing_ranges_only(store: PrefixStore) -> None:
    save(store, tokens(100))
    wanted = [*tokens(90), *tokens(4000, first=200)]

    ranges = save_and_record(store, wanted)

    assert shared_length(wanted, tokens(100)) == 90
    assert ranges == [(90, 2048), (2048, 4090)]


def test_match_costs_the_same_however_much_is_stored(store: PrefixStore) -> None:
    for i in range(60):
        save(store, [i, *tokens(40)])
    save(store, tokens(500, first=300))
    index = Index(Path(store.path) / "index.db")
    statements: list[str] = []
    index.database._connection.set_trace_callback(statements.append)
    store.close()
    store._index = index

    assert cached_tokens(store, tokens(500, first=300)) == 500
    assert len(statements) < 12
    plans = [
        index.database._connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
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
    with index.database.writing():
        deepest = index.segment_id(expected_key(TINY.digest, prompt))
        assert deepest is not None
        for segment in index.path_to(deepest):
            if segment.start <= position < segment.end:
                data = bytearray(segment.token_ids)
                data[4 * (position - segment.start)] ^= 1
                sql = "UPDATE segments SET token_ids = ? WHERE id = ?"
                index.database.execute(sql, [bytes(data), segment.id])

    match = store.lookup(prompt, TINY)

    assert match.cached_tokens == position


# Checkpoints


@pytest.fixture(autouse=True)
def unthinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep all checkpoints, however close; which of them go is not matching's."""
    monkeypatch.setattr(SegmentWriter, "_thin", lambda *_: None)


def end_of(match: Match) -> tuple[int, bool]:
    """Return the position of a match, and whether a checkpoint is there."""
    last = match.slices[-1]
    return match.cached_tokens, last.start == last.end


@pytest.mark.parametrize("length", [1, 39, 40, 41, 79, 80, 81, 100, 101, 150])
def test_rows_that_need_a_checkpoint_match_only_where_one_is(
    store: PrefixStore, length: int
) -> None:
    save(store, tokens(150), resumption=NEEDS_CHECKPOINT)
    for position in (40, 100):
        save_checkpoint(store, tokens(position))

    match = store.lookup(tokens(length), TINY)

    assert match.cached_tokens == max(p for p in (0, 40, 100) if p <= length)
    assert not match.slices or end_of(match)[1]
    check_match(store, match, tokens(length))
    check_invariants(store)


@pytest.mark.parametrize("fork", [40, 41, 79, 80, 81, 99, 100, 120, 149, 150])
def test_deepest_checkpoint_before_the_fork_wins(store: PrefixStore, fork: int) -> None:
    save_with_checkpoints(store, tokens(150), [40, 80, 100])

    match = store.lookup([*tokens(fork), *tokens(9, first=500)], TINY)

    assert match.cached_tokens == max(p for p in (40, 80, 100, 150) if p <= fork)
    assert end_of(match)[1]
    check_match(store, match, tokens(fork))


def test_checkpoint_in_the_parent_behind_the_fork_is_not_taken(
    store: PrefixStore,
) -> None:
    forked = [*tokens(70), *tokens(60, first=500)]
    save_with_checkpoints(store, tokens(150), [40, 100])
    save_with_checkpoints(store, forked, [90])

    def found(prompt: list[int]) -> int:
        match = store.lookup(prompt, TINY)
        check_match(store, match, prompt)
        return match.cached_tokens

    assert found([*forked, 9]) == 130
    assert found([*forked[:129], 9]) == 90
    assert found([*forked[:89], 9]) == 40
    assert found([*tokens(149), 9]) == 100
    assert found([*tokens(99), 9]) == 40
    check_invariants(store)


def test_checkpoint_at_the_fork_serves_both_sides(store: PrefixStore) -> None:
    forked = [*tokens(70), *tokens(60, first=500)]
    save_with_checkpoints(store, tokens(150), [70])
    save(store, forked, resumption=NEEDS_CHECKPOINT)

    for prompt in (tokens(149), forked, [*tokens(70), 9]):
        match = store.lookup(prompt, TINY)
        assert end_of(match) == (70, True)
        check_match(store, match, prompt)


def test_checkpoint_takes_only_the_rows_up_to_it(store: PrefixStore) -> None:
    save_with_checkpoints(store, tokens(150), [40])
    save(store, tokens(200), resumption=NEEDS_CHECKPOINT)

    match = store.lookup(tokens(149), TINY)

    bounds = [(part.start, part.stop, part.end) for part in match.slices]
    assert bounds == [(0, 40, 150), (40, 40, 40)]


INDIVISIBLE = ResumeRules(sliceable=False)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 95, 96, 97, 99, 100])
def test_indivisible_segment_is_taken_as_a_whole_or_not_at_all(
    store: PrefixStore, length: int
) -> None:
    save(store, tokens(96), resumption=INDIVISIBLE, cut_at=(32, 64))
    forked = [*tokens(length), *tokens(9, first=500)]

    match = store.lookup(forked, TINY)

    assert match.cached_tokens == min(length // 32 * 32, 96)
    assert all(part.stop == part.end for part in match.slices)
    check_match(store, match, forked)


def test_fork_of_an_indivisible_segment_hangs_on_what_is_before(
    store: PrefixStore,
) -> None:
    forked = [*tokens(80), *tokens(80, first=500)]
    save(store, tokens(96), resumption=INDIVISIBLE, cut_at=(32, 64))

    ranges = save_and_record(
        store, forked, resumption=INDIVISIBLE, cut_at=(32, 64, 96, 128)
    )

    assert ranges == [(64, 96), (96, 128), (128, 160)]
    match = store.lookup(forked, TINY)
    assert match.cached_tokens == 160
    check_match(store, match, forked)


# Doing without a segment


def test_skipped_checkpoint_leaves_the_one_before(store: PrefixStore) -> None:
    save_with_checkpoints(store, tokens(150), [40, 100])
    skip: set[str] = set()
    found = []
    for _ in range(4):
        match = store.lookup(tokens(150), TINY, skip=skip)
        check_match(store, match, tokens(150))
        found.append(match.cached_tokens)
        skip |= {part.key for part in match.slices[-1:]}

    assert found == [150, 100, 40, 0]


@pytest.mark.parametrize("ends", [(40, 80, 120), (5, 10, 20), (32, 64, 70)], ids=str)
def test_skipped_segment_goes_with_all_that_hangs_on_it(
    store: PrefixStore, ends: tuple[int, ...]
) -> None:
    for end in ends:
        save(store, tokens(end))
    prompt = tokens(ends[-1])
    keys = [part.key for part in store.lookup(prompt, TINY).slices]

    found = [store.lookup(prompt, TINY, skip={key}).cached_tokens for key in keys]

    assert found == [0, *ends[:-1]]
    assert store.lookup(prompt, TINY, skip=set(keys)).slices == ()


def test_skipped_rows_leave_the_checkpoints_before_them(store: PrefixStore) -> None:
    save_with_checkpoints(store, tokens(80), [40])
    save_with_checkpoints(store, tokens(150), [100])
    rows = store.lookup(tokens(150), TINY).slices[1]

    match = store.lookup(tokens(150), TINY, skip={rows.key})

    assert (rows.start, rows.end) == (80, 150)
    assert match.cached_tokens == 80
    check_match(store, match, tokens(150))


# Anything at random, against a model that looks at every position


class Checkpointed(NamedTuple):
    """A prompt that was saved, and where checkpoints were kept."""

    token_ids: list[int]
    checkpoints: set[int]


@st.composite
def checkpointed_prompts(draw: st.DrawFn) -> Checkpointed:
    prompt = draw(prompts(max_tokens=120))
    places = st.integers(1, len(prompt)) | st.sampled_from([len(prompt)])
    return Checkpointed(prompt, draw(st.sets(places)))


def resumable_at(stored: list[Checkpointed], prompt: list[int]) -> int:
    """Return the deepest checkpoint for a prompt."""
    known = {
        tuple(token_ids[:position])
        for token_ids, checkpoints in stored
        for position in checkpoints
    }
    positions = range(1, len(prompt) + 1)
    return max((p for p in positions if tuple(prompt[:p]) in known), default=0)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(checkpointed_prompts(), min_size=1, max_size=6),
    st.lists(prompts(max_tokens=120), max_size=6),
)
def test_match_is_the_deepest_checkpoint_of_all_that_were_kept(
    stored: list[Checkpointed], others: list[list[int]]
) -> None:
    with new_store() as store:
        for prompt, checkpoints in stored:
            save(store, prompt, resumption=NEEDS_CHECKPOINT)
            for position in sorted(checkpoints):
                save_checkpoint(store, prompt[:position])

        for wanted in [*(one.token_ids for one in stored), *others]:
            for prompt in (wanted, wanted[:-1]):
                match = store.lookup(prompt, TINY)

                assert match.cached_tokens == resumable_at(stored, prompt)
                assert not match.slices or end_of(match)[1]
                check_match(store, match, prompt)
        check_invariants(store)


STEP = 32


@st.composite
def prompts_of_pieces(draw: st.DrawFn) -> list[int]:
    """Draw a prompt that is likely to end with a piece, or to go on from there."""
    pieces = st.integers(1, 4).map(lambda num_pieces: num_pieces * STEP)
    length = draw(pieces | pieces.map(lambda end: end + 1) | st.integers(1, 140))
    return [*draw(prompts(max_tokens=140)), *[0] * 140][:length]


def save_exact(store: PrefixStore, prompt: list[int], exact_after: int) -> None:
    """Save a prompt as a run saves it that repeats plain mlx-lm's pieces.

    That reads the last token alone, so that a piece that ends with it is its own.
    """
    end = PrefillPlan(STEP, exact_after=exact_after).last_kept(
        len(prompt), KVSettings()
    )
    if end:
        save(
            store,
            prompt[:end],
            resumption=lambda _, end: ResumeRules(sliceable=end <= exact_after),
            cut_at={exact_after, *range(STEP, end, STEP)},
        )


def exactly_resumable_at(
    stored: list[list[int]], prompt: list[int], exact_after: int
) -> int:
    """Return where a generation may take over."""
    best = 0
    for token_ids in stored:
        last = len(token_ids) - (len(token_ids) > exact_after)
        shared = min(shared_length(token_ids[:last], prompt), len(prompt) - 1)
        for position in range(1, shared + 1):
            if position % STEP == 0 or position <= exact_after:
                best = max(best, position)
    return best


@settings(deadline=None, max_examples=40)
@given(
    st.lists(prompts_of_pieces(), min_size=1, max_size=6),
    st.lists(prompts_of_pieces(), max_size=6),
    st.sampled_from([0, STEP, 2 * STEP]),
)
def test_exact_match_is_at_a_whole_piece(
    stored: list[list[int]], others: list[list[int]], exact_after: int
) -> None:
    with new_store() as store:
        for prompt in stored:
            save_exact(store, prompt, exact_after)

        for wanted in [*stored, *others]:
            match = store.lookup(wanted[:-1], TINY)

            assert match.cached_tokens == exactly_resumable_at(
                stored, wanted, exact_after
            )
            check_match(store, match, wanted)
        check_invariants(store)
