"""A process killed at any step loses nothing that it said it saved."""

import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from promptcache.store import PrefixStore
from promptcache.store.reports import PrunePolicy
from tests.helpers.marks import all_but
from tests.helpers.segments import TINY, save, tokens
from tests.helpers.steps import Step, steps_of
from tests.reliability import crash

SEED = 20_261_125


def harness(*arguments: object, **environment: str) -> int:
    """Run the harness; return how many kills the store survived."""
    command = [sys.executable, "-m", crash.__name__, *map(str, arguments)]
    process = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    # It tells step and seed.
    assert process.returncode == 0, process.stdout + process.stderr
    return int(process.stdout.split()[-1])


@pytest.mark.parametrize(
    "job", all_but(["save"], [name for name in crash.JOBS if name != "build"])
)
def test_process_killed_at_any_step_of_a_job_loses_nothing(job: str) -> None:
    assert harness(job) >= 15


@pytest.mark.parametrize("every", all_but([15], [1, 15]))
def test_process_killed_at_any_step_of_a_build_loses_nothing(
    model_dir: Path, every: int
) -> None:
    assert harness("build", every, CRASH_MODEL=str(model_dir)) >= 60 // every


@pytest.mark.parametrize("every", all_but([4], [1, 4]))
def test_process_killed_at_any_step_of_a_download_leaves_none_or_all(
    every: int,
) -> None:
    assert harness("download", every) >= 20 // every


@pytest.mark.parametrize("number", all_but([10], [10, 60]))
def test_process_killed_at_random_times_loses_nothing(number: int) -> None:
    assert harness("random", number, SEED) == number


# The order of the steps, which is what a loss of power would try


def steps_on(store: PrefixStore, act: Callable[[PrefixStore], object]) -> list[Step]:
    """Return the steps of something that is done to a store, which is opened anew."""

    def run() -> None:
        with PrefixStore(store.path) as opened:
            act(opened)

    return steps_of(run)


def positions(steps: list[Step], deed: str, pattern: str) -> list[int]:
    return [
        i
        for i, step in enumerate(steps)
        if step.deed == deed and re.search(pattern, step.subject)
    ]


def test_row_is_inserted_after_its_blob_is_durable(store: PrefixStore) -> None:
    steps = steps_on(store, lambda s: save(s, tokens(5000)))
    if sys.platform == "darwin":
        pytest.skip("a Mac has another call than fsync")

    inserts = positions(steps, "sql", "INSERT INTO segments")
    renames = positions(steps, "rename", r"/tmp/.* .*/blobs/")
    assert len(inserts) == len(renames) == 3
    start = 0
    for renamed, inserted in zip(renames, inserts, strict=True):
        tmp, path = steps[renamed].subject.split(" ")
        written = positions(steps[:renamed], "write", re.escape(tmp))
        synced = positions(steps[:renamed], "fsync", re.escape(tmp))
        named = positions(steps[:inserted], "fsync", f"{Path(path).parent}$")
        committed = inserted + positions(steps[inserted:], "sql", "^COMMIT")[0]
        assert start < written[-1] < synced[-1] < renamed < named[-1] < inserted
        assert inserted < committed
        start = renamed


def test_new_folder_of_blobs_is_durable_before_what_is_in_it(
    store: PrefixStore,
) -> None:
    steps = steps_on(store, lambda s: save(s, tokens(40)))

    (made,) = positions(steps, "mkdir", "/blobs/")
    (opened,) = positions(steps, "open", r"/tmp/.*safetensors")
    assert sys.platform == "darwin" or made < positions(steps, "fsync", "blobs$")[0]
    assert made < opened


@pytest.mark.parametrize("deed", ["remove", "prune"])
def test_row_is_gone_for_good_before_its_blob_goes(
    store: PrefixStore, deed: str
) -> None:
    key = save(store, tokens(40))
    plan = store.plan_prune(PrunePolicy(model="tiny"))

    steps = steps_on(
        store, lambda s: s.remove(key) if deed == "remove" else s.execute(plan)
    )

    deleted = positions(steps, "sql", "DELETE FROM segments")[-1]
    committed = deleted + positions(steps[deleted:], "sql", "^COMMIT")[0]
    assert committed < positions(steps, "unlink", r"/blobs/")[0]


def test_commits_are_durable(store: PrefixStore) -> None:
    connection = store._index.database._connection

    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert sqlite3.threadsafety == 3


def test_pins_are_durable_before_they_are_told(store: PrefixStore) -> None:
    key = save(store, tokens(40))

    steps = steps_on(store, lambda s: s.pin(key, "name"))

    renamed = positions(steps, "rename", r"prefixes\.json$")[0]
    committed = positions(steps, "sql", "^COMMIT")[-1]
    assert renamed < committed
    assert sys.platform == "darwin" or positions(steps, "fsync", r"/tmp/prefixes")


def test_steps_are_seen(store: PrefixStore) -> None:
    steps = steps_on(store, lambda s: save(s, tokens(40)))

    seen = {step.deed for step in steps}
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "sql"} <= seen
    assert store.lookup(tokens(40), TINY).cached_tokens == 40
