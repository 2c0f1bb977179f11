"""What was loaded from files is remembered while these cannot have changed."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from promptcache import CachedGenerator, ModelError, PrefixStore
from promptcache.models import load as loading
from promptcache.models.identity.known_models import (
    MAX_STATES,
    FileState,
    KnownModels,
    state_of,
)

WEIGHTS = "0" * 32


@pytest.fixture
def known(tmp_path: Path) -> KnownModels:
    return KnownModels(tmp_path / "cache" / "known.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def copies(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Copies of a model that tests can take and change, and need not wait for."""
    folder = tmp_path_factory.mktemp("copies")
    return [Path(shutil.copytree(model_dir, folder / f"{i}")) for i in range(7)]


def state(*folders: Path, seconds_later: float = 5.0) -> FileState:
    found = state_of(folders, now=time.time() + seconds_later)
    assert found is not None
    return found


def test_what_was_loaded_is_remembered(folder: Path, known: KnownModels) -> None:
    known.remember(state(folder), "loader", WEIGHTS)

    assert known.weights_of(state(folder), "loader") == WEIGHTS
    assert known.weights_of(state(folder), "another loader") is None


def test_files_that_changed_a_moment_ago_are_not_remembered(
    folder: Path, known: KnownModels
) -> None:
    racy = state(folder, seconds_later=0)

    known.remember(racy, "loader", WEIGHTS)

    assert known.weights_of(state(folder), "loader") is None
    known.remember(state(folder), "loader", WEIGHTS)
    assert known.weights_of(racy, "loader") is None


@pytest.mark.parametrize("change", ["content", "size", "inode", "name", "more", "less"])
def test_changed_file_is_not_known(
    folder: Path, known: KnownModels, change: str
) -> None:
    known.remember(state(folder), "loader", WEIGHTS)
    path = folder / "model.safetensors"
    stat = path.stat()

    if change == "content":
        with open(path, "r+b") as file:
            file.write(b"WEIGHTS")
    elif change == "size":
        path.write_bytes(b"weights" * 101)
    elif change == "inode":
        shutil.copy(path, folder / "new")
        (folder / "new").replace(path)
    elif change == "name":
        path.rename(folder / "model-1.safetensors")
    elif change == "more":
        (folder / "adapter.py").write_text("")
    else:
        (folder / "config.json").unlink()
    if path.exists():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert known.weights_of(state(folder), "loader") is None


def test_adapter_counts_with_its_files(
    folder: Path, tmp_path: Path, known: KnownModels
) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"lora")
    known.remember(state(folder, adapter), "loader", WEIGHTS)

    assert known.weights_of(state(folder, adapter), "loader") == WEIGHTS
    assert known.weights_of(state(folder), "loader") is None


