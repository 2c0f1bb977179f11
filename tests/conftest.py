"""Fixtures: real tiny models, a real store, a clean environment."""

import os
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from promptcache import PrefixStore
from promptcache.generator import CachedGenerator
from tests.helpers import tiny

# Processes that tests start import from here, too.
ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(
    [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
)


def pytest_report_header() -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm"))
    return [f"{versions}, SQLite {sqlite3.sqlite_version}"]


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's own store and settings."""
    monkeypatch.setenv("PROMPTCACHE_DIR", str(tmp_path / "store"))
    monkeypatch.delenv("PROMPTCACHE_MAX_SIZE", raising=False)
    monkeypatch.delenv("PROMPTCACHE_MODEL", raising=False)
    # What is to be read from disk would be in memory still.
    monkeypatch.setenv("PROMPTCACHE_MEMORY_LIMIT", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def make_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """Return a function that saves one of the tiny random models once."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("models") / name
            folders[name] = tiny.save_model(folder, tiny.CONFIGS[name])
        return folders[name]

    return make


@pytest.fixture(scope="session")
def model_dir(make_model: Callable[[str], Path]) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer."""
    return make_model("llama")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    with PrefixStore(tmp_path / "store") as store:
        yield store


@pytest.fixture
def generator(model_dir: Path, store: PrefixStore) -> CachedGenerator:
    return CachedGenerator.load(model_dir, store=store)


@pytest.fixture
def mount_read_only(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Return a function that mounts a folder where nothing can be written.

    Permission bits do not stop root.
    """
    mounted: list[Path] = []

    def mount(folder: Path) -> Path:
        target = tmp_path / f"read-only-{len(mounted)}"
        target.mkdir()
        for arguments in (
            ["--bind", str(folder), str(target)],
            ["-o", "remount,ro,bind", str(target)],
        ):
            try:
                subprocess.run(["mount", *arguments], check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                pytest.skip("file systems cannot be mounted here")
            mounted.append(target)
        return target

    yield mount
    for target in set(mounted):
        subprocess.run(["umount", str(target)], check=True)
