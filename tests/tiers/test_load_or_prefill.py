"""Loading where that is faster, and prefilling where that is."""

import time
from pathlib import Path
from typing import Any

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.segments.fingerprint import Fingerprint
from promptcache.store.types import LoadEstimate
from tests.helpers.commands import ok

PROMPT = [(11 * i) % 256 for i in range(1500)]
FINGERPRINT = Fingerprint("ab" * 16, "model")


def answered(generator: CachedGenerator, **options: Any) -> Any:
    responses = list(generator.stream_generate([*PROMPT, 1, 2], 8, **options))
    return [r.token for r in responses], responses[-1]


def measured(store: PrefixStore, fingerprint: Fingerprint, load: float) -> None:
    """Let 1,500 tokens take so many seconds to load, and one second to read."""
    for _ in range(40):
        store.usage_log.add_load(fingerprint, 1500, load)
        store.usage_log.add_speed(fingerprint, 1500, 1.0)


def test_nothing_is_known_until_both_were_measured(store: PrefixStore) -> None:
    assert store.usage_log.estimate(FINGERPRINT, 1000) is None
    store.usage_log.add_load(FINGERPRINT, 2000, 1.0)
    assert store.usage_log.estimate(FINGERPRINT, 1000) is None
    store.usage_log.add_speed(FINGERPRINT, 1000, 4.0)

    assert store.usage_log.estimate(FINGERPRINT, 1000) == LoadEstimate(0.5, 4.0)


def test_last_measurements_count_most(store: PrefixStore) -> None:
    store.usage_log.add_speed(FINGERPRINT, 1000, 1.0)
    for seconds in (8.0, *[2.0] * 10):
        store.usage_log.add_load(FINGERPRINT, 1000, seconds)

    estimate = store.usage_log.estimate(FINGERPRINT, 1000)
    assert estimate is not None
    assert estimate.load_seconds == pytest.approx(2.0, rel=0.01)


def test_short_loads_tell_nothing_of_the_bandwidth(store: PrefixStore) -> None:
    store.usage_log.add_speed(FINGERPRINT, 1000, 1.0)
    store.usage_log.add_load(FINGERPRINT, 100, 5.0)

    assert store.usage_log.estimate(FINGERPRINT, 1000) is None


def test_old_load_is_tried_again(
    store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(store, FINGERPRINT, load=9.0)
    assert store.usage_log.estimate(FINGERPRINT, 1000) is not None

    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)

    assert store.usage_log.estimate(FINGERPRINT, 1000) is None


@pytest.mark.parametrize(
    ("load", "prefill", "favours"),
    [(1.0, 0.5, True), (0.5, 1.0, False), (0.012, 0.001, False), (0.03, 0.001, True)],
)
def test_prefill_is_favoured_where_it_wins_enough(
    load: float, prefill: float, favours: bool
) -> None:
    assert LoadEstimate(load, prefill).prefill_is_faster is favours


@pytest.mark.parametrize(("load", "cached"), [(3.0, 0), (0.3, 1500)])
def test_generation_does_what_is_faster(
    model_dir: Path, tmp_path: Path, load: float, cached: int
) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        assert generator.store is not None
        generator.build(PROMPT)
        expected, _ = answered(generator, reuse=False, save=False)
        measured(generator.store, generator.fingerprint(), load)

        tokens, last = answered(generator, save=False)

        assert tokens == expected
        assert last.cached_tokens == cached
        explanation = generator.explain([*PROMPT, 1, 2])
        assert explanation.cached_tokens == 1500
        if cached:
            assert last.declined is None
            assert explanation.declined is None
        else:
            assert last.declined is not None
            assert last.declined.load_seconds == pytest.approx(3.0)
            assert "loading them takes 3.00 s here, reading" in explanation.verdict


def test_generation_measures_what_it_loads_and_reads(
    model_dir: Path, tmp_path: Path
) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        assert generator.store is not None
        answered(generator, save=True)
        assert generator.store.usage_log.estimate(generator.fingerprint(), 1500) is None
        _, last = answered(generator)

        estimate = generator.store.usage_log.estimate(generator.fingerprint(), 1501)

        assert last.cached_tokens == 1501
        assert estimate is not None
        assert estimate.load_seconds == pytest.approx(last.load_seconds)


def test_what_is_stored_is_not_saved_again_when_it_was_prefilled(
    model_dir: Path, tmp_path: Path
) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        store = generator.store
        assert store is not None
        generator.build(PROMPT)
        measured(store, generator.fingerprint(), load=3.0)
        before = store.total_nbytes()

        _, last = answered(generator, save=True)

        assert last.cached_tokens == 0
        assert store.total_nbytes() - before < before / 10
        assert store.verify().is_sound


def test_usage_and_explain_tell(model_dir: Path, tmp_path: Path) -> None:
    prompt = "What do you see from your window? " * 40
    options = ["--store", str(tmp_path / "store"), "-m", str(model_dir), "--raw"]
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        assert generator.store is not None
        generator.build(prompt)
        measured(generator.store, generator.fingerprint(), load=3.0)

    ask = [f"{prompt}And now?", "--max-tokens", "2"]
    result = ok("generate", *options, "-u", "--no-save", *ask)
    assert " 0 cached" in result.stderr
    assert "cached tokens were prefilled again: loading them takes" in result.stderr
    result = ok("explain", *options, ask[0])
    assert "they are prefilled all the same: loading them takes" in result.stdout
