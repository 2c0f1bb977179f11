"""What was saved is found, with its values."""

import resource
import threading

import pytest

from promptcache.errors import DamagedBlobError, StoreError
from promptcache.segments.types import EncodedSegment, Match, SegmentSlice
from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants
from tests.helpers.segments import (
    TINY,
    cached_tokens,
    check_match,
    encoder,
    expected_key,
    save,
    tokens,
)
from tests.helpers.stores import STORED, check_nothing_lost, save_and_record


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


def test_save_starts_again_when_what_it_continues_went_away(
    store: PrefixStore,
) -> None:
    key = save(store, tokens(50))

    starts = save_and_record(store, tokens(100), remove=key)

    assert starts == [50, 0]
    assert cached_tokens(store, tokens(100)) == 100
    store.execute(store.plan_prune(PrunePolicy()))
    check_invariants(store)


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
