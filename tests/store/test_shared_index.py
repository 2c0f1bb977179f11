"""One index: opened many times in a process, and replaced under live processes."""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from subprocess import Popen

import pytest

from promptcache import CachedGenerator, PrefixStore
from promptcache.errors import StoreError
from promptcache.store.maintenance import prune
from promptcache.store.reports import PrunePolicy
from tests.helpers import workers
from tests.helpers.invariants import check_invariants, check_modes
from tests.helpers.segments import (
    TINY,
    blob_paths,
    cached_tokens,
    expected_key,
    save,
    tokens,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store"


def prompt(number: int) -> list[int]:
    return [number, *tokens(40)]


Elsewhere = Callable[..., None]


@pytest.fixture(scope="module")
def other() -> Iterator["Popen[str]"]:
    """Another process, which does what it is asked to."""
    with workers.start("obey", Path()) as process:
        yield process
        assert process.communicate(timeout=60) == ("", "")


@pytest.fixture
def elsewhere(other: "Popen[str]") -> Elsewhere:
    return partial(workers.elsewhere, other)


def lost(path: Path, numbers: range) -> list[int]:
    """Return which of the prompts that were saved a new process does not find."""
    with PrefixStore(path) as store:
        check_invariants(path)
        return [n for n in numbers if cached_tokens(store, prompt(n)) != 41]


# Several stores in one process


def test_saves_of_a_process_with_two_stores_are_not_lost(
    path: Path, elsewhere: Elsewhere
) -> None:
    with PrefixStore(path) as first, PrefixStore(path):
        save(first, prompt(0))
        elsewhere("list_prefixes", path)
        save(first, prompt(1))
        elsewhere("save_one", path, 2)
        save(first, prompt(3))

    assert lost(path, range(4)) == []


def test_saves_of_threads_that_open_and_close_stores_are_not_lost(
    path: Path, elsewhere: Elsewhere
) -> None:
    PrefixStore(path).close()

    def work(first: int) -> None:
        with PrefixStore(path) as store:
            for number in range(first, first + 8):
                save(store, prompt(number))
                PrefixStore(path).close()

    threads = [threading.Thread(target=work, args=[8 * i]) for i in range(2)]
    for thread in threads:
        thread.start()
    elsewhere("open_often", path, 16)
    for thread in threads:
        thread.join()

    assert lost(path, range(24)) == []


def test_generators_of_one_process_lose_nothing(
    path: Path, elsewhere: Elsewhere, model_dir: Path
) -> None:
    with ExitStack() as stack:
        generators = [
            stack.enter_context(CachedGenerator.load(model_dir, store=path))
            for _ in range(2)
        ]
        elsewhere("list_prefixes", path)
        generators[0].build(tokens(50), name="narrator")
        elsewhere("save_one", path, 1)
        generators[1].build(tokens(50, first=7), name="other")

    with PrefixStore(path) as store:
        assert {prefix.name for prefix in store.prefixes()} == {
            *("narrator", "other", None)
        }


LIFE = """
import sys
from pathlib import Path

opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)

from tests.helpers import workers
workers.live(Path(sys.argv[1]))
print(*(str(args[0]) for args in opened if "index.db" in str(args[0])), sep="\\n")
assert any("safetensors" in str(args[0]) for args in opened)
"""


def test_only_sqlite_opens_its_files(path: Path) -> None:
    command = [sys.executable, "-c", LIFE, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}

    output = subprocess.check_output(command, env=environment, text=True)

    assert output.split() == []


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o177])
def test_index_is_private_from_the_start(path: Path, umask: int) -> None:
    PrefixStore(path).close()
    (path / "index.db").unlink()
    before = os.umask(umask)
    try:
        with PrefixStore(path) as store:
            save(store, prompt(0))
            check_modes(path)
    finally:
        os.umask(before)


def test_index_of_a_process_killed_while_it_made_it_becomes_private(
    path: Path,
) -> None:
    PrefixStore(path).close()
    (path / "index.db").write_bytes(b"")
    (path / "index.db").chmod(0o644)

    with PrefixStore(path) as store:
        save(store, prompt(0))
        check_modes(path)


# An index that is replaced under a live process


def delete(path: Path) -> None:
    (path / "index.db").unlink()


def delete_all(path: Path) -> None:
    for file in path.glob("index.db*"):
        file.unlink()


def damage(path: Path) -> None:
    """Leave it to the next process to set the index aside."""
    with closing(sqlite3.connect(path / "index.db", isolation_level=None)) as damaged:
        damaged.execute("PRAGMA user_version=1")