def test_link_counts_as_what_it_links_to(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to(folder / "model.safetensors")
    before = state(snapshot)

    (folder / "model.safetensors").write_bytes(b"other" * 140)

    assert state(snapshot) != before


def test_mtime_that_is_still_to_come_settles_nothing_and_hinders_nothing(
    folder: Path,
) -> None:
    now = time.time()
    os.utime(folder / "config.json", (now + 1000, now + 1000))

    assert state(folder).is_settled
    assert not state(folder, seconds_later=1000).is_settled
    assert not state(folder, seconds_later=-1000).is_settled


@pytest.mark.parametrize(
    "content",
    [b"", b"{garbage", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"FOLDER": []}'],
    ids=lambda content: repr(content[:8]),
)
def test_odd_memo_only_costs_time(
    folder: Path, known: KnownModels, tmp_path: Path, content: bytes
) -> None:
    memo = tmp_path / "cache" / "known.json"
    memo.parent.mkdir()
    memo.write_bytes(content.replace(b"FOLDER", str(folder).encode()))

    assert known.weights_of(state(folder), "loader") is None
    known.remember(state(folder), "loader", WEIGHTS)

    assert known.weights_of(state(folder), "loader") == WEIGHTS


@pytest.mark.parametrize("value", [None, 3, [], {}, "short", "z" * 32])
def test_odd_hash_is_not_believed(
    folder: Path, known: KnownModels, tmp_path: Path, value: object
) -> None:
    known.remember(state(folder), "loader", WEIGHTS)
    memo = tmp_path / "cache" / "known.json"
    memo.write_text(memo.read_text().replace(f'"{WEIGHTS}"', json.dumps(value)))

    assert known.weights_of(state(folder), "loader") is None


def test_memo_that_cannot_be_written_only_costs_time(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    known = KnownModels(tmp_path / "file" / "known.json")

    known.remember(state(folder), "loader", WEIGHTS)

    assert known.weights_of(state(folder), "loader") is None


def test_memo_does_not_grow_without_end(
    folder: Path, known: KnownModels, tmp_path: Path
) -> None:
    gone = Path(shutil.copytree(folder, tmp_path / "gone"))
    known.remember(state(gone), "loader", WEIGHTS)
    shutil.rmtree(gone)
    for number in range(3 * MAX_STATES):
        known.remember(state(folder), f"loader {number}", WEIGHTS)

    memo = json.loads((tmp_path / "cache" / "known.json").read_text())

    assert memo.keys() == {str(folder)}
    assert len(memo[str(folder)]) == MAX_STATES


def test_files_that_cannot_be_read_have_no_state(tmp_path: Path) -> None:
    assert state_of([tmp_path / "missing"]) is None


# Loading


@pytest.mark.alone
def test_known_model_is_not_hashed_and_takes_well_under_50_ms(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settle(model_dir)
    memo = tmp_path / "known.json"
    monkeypatch.setattr(loading, "known_models_path", lambda: memo)
    model, _, expected = loading.load(model_dir)
    before = state_of([model_dir])
    assert memo.exists()

    def identify() -> float:
        start = time.perf_counter()
        found = loading.identify_loaded(model, [model_dir], before, {}, fail)
        assert found.parts == expected.parts
        return time.perf_counter() - start

    monkeypatch.setattr(loading, "hash_weights", fail)
    assert min(identify() for _ in range(5)) < 0.05


def fail(*arguments: object) -> str:
    raise AssertionError(arguments)


def settle(folder: Path) -> None:
    """Wait until files are so old that a change of them is certain to be seen."""
    while not state(folder, seconds_later=0).is_settled:
        time.sleep(0.1)


@pytest.mark.parametrize("is_settled", [False, True], ids=["young", "settled"])
def test_file_replaced_by_one_of_equal_size_mtime_and_inode_is_another_model(
    copies: list[Path], tmp_path: Path, store: PrefixStore, is_settled: bool
) -> None:
    folder = copies.pop()
    if is_settled:
        settle(folder)
    else:
        folder = Path(shutil.copytree(folder, tmp_path / "young"))
    prompt = list(range(50, 90))
    CachedGenerator.load(folder, store=store).build(prompt)
    path = folder / "model.safetensors"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-4000:] = bytes(4000)

    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert after.st_ino == stat.st_ino
    assert CachedGenerator.load(folder, store=store).match(prompt).cached_tokens == 0


@pytest.mark.parametrize("is_read_before", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("is_known", [False, True], ids=["new", "known"])
def test_folder_that_changes_while_it_is_loaded_is_what_was_loaded(
    copies: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_known: bool,
    is_read_before: bool,
) -> None:
    folder, memo = copies.pop(), tmp_path / "known.json"
    path = folder / "model.safetensors"
    settle(folder)
    monkeypatch.setattr(loading, "known_models_path", lambda: memo)
    old = loading.load(folder)[2]
    if not is_known:
        memo.unlink()
    load = mlx_lm.load

    def load_and_change(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        path.write_bytes(path.read_bytes()[:-4000] + bytes(4000))
        return found if is_read_before else load(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mlx_lm, "load", load_and_change)
        during = loading.load(folder)[2]
    new = loading.load(folder)[2]

    assert during == (old if is_read_before else new)
    assert new.parts != old.parts
    assert memo.exists() == is_known


def test_own_source_that_changes_while_it_is_loaded_is_refused(
    copies: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copies.pop()
    source = folder / "model.py"
    source.write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_file": "model.py"})
    )
    load = mlx_lm.load

    def load_and_change(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        source.write_text("from mlx_lm.models.qwen3 import Model, ModelArgs\n")
        return found

    assert loading.load(folder, trust_remote_code=True)
    monkeypatch.setattr(mlx_lm, "load", load_and_change)
    with pytest.raises(ModelError, match="changed while it was loaded"):
        loading.load(folder, trust_remote_code=True)
