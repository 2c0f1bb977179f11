"""Receipts and `promptcache stats`: what requests got from the store."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.engine.response import GenerationResponse
from promptcache.store.reports import Usage
from tests.helpers import tiny
from tests.helpers.adventures import read_only
from tests.helpers.commands import ok

WRITTEN = ("written_nbytes", "written_today_nbytes")
FIGURES = {
    "hits": int,
    "misses": int,
    "cached_tokens": int,
    "prefilled_tokens": int,
    "load_seconds": float,
    "prefill_seconds": float,
    "saved_seconds": float,
}
# Long enough to tell the model's speed.
MANUAL = list(range(3, 203))
QUESTION = [*MANUAL[:150], *range(100, 130)]
SHORT = [250, 251, 252]
# The start of every process is waited for, so that they get in each other's way.
MANY_RUNS = """
import json, sys
from promptcache import CachedGenerator

model, store, prompt, num_runs = json.loads(sys.argv[1])
generator = CachedGenerator.load(model, store=store)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(num_runs):
    for last in generator.stream_generate(prompt, max_tokens=1):
        print(last.cached_tokens)
"""


def run(
    generator: CachedGenerator, prompt: Any = None, **options: Any
) -> GenerationResponse:
    """Generate and return the last response."""
    options = {"max_tokens": 2, "save": True, **options}
    *_, last = generator.stream_generate(prompt or MANUAL, **options)
    return last


def usage(generator: CachedGenerator) -> list[Usage]:
    assert generator.store is not None
    return generator.store.usage()


def speed(generator: CachedGenerator) -> float | None:
    assert generator.store is not None
    return generator.store.usage_log.prefill_speed(generator.fingerprint())


def totals(rows: Sequence[Usage]) -> tuple[int, int, int, int]:
    """Return hits, misses, and the tokens cached and prefilled."""
    hits = sum(row.requests for row in rows if row.key)
    return (
        hits,
        sum(row.requests for row in rows) - hits,
        sum(row.cached_tokens for row in rows),
        sum(row.prefilled_tokens for row in rows),
    )


def stats(*args: str | Path) -> dict[str, Any]:
    """Return what `stats --json` tells, with exactly its fields."""
    value = json.loads(ok("stats", "--json", *args).stdout)
    assert list(value) == [*FIGURES, *WRITTEN, "by_model"]
    assert all(isinstance(value[name], int) for name in WRITTEN)
    for each in [value, *value["by_model"]]:
        for name, kind in FIGURES.items():
            assert isinstance(each[name], kind | int if kind is float else kind), name
    return dict(value)


@pytest.fixture
def other(tmp_path: Path, store: PrefixStore) -> CachedGenerator:
    """Another model that shares the store."""
    folder = tiny.save_model(tmp_path / "other", tiny.LLAMA, seed=5)
    return CachedGenerator.load(folder, store=store)


# What is counted


def test_new_store_has_no_figures(generator: CachedGenerator) -> None:
    assert usage(generator) == []
    assert speed(generator) is None
    assert totals(usage(generator)) == (0, 0, 0, 0)


def test_figures_are_exact_over_many_runs(generator: CachedGenerator) -> None:
    lasts = [run(generator, p) for p in (MANUAL, MANUAL, QUESTION, SHORT, QUESTION)]

    assert [last.cached_tokens for last in lasts] == [0, 199, 150, 0, 179]
    assert totals(usage(generator)) == (
        3,
        2,
        sum(last.cached_tokens for last in lasts),
        sum(last.prompt_tokens - last.cached_tokens for last in lasts),
    )
    rows = usage(generator)
    for name in ("load_seconds", "prefill_seconds", "saved_seconds"):
        told = sum(getattr(last, name) for last in lasts)
        assert sum(getattr(row, name) for row in rows) == pytest.approx(told)


def test_hits_count_for_the_prefix_that_was_reused(generator: CachedGenerator) -> None:
    assert generator.store is not None
    run(generator, MANUAL)
    run(generator, QUESTION)
    key = generator.store.segments.key_of(MANUAL, generator.fingerprint())
    generator.store.pin(key, "manual")

    run(generator, MANUAL)

    rows = {row.key: row for row in usage(generator)}
    assert rows[key].name == "manual"
    assert (rows[key].requests, rows[key].cached_tokens) == (2, 150 + 199)
    assert (rows[None].requests, rows[None].prefilled_tokens) == (1, 200)


def test_saved_seconds_are_cached_tokens_at_the_measured_speed(
    generator: CachedGenerator,
) -> None:
    first = run(generator, MANUAL)
    assert speed(generator)
    second = run(generator, QUESTION)

    tokens_a_second = speed(generator)

    assert tokens_a_second
    assert first.saved_seconds == 0
    assert second.saved_seconds == pytest.approx(150 / tokens_a_second)
    assert sum(row.saved_seconds for row in usage(generator)) == second.saved_seconds


def test_only_the_last_response_tells_what_was_saved(
    generator: CachedGenerator,
) -> None:
    run(generator)

    *before, last = generator.stream_generate(MANUAL, max_tokens=3)

    assert [response.saved_seconds for response in before] == [0, 0]
    assert last.saved_seconds > 0


def test_without_a_measured_speed_nothing_counts_as_saved(
    generator: CachedGenerator,
) -> None:
    run(generator, SHORT)
    last = run(generator, SHORT)

    assert last.cached_tokens == 2
    assert last.saved_seconds == 0
    assert speed(generator) is None


def test_speed_is_that_of_the_last_reads_mostly(
    store: PrefixStore, generator: Any
) -> None:
    fingerprint = generator.fingerprint()

    store.usage_log.add_speed(fingerprint, 100, 1.0)
    store.usage_log.add_speed(fingerprint, 300, 1.0)
    store.usage_log.add_speed(fingerprint, 63, 100.0)
    store.usage_log.add_speed(fingerprint, 100, 0.0)

    assert store.usage_log.prefill_speed(fingerprint) == (50 + 300) / (0.5 + 1.0)


def test_a_build_is_no_request_but_tells_the_speed(generator: CachedGenerator) -> None:
    generator.build(MANUAL)

    assert usage(generator) == []
    assert speed(generator)
    assert run(generator).saved_seconds > 0


def test_generation_closed_early_counts_once(generator: CachedGenerator) -> None:
    run(generator)
    for num_responses in (1, 2):
        responses = generator.stream_generate(MANUAL, max_tokens=2)
        for _ in range(num_responses):
            next(responses)
        responses.close()

    unread = generator.stream_generate(MANUAL, max_tokens=2)
    unread.close()

    assert totals(usage(generator)) == (2, 1, 2 * 199, 200 + 2)


def test_what_does_not_look_for_prefixes_counts_nothing(
    generator: CachedGenerator,
) -> None:
    run(generator, reuse=False)
    run(generator, QUESTION, reuse=False, save=False)

    assert usage(generator) == []


def test_figures_survive_reopening_and_removal(
    generator: CachedGenerator, store: PrefixStore
) -> None:
    run(generator)
    run(generator)
    before, fingerprint = store.usage(), generator.fingerprint()
    tokens_a_second = store.usage_log.prefill_speed(fingerprint)
    store.remove(store.segments.key_of(MANUAL, fingerprint))
    store.close()

    with PrefixStore(store.path) as reopened:
        assert reopened.usage() == before
        assert reopened.usage_log.prefill_speed(fingerprint) == tokens_a_second


def test_two_processes_at_once_lose_nothing(
    model_dir: Path, generator: CachedGenerator, store: PrefixStore
) -> None:
    run(generator)
    task = json.dumps([str(model_dir), str(store.path), MANUAL, 12])
    command = [sys.executable, "-c", MANY_RUNS, task]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    others = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for process in others:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"

    outputs = [process.communicate("go\n", timeout=60)[0] for process in others]

    assert [output.split() for output in outputs] == [["199"] * 12] * 2
    assert totals(store.usage()) == (24, 1, 24 * 199, 200 + 24)
    assert store.prefixes()[0].hits == 24


def test_read_only_store_breaks_nothing(model_dir: Path, tmp_path: Path) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        run(generator)
        run(generator)
        before = usage(generator)

    with (
        read_only(tmp_path / "store") as path,
        CachedGenerator.load(model_dir, store=path) as generator,
    ):
        last = run(generator, save=False)
        assert usage(generator) == before
        assert stats("--store", path)["hits"] == 1

    assert last.cached_tokens == 199


# The command


def test_stats_of_a_new_store_are_nothing(store: PrefixStore) -> None:
    assert stats() == {**dict.fromkeys([*FIGURES, *WRITTEN], 0), "by_model": []}
    result = ok("stats")
    assert result.stdout == ""
    assert result.stderr == (
        "0 hits, 0 misses, 0.0 s saved, 0.0 s loaded, 0 B written, 0 B of it today\n"
    )


def test_stats_json_sums_up_by_model_and_prefix(
    generator: CachedGenerator, other: CachedGenerator, store: PrefixStore
) -> None:
    generator.build(MANUAL, name="manual")
    for each in (generator, generator, other, other, other):
        run(each)

    value = stats()

    assert (value["hits"], value["misses"]) == (4, 1)
    assert (value["cached_tokens"], value["prefilled_tokens"]) == (4 * 199, 204)
    models = {model["model"]: model for model in value["by_model"]}
    assert list(models) == ["llama", "other"]
    assert (models["llama"]["hits"], models["llama"]["misses"]) == (2, 0)
    assert (models["other"]["hits"], models["other"]["misses"]) == (2, 1)
    (prefix,) = models["llama"]["by_prefix"]
    assert prefix["key"] == store.resolve("manual").key
    assert (prefix["name"], prefix["hits"]) == ("manual", 2)
    for name in FIGURES:
        told = sum(model[name] for model in models.values())
        assert value[name] == pytest.approx(told)


def test_stats_prints_a_table(generator: CachedGenerator) -> None:
    generator.build(MANUAL, name="manual")
    run(generator)
    run(generator, SHORT)

    result = ok("stats")

    headers, *rows = [line.split() for line in result.stdout.splitlines()]
    assert headers[:6] == ["MODEL", "PREFIX", "HITS", "MISSES", "CACHED", "PREFILLED"]
    assert headers[6:] == ["LOADED", "SAVED"]
    assert [row[:6] for row in rows] == [
        ["llama", "manual", "1", "0", "199", "1"],
        ["llama", "(none)", "0", "1", "0", "3"],
    ]
    assert result.stderr.startswith("1 hits, 1 misses, ")


def test_generate_json_tells_what_was_saved(
    model_dir: Path, store: PrefixStore, generator: CachedGenerator
) -> None:
    args = ["-m", model_dir, "Hello " * 40, "--max-tokens", "2", "--json"]

    first = json.loads(ok("generate", *args, "--save").stdout)
    second = json.loads(ok("generate", *args).stdout)
    ok("generate", *args, "--no-cache")

    assert first["saved_seconds"] == 0
    tokens_a_second = store.usage_log.prefill_speed(generator.fingerprint())
    assert tokens_a_second
    expected = second["cached_tokens"] / tokens_a_second
    assert second["saved_seconds"] == pytest.approx(expected)
    value = stats()
    assert (value["hits"], value["misses"]) == (1, 1)
    assert value["saved_seconds"] == second["saved_seconds"]


def test_prompts_that_share_a_templates_first_tokens_only_are_misses(
    generator: CachedGenerator,
) -> None:
    def ask(system: str) -> None:
        said = [
            {"role": "system", "content": f"{system} " * 20},
            {"role": "user", "content": "Hi"},
        ]
        list(generator.stream_generate(said, max_tokens=1, save=True))

    for system in ("Alpha", "Beta", "Gamma"):
        ask(system)
    ask("Alpha")

    rows = usage(generator)
    assert sum(row.requests for row in rows if row.key is None) == 3
    assert sum(row.requests for row in rows if row.key is not None) == 1
