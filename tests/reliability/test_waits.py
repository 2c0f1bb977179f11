"""A process that is stopped does not stop the others."""

import contextlib
import os
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning, locks
from promptcache.errors import StoreError, StoreFullError
from promptcache.locks import Patience
from promptcache.store.reports import PrunePolicy
from tests.helpers import commands, workers
from tests.helpers.segments import TINY, blob_paths, cached_tokens, save, tokens

# They measure times and memory.
pytestmark = pytest.mark.alone

OLD, NEW = tokens(70), [9, *tokens(40)]
# What holds each of the locks that a save needs.
WRITERS = ["hold_room", "hold_write"]


@contextlib.contextmanager
def suspended(job: str, folder: Path, number: int = 0) -> Iterator["Popen[str]"]:
    """Run a process that holds a lock, and stop it there."""
    process = workers.start(job, folder, number)
    assert process.stdout
    assert process.stdout.readline() == "ready\n", process.communicate()
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def taking_less_than(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[PrefixStore]:
    """A store whose saves give up soon."""
    with PrefixStore(tmp_path / "store", patience=Patience(0.3)) as store:
        save(store, OLD)
        yield store


@pytest.mark.parametrize("job", WRITERS)
def test_save_gives_up_and_says_who_is_stopped(
    impatient: PrefixStore, job: str
) -> None:
    with (
        suspended(job, impatient.path) as process,
        taking_less_than(3),
        pytest.raises(StoreError, match=rf"process {process.pid} .*, which is stopped"),
    ):
        save(impatient, NEW)

    save(impatient, NEW)


@pytest.mark.parametrize("job", WRITERS)
def test_generation_goes_on_with_one_warning(
    model_dir: Path, impatient: PrefixStore, job: str
) -> None:
    prompt = list(range(100, 160))
    with CachedGenerator.load(model_dir, store=impatient, save=True) as generator:
        plain = [r.token for r in generator.stream_generate(prompt, 4, save=False)]
        with (
            suspended(job, impatient.path),
            taking_less_than(4),
            warnings.catch_warnings(record=True) as told,
        ):
            warnings.simplefilter("always", PromptCacheWarning)
            responses = [*generator.stream_generate(prompt, 4)]

    assert [r.token for r in responses] == plain
    assert len(told) == 1
    assert "locked by process" in str(told[0].message)


def test_lookups_do_not_wait_while_a_save_does(tmp_path: Path) -> None:
    told: list[str] = []
    with PrefixStore(tmp_path, patience=Patience(60, told.append)) as store:
        save(store, OLD)
        with suspended("hold_write", tmp_path) as process:
            saving = threading.Thread(target=save_quietly, args=(store, NEW))
            saving.start()
            wait_until(lambda: told)
            with taking_less_than(0.2):
                assert cached_tokens(store, OLD) == len(OLD)
            assert told[0].startswith(f"waiting for process {process.pid} ")
            # What a closed store has others wait for ends at once.
            with taking_less_than(1):
                store.close()
                saving.join()


def save_quietly(store: PrefixStore, token_ids: list[int]) -> None:
    with contextlib.suppress(StoreError):
        save(store, token_ids)


def wait_until(is_so: object) -> None:
    deadline = time.monotonic() + 20
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_build_does_not_wait_for_a_builder_that_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "SAVE_SECONDS", 0.3)
    monkeypatch.setattr(locks, "TELL_SECONDS", 0.1)
    told: list[str] = []
    waits: list[bool] = []
    with (
        PrefixStore(tmp_path, patience=Patience(60, told.append)) as store,
        suspended("hold_build", tmp_path) as process,
        taking_less_than(5),
        store.segments.building("ab" * 16, lambda: waits.append(True)),
    ):
        assert waits == [True]

    assert told[0].startswith(f"waiting for process {process.pid} ")
    assert told[1].startswith("waiting no longer: ")


def test_command_says_whom_it_waits_for_and_ends_when_interrupted(
    tmp_path: Path,
) -> None:
    with PrefixStore(tmp_path) as store:
        key = save(store, OLD)
    with suspended("hold_write", tmp_path) as process:
        command = commands.start("rm", key, "-y", "--store", tmp_path)
        assert command.stderr
        line = command.stderr.readline()
        with taking_less_than(1):
            command.send_signal(signal.SIGINT)
            _, errors = command.communicate(timeout=20)

    assert line.startswith(f"promptcache: waiting for process {process.pid} ")
    assert command.returncode == 130, errors


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells what is open")
def test_interrupted_generation_does_not_wait_for_its_save(
    model_dir: Path, tmp_path: Path
) -> None:
    PrefixStore(tmp_path).close()
    options = ["-m", model_dir, "--raw", "--save", "--max-tokens", "1"]
    with suspended("hold_room", tmp_path):
        command = commands.start("generate", "word", *options, "--store", tmp_path)
        # The writer's thread waits for the lock of the folder that it has opened.
        wait_until(lambda: str(tmp_path / "tmp") in opened_by(command.pid))
        with taking_less_than(3):
            command.send_signal(signal.SIGINT)
            _, errors = command.communicate(timeout=20)

    assert command.returncode == 130, errors


def opened_by(pid: int) -> set[str]:
    """Return what a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(link))
    return found


def test_wal_that_a_stopped_reader_keeps_evicts_nothing(tmp_path: Path) -> None:
    with PrefixStore(tmp_path, min_free_nbytes=0) as store:
        for i in range(20):
            save(store, [i, *tokens(40)], width=100)
        store._index.database.shrink()
        store.max_nbytes = store.total_nbytes()
        with suspended("hold_read", tmp_path) as process, taking_less_than(10):
            for i in range(20, 22):
                save(store, [i, *tokens(40)], width=100)
            kept = len(blob_paths(store))
            wal_nbytes = (tmp_path / "index.db-wal").stat().st_size
            plan = store.plan_prune(PrunePolicy(max_nbytes=store.max_nbytes))
            assert store._index.database.reader().pid == process.pid  # type: ignore[union-attr]

        # As many as came, and one or two for rows.
        assert store.num_evicted <= 4
        assert kept >= 18
        assert wal_nbytes > 30_000
        assert plan.removals == ()
        save(store, [99, *tokens(40)])
        assert store.total_nbytes() <= store.max_nbytes


def test_wal_that_takes_too_much_ends_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptcache.store.maintenance.disk_budget.WAL_NBYTES", 20_000)
    with PrefixStore(tmp_path, min_free_nbytes=0) as store:
        save(store, OLD, width=100)
        store.max_nbytes = store.total_nbytes() + 40_000
        with suspended("hold_read", tmp_path) as process:
            with pytest.raises(StoreFullError, match=rf"kept by process {process.pid}"):
                for i in range(50):
                    save(store, [i, *tokens(40)])
            assert cached_tokens(store, OLD) == len(OLD)


def test_wait_for_sqlite_is_bounded_when_a_store_is_opened(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "index.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")

    with taking_less_than(2), pytest.raises(StoreError, match="locked"):
        PrefixStore(tmp_path, patience=Patience(0.2))

    connection.close()
    with PrefixStore(tmp_path) as store:
        assert store.lookup(OLD, TINY).cached_tokens == 0
