"""Processes that share a store do not disturb each other."""

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, Popen

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.errors import StoreError
from promptcache.store.reports import PrunePolicy
from tests.helpers import workers
from tests.helpers.invariants import check_invariants
from tests.helpers.marks import all_but
from tests.reliability import soak_processes

SEED = 7
PROMPT = [i % 250 for i in range(100)]


@pytest.mark.parametrize("seconds", all_but([3.0], [3.0, 20.0]))
def test_eight_processes_share_a_store_without_errors_or_wrong_tokens(
    seconds: float,
) -> None:
    done = soak_processes.run(seconds, SEED)

    assert set(done) == set(soak_processes.JOBS)
    assert min(done.values()) >= 1


BUILD = """
import sys
from promptcache import CachedGenerator

with CachedGenerator.load(sys.argv[1], store=sys.argv[2]) as generator:
    print("ready", flush=True)
    sys.stdin.read()
    prefix = generator.build(
        [i % 250 for i in range(2000)],
        prefill_step_size=64,
        on_wait=lambda: print("waits", flush=True),
    )
    print("cached", prefix.cached_tokens, prefix.key)
"""


def test_same_prefix_is_built_once_while_the_others_wait(
    model_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", BUILD, str(model_dir), str(tmp_path / "store")]
    processes = [
        Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin
        process.stdin.close()
        process.stdin = None
    told = [process.communicate(timeout=120) for process in processes]

    outputs = sorted(output.split() for output, _ in told)
    *said, key = outputs[0]
    assert said == ["cached", "0"], told
    assert outputs[1:] == [["waits", "cached", "2000", key]] * 2, told
    check_invariants(tmp_path / "store")


def test_prefix_that_is_being_loaded_survives_prune(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    with CachedGenerator.load(model_dir, store=path, memory_limit=0) as generator:
        generator.build(PROMPT, prefill_step_size=32)
        plain = [r.token for r in generator.stream_generate(PROMPT, 6, reuse=False)]
        pruned = prune_while_loading(path, monkeypatch)
        responses = [*generator.stream_generate(PROMPT, 6, save=False)]

    assert pruned == [True]
    assert [r.token for r in responses] == plain
    assert responses[-1].cached_tokens == 99


def prune_while_loading(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let another process evict everything once all files of a load are open."""
    from promptcache.kvcache.loading.segment_loader import LoadedSegment, SegmentLoad

    pruned: list[bool] = []
    finish = SegmentLoad.finish

    def pruned_first(reading: SegmentLoad) -> LoadedSegment:
        if not pruned:
            code = (
                "import sys; from promptcache import PrefixStore, PrunePolicy\n"
                "with PrefixStore(sys.argv[1]) as store:\n"
                "    store.execute(store.plan_prune(PrunePolicy(older_than=-1)))"
            )
            subprocess.run([sys.executable, "-c", code, str(path)], check=True)
            pruned.append(not list(path.glob("blobs/*/*.safetensors")))
        return finish(reading)

    monkeypatch.setattr(SegmentLoad, "finish", pruned_first)
    return pruned


def test_plan_of_a_prune_keeps_what_was_used_meanwhile(
    model_dir: Path, tmp_path: Path
) -> None:
    with CachedGenerator.load(model_dir, store=tmp_path / "store") as generator:
        built = generator.build(PROMPT)
    with PrefixStore(tmp_path / "store") as store:
        plan = store.plan_prune(PrunePolicy(older_than=0.0))
        store.pin(built.key, "name")
        store.execute(plan)

        assert [prefix.key for prefix in store.prefixes()] == [built.key]


def test_build_that_is_evicted_at_once_says_so(
    generator: CachedGenerator, store: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = store.resolve

    def evicted_first(key: str, namespace: str | None) -> object:
        store.execute(store.plan_prune(PrunePolicy(older_than=-1.0)))
        return resolve(key, namespace=namespace)

    monkeypatch.setattr(store, "resolve", evicted_first)

    with pytest.raises(StoreError, match="evicted by another process already"):
        generator.build(PROMPT)


def test_limit_is_exceeded_by_no_more_than_a_segment(tmp_path: Path) -> None:
    path, limit = tmp_path / "store", 3_000_000
    PrefixStore(path).close()
    command = [
        sys.executable,
        "-m",
        workers.__name__,
        "save_wide",
        str(path),
        str(limit),
    ]
    processes = [Popen(command, stdout=PIPE) for _ in range(4)]

    most = 0
    while any(process.poll() is None for process in processes):
        most = max(most, soak_processes.files_nbytes_now(path))

    assert [process.returncode for process in processes] == [0] * 4
    assert limit / 2 < most <= limit + workers.WIDE_NBYTES