def set_aside(path: Path) -> None:
    workers.set_index_aside(path, 0)


def restore(path: Path) -> None:
    """Put a copy of the whole folder in its place, as from a backup."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("index.db-*"))
    path.rename(path.with_name("moved"))
    copy.rename(path)


def delete_folder(path: Path) -> None:
    shutil.rmtree(path)


REPLACERS = [delete, delete_all, damage, set_aside, restore, delete_folder]


@pytest.mark.parametrize("replace", REPLACERS)
def test_index_that_is_replaced_is_followed(
    path: Path, elsewhere: Elsewhere, replace: Callable[[Path], None]
) -> None:
    with PrefixStore(path) as store, PrefixStore(path) as idle:
        save(store, prompt(0))
        save(idle, prompt(1))
        replace(path)
        elsewhere("save_pinned", path, 2)

        assert cached_tokens(store, prompt(2)) == 41
        save(store, prompt(3))
        plan = store.plan_prune(PrunePolicy(max_nbytes=0))
        assert expected_key(TINY.digest, prompt(2)) not in [
            r.key for r in plan.removals
        ]
        idle.execute(plan)

        assert [blob.stem for blob in blob_paths(store)] == [
            expected_key(TINY.digest, prompt(2))
        ]
        save(store, prompt(4))
        elsewhere("save_one", path, 5)
        save(idle, prompt(6))

    assert lost(path, range(2, 7)) == [3]


def test_prune_that_was_planned_before_keeps_what_the_new_index_pins(
    path: Path,
    elsewhere: Elsewhere,
) -> None:
    with PrefixStore(path, max_nbytes=10**9) as store:
        key = save(store, prompt(0))
        plan = store.plan_prune(PrunePolicy(older_than=-1))
        delete(path)
        elsewhere("save_pinned", path, 0)

        store.execute(plan)

        assert store.resolve("pinned").key == key
    assert lost(path, range(1)) == []


@pytest.mark.parametrize("replace", [delete, delete_all, set_aside])
def test_process_that_ends_with_the_old_index_leaves_the_new_one_alone(
    path: Path, elsewhere: Elsewhere, replace: Callable[[Path], None]
) -> None:
    old = PrefixStore(path)
    save(old, prompt(0))
    replace(path)
    elsewhere("save_pinned", path, 1)
    with PrefixStore(path) as store:
        save(store, prompt(2))
        wal = (path / "index.db-wal").stat()

        old.close()

        assert (path / "index.db-wal").stat().st_ino == wal.st_ino
        save(store, prompt(3))
        elsewhere("save_one", path, 4)
    assert lost(path, range(5)) == []


def test_transaction_is_whole_before_the_index_moves(path: Path) -> None:
    with PrefixStore(path) as store:
        save(store, prompt(0))
        with store._index.database.writing():
            key = expected_key(TINY.digest, prompt(0))
            store._index.prefixes.set_name(key, "a")
            mover = threading.Thread(target=set_aside, args=[path])
            mover.start()
            mover.join(0.3)
            assert (path / "index.db").exists()
        mover.join()

        assert not (path / "index.db").exists()
        assert cached_tokens(store, prompt(0)) == 41


def test_what_was_written_to_an_index_that_lost_its_name_is_no_success(
    path: Path,
) -> None:
    with PrefixStore(path) as store:
        save(store, prompt(0))
        with (
            pytest.raises(StoreError, match="replaced meanwhile, try again"),
            store._index.database.writing(),
        ):
            delete(path)

        store.pin(save(store, prompt(0)), "name")
    assert lost(path, range(1)) == []


def test_no_blob_goes_by_what_a_replaced_index_says(path: Path) -> None:
    with PrefixStore(path) as store:
        key = save(store, prompt(0))
        store._index.remove_leaf(key)
        database = store._index.database
        with pytest.raises(StoreError, match="replaced"), database.writing():
            delete(path)
            prune.remove_blobs(store._index, store._blobs, [key])

        assert [blob.stem for blob in blob_paths(store)] == [key]


def test_what_cannot_be_looked_at_is_not_taken_for_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PrefixStore(path) as store:
        save(store, prompt(0))
        with monkeypatch.context() as patched:
            patched.setattr("os.lstat", failing)
            with pytest.raises(StoreError, match="Input/output error"):
                store.lookup(prompt(0), TINY)

        assert cached_tokens(store, prompt(0)) == 41
    assert not list((path / "quarantine").iterdir())


def failing(*_: object, **__: object) -> os.stat_result:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
