"""The order of eviction, with a clock that was ahead, or behind."""

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from promptcache import PrefixStore, PrunePolicy
from promptcache.store.index.clock import BEGINNING
from tests.helpers.commands import ok
from tests.helpers.segments import TINY, cached_tokens, save, tokens

YEARS = 5 * 365 * 86_400.0
PROMPTS = [tokens(500, first=10_000 * i) for i in range(1, 8)]
# 500 tokens in rows of 1 kB: six of them fit.
LIMIT, WIDTH = 3_500_000, 256

SetClock = Callable[[float], None]


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Return a function that sets the machine's clock, which goes on from there."""
    real = time.time
    ahead = 0.0

    def set_to(now: float) -> None:
        nonlocal ahead
        ahead = now - real()

    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    return set_to


@pytest.fixture
def small(tmp_path: Path) -> PrefixStore:
    return PrefixStore(tmp_path / "store", max_nbytes=LIMIT, min_free_nbytes=0)


def kept(store: PrefixStore) -> list[int]:
    """Return which prompts are there in full."""
    return [i for i, ids in enumerate(PROMPTS) if cached_tokens(store, ids) == 500]


def put(store: PrefixStore, *prompts: int) -> None:
    for i in prompts:
        save(store, PROMPTS[i], width=WIDTH)


def use(store: PrefixStore, *prompts: int) -> None:
    for i in prompts:
        store.usage_log.touch(store.lookup(PROMPTS[i], TINY))


@pytest.mark.parametrize("is_saved_then", [True, False])
def test_clock_that_was_ahead_protects_nothing(
    small: PrefixStore, set_clock: SetClock, is_saved_then: bool
) -> None:
    now = time.time()
    if not is_saved_then:
        put(small, 0)
    set_clock(now + YEARS)
    put(small, 0)
    use(small, 0)
    set_clock(now + 100)

    put(small, 1, 2, 3, 4, 5)
    use(small, 1, 2, 3, 4, 5)
    put(small, 6)

    assert kept(small) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("then", [0.0, BEGINNING - 86_400])
def test_clock_that_was_behind_puts_nothing_first_in_line(
    small: PrefixStore, set_clock: SetClock, then: float
) -> None:
    now = time.time()
    put(small, 0, 1, 2, 3, 4)
    set_clock(then)
    use(small, 0)
    put(small, 5)
    set_clock(now + 100)

    put(small, 6)

    # The one that was not used for longest went.
    assert kept(small) == [0, 2, 3, 4, 5, 6]


def test_clock_that_is_set_back_a_little_keeps_the_order(
    small: PrefixStore, set_clock: SetClock
) -> None:
    now = time.time()
    put(small, 0, 1, 2, 3, 4, 5)
    set_clock(now - 30)
    use(small, 0)

    put(small, 6)

    assert kept(small) == [0, 2, 3, 4, 5, 6]


def test_times_from_the_future_are_taken_back_whoever_wrote_them(
    small: PrefixStore,
) -> None:
    put(small, 0, 1, 2, 3, 4, 5)
    with sqlite3.connect(small.path / "index.db") as connection:
        for table in ("segments", "prefixes"):
            connection.execute(
                f"UPDATE {table} SET used_at = used_at + ?, created_at = created_at + ?"
                " WHERE rowid = 1",
                [YEARS, YEARS],
            )
    connection.close()
    # Makes room, and takes the times back.
    put(small, 6)

    use(small, *kept(small)[1:])
    put(small, 1)

    assert 0 not in kept(small)


def test_order_of_what_is_taken_back_stays(
    small: PrefixStore, set_clock: SetClock
) -> None:
    now = time.time()
    for i in (3, 1, 5, 0, 4, 2):
        set_clock(now + YEARS + 3600 * i)
        put(small, i)
    set_clock(now)

    put(small, 6)
    assert kept(small) == [0, 1, 2, 4, 5, 6]

    put(small, 3)
    assert kept(small) == [0, 2, 3, 4, 5, 6]


def test_age_is_never_counted_from_a_clock_that_was_behind(
    small: PrefixStore, set_clock: SetClock
) -> None:
    now = time.time()
    put(small, 0)
    set_clock(0.0)
    use(small, 0)
    put(small, 1)
    set_clock(now + 3600)

    plan = small.plan_prune(PrunePolicy(older_than=86_400))

    assert plan.removals == ()


def test_speed_from_the_future_is_not_believed(
    small: PrefixStore, set_clock: SetClock
) -> None:
    now = time.time()
    set_clock(now + YEARS)
    small.usage_log.add_speed(TINY, 1000, 1.0)
    small.usage_log.add_load(TINY, 1000, 1.0)
    set_clock(now)

    assert small.usage_log.prefill_speed(TINY) is None
    assert small.usage_log.estimate(TINY, 1000) is None


def test_rebuilt_index_has_no_times_from_the_future(
    small: PrefixStore, set_clock: SetClock
) -> None:
    now = time.time()
    set_clock(now + YEARS)
    put(small, 0)
    small.close()
    (small.path / "index.db").unlink()
    set_clock(now)

    [prefix] = json.loads(ok("ls", "--json", "--store", small.path).stdout)

    latest = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    assert prefix["created_at"] <= latest
