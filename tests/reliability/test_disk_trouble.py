"""A disk that fails, is full or goes away takes nothing that was there with it."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from promptcache import CachedGenerator, PrefixStore, PromptCacheWarning
from promptcache.errors import StoreError, StoreFullError
from promptcache.store.blobs.folder import BlobFolder
from promptcache.store.maintenance.disk_budget import check_disk
from promptcache.store.reports import PrunePolicy
from tests.helpers.invariants import check_invariants
from tests.helpers.marks import all_but
from tests.helpers.segments import (
    TINY,
    blob_paths,
    check_match,
    files_nbytes,
    publish,
    save,
    save_with_checkpoints,
    tokens,
)
from tests.helpers.steps import failing, steps_of

OLD, NEW = tokens(70), [9, *tokens(40)]


def fill(folder: Path) -> None:
    with PrefixStore(folder) as store:
        store.pin(save(store, OLD), "old")
        save_with_checkpoints(store, [3, *tokens(45)], [20])


def check_kept(folder: Path) -> None:
    """Assert that what was there is there, and that a prune leaves nothing else."""
    with PrefixStore(folder, min_free_nbytes=0) as store:
        check_invariants(folder)
        match = store.lookup(OLD, TINY)
        assert match.cached_tokens == len(OLD)
        check_match(store, match, OLD)
        assert [entry.name for entry in store.pins()] == ["old"]
        store.execute(store.plan_prune(PrunePolicy()))
        assert {p.stem for p in blob_paths(store)} == store._index.segment_keys()
        assert not list((folder / "tmp").iterdir())
        assert store.verify().is_sound


def save_new(folder: Path) -> None:
    with PrefixStore(folder) as store:
        save(store, NEW)


def build_named(folder: Path) -> None:
    with PrefixStore(folder) as store:
        store.pin(save(store, [*OLD, *tokens(40)]), "old")
        store.pin(store.segments.key_of(OLD, TINY), "old")


def remove_and_prune(folder: Path) -> None:
    publish(BlobFolder(folder), [1, 2])
    with PrefixStore(folder) as store:
        store.remove(store.segments.key_of([3, *tokens(45)], TINY))
        store.execute(store.plan_prune(PrunePolicy()))


def verify(folder: Path) -> None:
    publish(BlobFolder(folder), [1, 2])
    with PrefixStore(folder) as store:
        store.verify(fix=True)


ACTS = [save_new, build_named, remove_and_prune, verify]


@pytest.mark.parametrize("act", all_but([save_new], ACTS))
@pytest.mark.parametrize(
    "code", all_but([errno.ENOSPC], [errno.ENOSPC, errno.EIO, errno.EDQUOT])
)
@pytest.mark.parametrize("goes_on", [False, True])
def test_failure_of_any_step_is_an_error_that_loses_nothing(
    tmp_path: Path, act: Callable[[Path], None], code: int, goes_on: bool
) -> None:
    fill(tmp_path / "filled")
    shutil.copytree(tmp_path / "filled", tmp_path / "count")
    num_steps = len(steps_of(lambda: act(tmp_path / "count")))
    assert num_steps > 15

    for number in range(1, num_steps + 1):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "filled", folder)
        with (
            failing(number, code, from_then_on=goes_on),
            contextlib.suppress(StoreError, OSError),
        ):
            act(folder)
        check_kept(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("code", all_but([errno.ENOSPC], [errno.ENOSPC, errno.EIO]))
def test_failure_of_any_step_never_breaks_a_generation(
    model_dir: Path, tmp_path: Path, code: int
) -> None:
    prompt = list(range(100, 160))
    with CachedGenerator.load(model_dir, store=tmp_path / "0", save=True) as generator:
        plain = tokens_of(generator, prompt)
    model, tokenizer = generator.model, generator.tokenizer

    def generate(folder: Path) -> list[int]:
        with CachedGenerator(
            model, tokenizer, store=folder, save=True, identity=generator.identity
        ) as other:
            return tokens_of(other, prompt)

    num_steps = len(steps_of(lambda: generate(tmp_path / "count")))
    # Steps of opening come first; those of saving are on another thread.
    for number in range(1, num_steps + 1, 3):
        with failing(number, code), ignored_warnings():
            assert generate(tmp_path / str(number)) == plain


def tokens_of(generator: CachedGenerator, prompt: list[int]) -> list[int]:
    return [r.token for r in generator.stream_generate(prompt, 4)]


@contextlib.contextmanager
def ignored_warnings() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCacheWarning)
        yield


# Real file systems


@pytest.fixture
def mount_small(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts a file system in memory with given options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        target = tmp_path / f"small-{len(mounted)}"
        target.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("file systems cannot be mounted here")
        mounted.append(target)
        return target

    yield mount
    for target in mounted:
        subprocess.run(["umount", "-l", str(target)], check=True)


def save_until_full(folder: Path) -> int:
    """Save until that fails; return how many were saved."""
    with PrefixStore(folder, min_free_nbytes=0) as store:
        for i in range(1000):
            try:
                save(store, [9, i, *tokens(40)], width=300)
            except StoreError:
                return i
    raise AssertionError("it never gets full")


@pytest.mark.parametrize("options", ["size=3m", "size=40m,nr_inodes=40"])
def test_full_file_system_keeps_what_is_there(
    mount_small: Callable[[str], Path], options: str
) -> None:
    folder = mount_small(options) / "store"
    fill(folder)

    num_saved = save_until_full(folder)

    assert num_saved >= 5
    with PrefixStore(folder, min_free_nbytes=0) as store:
        for i in range(num_saved):
            prompt = [9, i, *tokens(40)]
            match = store.lookup(prompt, TINY)
            assert match.cached_tokens == len(prompt)
            check_match(store, match, prompt)
    check_kept(folder)


def test_removing_makes_room_on_a_full_file_system(
    mount_small: Callable[[str], Path],
) -> None:
    folder = mount_small("size=3m") / "store"
    fill(folder)
    num_saved = save_until_full(folder)

    with PrefixStore(folder, min_free_nbytes=0) as store:
        before = os.statvfs(folder).f_bfree
        store.remove(store.segments.key_of([9, 0, *tokens(40)], TINY))
        store.execute(store.plan_prune(PrunePolicy(max_nbytes=500_000)))
        after = os.statvfs(folder).f_bfree
        frsize = os.statvfs(folder).f_frsize

        assert (after - before) * frsize > 800_000
        save(store, NEW)
        assert num_saved > 5


def test_generation_goes_on_while_the_disk_is_full(
    model_dir: Path, mount_small: Callable[[str], Path]
) -> None:
    folder = mount_small("size=400k") / "store"
    prompt = [i % 250 for i in range(600)]

    with CachedGenerator.load(model_dir, store=folder, save=True) as generator:
        with pytest.warns(PromptCacheWarning, match="cannot|not saved|disk"):
            told = tokens_of(generator, prompt)
        plain = [r.token for r in generator.stream_generate(prompt, 4, save=False)]

    assert told == plain


@pytest.mark.parametrize("act", [save_new, verify, tokens_of])
def test_store_that_vanishes_is_an_error_or_a_warning(
    model_dir: Path, tmp_path: Path, act: Callable[..., Any]
) -> None:
    folder = tmp_path / "gone"
    fill(folder)
    if act is tokens_of:
        with CachedGenerator.load(model_dir, store=folder, save=True) as generator:
            shutil.rmtree(folder)
            with ignored_warnings():
                assert tokens_of(generator, list(range(40)))
        return
    with PrefixStore(folder) as store:
        shutil.rmtree(folder)
        with contextlib.suppress(StoreError):
            save(store, NEW) if act is save_new else store.verify()
        with contextlib.suppress(StoreError):
            store.execute(store.plan_prune(PrunePolicy()))
    # It can be begun anew.
    fill(folder)
    check_kept(folder)


def test_quota_is_an_error_that_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    fill(folder)
    code = (
        "import resource, signal, sys\n"
        "from tests.helpers.segments import save, tokens\n"
        "from promptcache.store import PrefixStore\n"
        "from promptcache.errors import StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "with PrefixStore(sys.argv[1]) as store:\n"
        "    try: save(store, tokens(2000), width=100)\n"
        "    except StoreError as error: print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
    )

    assert "File too large" in process.stdout, process.stderr
    check_kept(folder)


# What is left alone


def test_nothing_is_saved_below_the_floor(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with PrefixStore(tmp_path / "store", min_free_nbytes=2 * free) as store:
        before = files_nbytes(store.path)

        with pytest.raises(StoreFullError, match="are to stay free"):
            save(store, NEW)

        assert files_nbytes(store.path) == before
        assert blob_paths(store) == []


def test_floor_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTCACHE_MIN_FREE", "100000TB")

    with PrefixStore(tmp_path / "store") as store, pytest.raises(StoreFullError):
        save(store, NEW)


def test_floor_of_a_small_disk_is_a_part_of_it(
    mount_small: Callable[[str], Path],
) -> None:
    folder = mount_small("size=20m")

    check_disk(folder, 18_000_000)

    with pytest.raises(StoreFullError, match=r"1\.0 MB are to stay free"):
        check_disk(folder, 20_500_000)


def test_no_more_is_written_in_a_day_than_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTCACHE_DAILY_WRITES", "100kB")
    with PrefixStore(tmp_path / "store") as store:
        save(store, OLD, width=100)
        written = store.written()
        with pytest.raises(StoreFullError, match="in a day"):
            save(store, NEW, width=300)

        assert written.today_nbytes == sum(p.stat().st_size for p in blob_paths(store))
        assert store.written() == written
        assert store.lookup(OLD, TINY).cached_tokens == len(OLD)


def test_yesterday_does_not_count_for_today(store: PrefixStore) -> None:
    save(store, OLD)
    store._index.history.add_written(10**9, now=0.0)

    written = store.written()

    assert written.total_nbytes == written.today_nbytes + 10**9 < 2 * 10**9


def test_limit_counts_orphans_quarantine_and_unfinished_files(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with PrefixStore(path) as store:
        before = store.total_nbytes()
        publish(BlobFolder(path), [1, 2, 3])
        (path / "tmp" / "left").write_bytes(bytes(1000))
        (path / "quarantine" / "bad").write_bytes(bytes(2000))
        (path / "blobs" / "zz.bin").write_bytes(bytes(4000))
        (path / "blobs" / "ab").mkdir(mode=0o700, exist_ok=True)
        (path / "blobs" / "ab" / "other.format").write_bytes(bytes(8000))

        assert store.total_nbytes() >= before + 15_000
        assert store.total_nbytes() == files_nbytes(path)
