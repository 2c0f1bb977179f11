"""The saver: order, what is given up, and that nothing but `wait` waits."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning
from promptcache.kvcache import snapshot
from promptcache.models.loaded import LoadedModel
from promptcache.models.prefill_plan import DEFAULT_PLAN
from promptcache.models.settings import DEFAULT_SETTINGS
from promptcache.tiers.background_writer import BackgroundWriter
from promptcache.tiers.prefix_saver import PrefixSaver, SaveJob
from tests.helpers.memory import MODEL, ids, read

LOADED = LoadedModel(MODEL)
FINGERPRINT = LOADED.fingerprint()


def job_of(token_ids: list[int], **options: Any) -> SaveJob:
    cache, _ = read(token_ids)
    end = len(token_ids)
    return SaveJob(
        token_ids,
        FINGERPRINT,
        cache,
        [snapshot.capture(cache, 0, end)],
        DEFAULT_PLAN,
        DEFAULT_SETTINGS,
        end,
        end,
        **options,
    )


@pytest.fixture
def writer() -> Iterator[BackgroundWriter]:
    writer = BackgroundWriter(max_nbytes=10**6)
    yield writer
    writer.close()


@pytest.fixture
def saver(store: PrefixStore, writer: BackgroundWriter) -> PrefixSaver:
    return PrefixSaver(store, writer)


def cached(store: PrefixStore, token_ids: list[int]) -> int:
    return store.lookup(token_ids, FINGERPRINT).cached_tokens


def test_job_is_stored_under_its_key_and_holds_no_arrays_then(
    saver: PrefixSaver, store: PrefixStore
) -> None:
    job = job_of(ids(90, 1))
    saver.submit(job)

    key = saver.wait(job)

    assert key == store.segments.key_of(job.token_ids, FINGERPRINT)
    assert [prefix.key for prefix in store.prefixes()] == [key]
    assert (job.cache, job.snapshots, len(saver)) == ((), (), 0)


def test_what_another_job_has_handed_over_is_not_encoded_again(
    saver: PrefixSaver, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, longer = job_of(ids(60, 1)), job_of(ids(90, 1))
    spans: list[tuple[int, int]] = []
    encode = SaveJob.encode

    def noted(job: SaveJob, part: Any) -> Any:
        spans.append((part.start, part.stop))
        return encode(job, part)

    monkeypatch.setattr(SaveJob, "encode", noted)
    saver.submit(first)
    saver.submit(longer)
    saver.finish()

    assert spans == [(0, 60), (60, 90)]
    assert cached(store, ids(90, 1)) == 90


def test_advance_never_waits_for_a_writer_that_has_no_room(
    saver: PrefixSaver, writer: BackgroundWriter, store: PrefixStore
) -> None:
    go_on = threading.Event()
    writer.submit(lambda: go_on.wait(10) and None, 10**6)
    job = job_of(ids(90, 1))
    saver.submit(job)

    assert not saver.advance()
    assert saver.nbytes == job.nbytes > 0
    go_on.set()
    writer.wait()

    assert saver.advance()
    assert saver.wait(job)
    assert cached(store, ids(90, 1)) == 90


def test_oldest_jobs_are_given_up_beyond_a_limit(
    saver: PrefixSaver, store: PrefixStore
) -> None:
    old, new = job_of(ids(90, 1)), job_of(ids(90, 2))
    saver.submit(old)
    saver.submit(new)

    saver.hold(new.nbytes)
    saver.finish()

    assert old.done.cancelled()
    with pytest.raises(CancelledError):
        saver.wait(old)
    assert [cached(store, ids(90, seed)) for seed in (1, 2)] == [0, 90]


def test_failure_is_the_result_of_its_job_and_of_no_other(
    saver: PrefixSaver, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = job_of(ids(90, 1)), job_of(ids(90, 2))
    bad.snapshots = []

    saver.submit(bad)
    saver.submit(good)
    saver.finish()

    with pytest.raises(Exception, match="meanwhile"):
        saver.wait(bad)
    assert saver.wait(good)
    assert [cached(store, ids(90, seed)) for seed in (1, 2)] == [90, 0]


def test_part_whose_handing_over_was_interrupted_is_handed_over_again(
    saver: PrefixSaver, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(ids(90, 1))
    encode, calls = SaveJob.encode, []

    def interrupted(job: SaveJob, part: Any) -> Any:
        calls.append(part)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return encode(job, part)

    monkeypatch.setattr(SaveJob, "encode", interrupted)
    saver.submit(job)
    with pytest.raises(KeyboardInterrupt):
        saver.wait(job)

    assert saver.wait(job)
    assert len(calls) == 2
    assert cached(store, ids(90, 1)) == 90


@pytest.mark.parametrize("is_handed_over", [False, True], ids=["before", "after"])
def test_end_whose_handing_over_was_interrupted_is_not_waited_for_in_vain(
    saver: PrefixSaver,
    writer: BackgroundWriter,
    store: PrefixStore,
    monkeypatch: pytest.MonkeyPatch,
    is_handed_over: bool,
) -> None:
    submit, calls = writer.submit, []

    def interrupted(job: Any, nbytes: int) -> Any:
        calls.append(nbytes)
        future = submit(job, nbytes) if is_handed_over or len(calls) != 2 else None
        if len(calls) == 2:
            raise KeyboardInterrupt
        return future

    job = job_of(ids(90, 1))
    saver.submit(job)
    monkeypatch.setattr(writer, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saver.wait(job)
    # The rows were handed over, and then the end, which holds no bytes.
    assert calls[0] > 0 == calls[1]

    waiting = threading.Thread(target=saver.wait, args=[job], daemon=True)
    waiting.start()
    waiting.join(10)

    assert not waiting.is_alive()
    assert cached(store, ids(90, 1)) == 90
    saver.finish()
    assert len(saver) == 0


PROMPT = [i % 250 for i in range(700)]


def tokens_of(stream: Any) -> list[int]:
    return [response.token for response in stream]


def test_generation_goes_on_when_its_generator_is_closed(
    model_dir: Path, tmp_path: Path
) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "other") as other:
        expected = tokens_of(other.stream_generate(PROMPT, 8, reuse=False, save=False))
    generator = CachedGenerator.load(model_dir, store=tmp_path / "store")
    stream = generator.stream_generate(PROMPT, 8, save=True)
    answer = [next(stream).token]
    generator.close()

    with pytest.warns(PromptCacheWarning, match="the prompt is not saved") as record:
        answer += tokens_of(stream)

    assert answer == expected
    assert len(record) == 1


@pytest.mark.parametrize("method", ["lookup", "missing"])
def test_any_trouble_with_the_store_is_one_warning(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        assert generator.store is not None
        cold = generator.stream_generate(PROMPT, 8, reuse=False, save=False)
        expected = tokens_of(cold)
        broken = generator.store if method == "lookup" else generator.store.segments

        def fail(*args: Any, **options: Any) -> Any:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(broken, method, fail)
        with pytest.warns(PromptCacheWarning, match="not saved|going on") as record:
            answer = tokens_of(generator.stream_generate(PROMPT, 8, save=True))

    assert answer == expected
    assert len(record) == 1


def test_generation_looks_a_prefix_up_once(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [i % 250 for i in range(700)]
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        assert generator.store is not None
        generator.build(prompt)
        lookup, calls = generator.store.lookup, []

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(args)
            return lookup(*args, **options)

        monkeypatch.setattr(generator.store, "lookup", counted)
        for tier in ("disk", "memory"):
            calls.clear()
            responses = [*generator.stream_generate([*prompt, 1, 2], 2, save=False)]
            assert responses[-1].cached_tokens >= 700
            assert len(calls) == 1, tier
