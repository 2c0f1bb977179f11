"""Fingerprints change with what KV values depend on, and with nothing else."""

import ast
import hashlib
import importlib.util
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from promptcache.fingerprint import (
    hash_adapter,
    hash_config,
    hash_files,
    hash_implementation,
    hash_source_file,
    hash_weights,
    make_fingerprint,
)


@pytest.fixture
def memo(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "file-hashes.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with weights in two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"first" * 100)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"second" * 100)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_fingerprint_covers_its_parts_only() -> None:
    first = make_fingerprint({"weights": "1"}, model="a", source="here")
    renamed = make_fingerprint({"weights": "1"}, model="b", source="there")
    other = make_fingerprint({"weights": "2"}, model="a", source="here")
    more = make_fingerprint({"weights": "1", "kv": "8"}, model="a", source="here")

    assert first.digest == renamed.digest
    assert len({first.digest, other.digest, more.digest}) == 3
    assert first.parts == {"state_version": "2", "weights": "1"}
    assert bytes.fromhex(first.digest).hex() == first.digest
    assert len(first.digest) == 32


def test_order_of_the_parts_does_not_matter() -> None:
    left = make_fingerprint({"a": "1", "b": "2"}, model="m")
    right = make_fingerprint({"b": "2", "a": "1"}, model="m")

    assert left.digest == right.digest


def test_copied_moved_and_touched_weights_are_the_same(
    folder: Path, memo: Path, tmp_path: Path
) -> None:
    before = hash_weights(folder, memo)

    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    os.utime(folder / "model-00001-of-00002.safetensors", (1, 1))
    (folder / "tokenizer.json").write_text('{"changed": true}')
    moved = folder.rename(tmp_path / "moved")

    assert hash_weights(copy, memo) == before
    assert hash_weights(moved, memo) == before
    assert hash_weights(moved, tmp_path / "other" / "memo.json") == before


def test_names_of_weight_files_do_not_matter(folder: Path, memo: Path) -> None:
    before = hash_weights(folder, memo)

    (folder / "model-00001-of-00002.safetensors").rename(folder / "model-z.safetensors")

    assert hash_weights(folder, memo) == before


@pytest.mark.parametrize("position", [0, 250, 499])
def test_one_changed_byte_changes_the_weights(
    folder: Path, memo: Path, position: int
) -> None:
    before = hash_weights(folder, memo)
    path = folder / "model-00001-of-00002.safetensors"

    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))

    assert hash_weights(folder, memo) != before


def test_added_or_missing_file_changes_the_weights(folder: Path, memo: Path) -> None:
    hashes = [hash_weights(folder, memo)]

    shutil.copy(
        folder / "model-00002-of-00002.safetensors",
        folder / "model-00003-of-00003.safetensors",
    )
    hashes.append(hash_weights(folder, memo))
    (folder / "model-00001-of-00002.safetensors").unlink()
    hashes.append(hash_weights(folder, memo))

    assert len(set(hashes)) == 3


def test_files_of_the_hugging_face_cache_are_not_read(
    tmp_path: Path, memo: Path
) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    blob = tmp_path / "blobs" / digest
    snapshot = tmp_path / "snapshots" / "main" / "model.safetensors"
    plain = tmp_path / "plain" / "model.safetensors"
    for path in (blob, snapshot, plain):
        path.parent.mkdir(parents=True)
    blob.write_bytes(b"not read at all")
    snapshot.symlink_to(blob)
    plain.write_bytes(b"weights")

    trusted = hash_weights(snapshot.parent, memo)

    assert not memo.exists()
    assert trusted == hash_weights(plain.parent, memo)


@pytest.mark.parametrize("name", ["a" * 63, "g" * 64, "A" * 64])
def test_names_that_are_no_hash_are_not_trusted(
    tmp_path: Path, memo: Path, name: str
) -> None:
    path = tmp_path / "blobs" / name
    path.parent.mkdir()
    path.write_bytes(b"weights")

    before = hash_files([path], memo)
    path.write_bytes(b"other weights")

    assert hash_files([path], memo) != before


def test_hash_outside_a_folder_of_blobs_is_not_trusted(
    tmp_path: Path, memo: Path
) -> None:
    path = tmp_path / ("a" * 64)
    path.write_bytes(b"weights")

    hash_files([path], memo)

    assert memo.exists()


def test_file_is_read_once_and_remembered(folder: Path, memo: Path) -> None:
    before = hash_weights(folder, memo)
    path = folder / "model-00001-of-00002.safetensors"
    stat = path.stat()

    with open(path, "r+b") as file:
        file.write(b"FIRST")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert hash_weights(folder, memo) == before
    memo.unlink()
    assert hash_weights(folder, memo) != before


@pytest.mark.parametrize("change", ["mtime", "size", "inode"])
def test_remembered_hash_is_dropped_when_the_file_changes(
    folder: Path, memo: Path, change: str
) -> None:
    before = hash_weights(folder, memo)
    path = folder / "model-00001-of-00002.safetensors"
    stat = path.stat()
    data = b"FIRST" + path.read_bytes()[5:]

    if change == "inode":
        (folder / "new").write_bytes(data)
        (folder / "new").replace(path)
    else:
        path.write_bytes(data + b"more" * (change == "size"))
    mtime = stat.st_mtime_ns + (change == "mtime")
    os.utime(path, ns=(stat.st_atime_ns, mtime))

    assert hash_weights(folder, memo) != before


@pytest.mark.parametrize("content", [b"", b"{garbage", b"[]", b"\xff\xfe", b"null"])
def test_broken_memo_only_costs_time(folder: Path, memo: Path, content: bytes) -> None:
    before = hash_weights(folder, memo)
    memo.write_bytes(content)

    assert hash_weights(folder, memo) == before
    assert isinstance(json.loads(memo.read_text()), dict)


def test_memo_that_cannot_be_written_only_costs_time(
    folder: Path, memo: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    found = hash_weights(folder, tmp_path / "file" / "memo.json")

    assert found == hash_weights(folder, memo)


def test_missing_weights_are_an_error(tmp_path: Path, memo: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        hash_files([tmp_path / "missing"], memo)


@pytest.mark.parametrize("change", [{"hidden_size": 65}, {"new": None}])
def test_config_counts(change: dict[str, object]) -> None:
    config = {"hidden_size": 64, "rope": {"theta": 1.0, "type": "x"}}

    assert hash_config(config | change) != hash_config(config)


@pytest.mark.parametrize(
    "change",
    [
        {"_name_or_path": "elsewhere"},
        {"transformers_version": "5.0"},
        {"rope": {"type": "x", "theta": 1.0}},
    ],
)
def test_what_only_names_things_in_the_config_does_not_count(
    change: dict[str, object],
) -> None:
    config = {"rope": {"theta": 1.0, "type": "x"}, "hidden_size": 64}

    assert hash_config(config | change) == hash_config(config)


def test_adapter_counts_with_weights_and_config(tmp_path: Path, memo: Path) -> None:
    weights = tmp_path / "adapters.safetensors"
    config = tmp_path / "adapter_config.json"
    weights.write_bytes(b"lora")
    config.write_text('{"rank": 8}')
    hashes = [hash_adapter(tmp_path, memo)]

    config.write_text('{"rank": 16}')
    hashes.append(hash_adapter(tmp_path, memo))
    weights.write_bytes(b"lora2")
    hashes.append(hash_adapter(tmp_path, memo))

    assert len(set(hashes)) == 3


def test_adapter_without_weights_is_an_error(tmp_path: Path, memo: Path) -> None:
    with pytest.raises(OSError, match=r"adapters\.safetensors"):
        hash_adapter(tmp_path, memo)


def test_implementation_is_the_same_at_every_call() -> None:
    first = hash_implementation("mlx_lm.models.llama")

    assert hash_implementation("mlx_lm.models.llama") == first
    assert hash_implementation("mlx_lm.models.qwen3") != first


def test_implementation_covers_what_a_model_imports_of_the_models_only() -> None:
    wanted = imported_by("mlx_lm.models.llama")
    assert {"mlx_lm.models.base", "mlx_lm.models.cache"} <= wanted

    sources = {
        name: hashlib.sha256(source_path(name).read_bytes()).hexdigest()
        for name in wanted
    }
    canonical = json.dumps(sources, sort_keys=True, separators=(",", ":"))

    import xxhash

    expected = xxhash.xxh3_128_hexdigest(canonical.encode())
    assert hash_implementation("mlx_lm.models.llama") == expected


def source_path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec
    assert spec.origin
    return Path(spec.origin)


def imported_by(module: str) -> set[str]:
    """Return a module of mlx-lm's models with all it imports of them."""
    found: set[str] = set()
    pending = {module}
    while pending:
        name = pending.pop()
        found.add(name)
        for node in ast.walk(ast.parse(source_path(name).read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [a.name for a in node.names]
                pending |= {f"mlx_lm.models.{n}" for n in names} - found
    return found


def test_every_model_of_mlx_lm_has_an_implementation() -> None:
    folder = source_path("mlx_lm.models.llama").parent
    names = [path.stem for path in sorted(folder.glob("*.py"))]

    # Those that only wrap another model differ by their own source still.
    hashes = {hash_implementation(f"mlx_lm.models.{name}") for name in names[::5]}

    assert len(hashes) == len(names[::5])


def test_module_without_a_source_counts_by_its_name() -> None:
    first, second = (hash_implementation(name) for name in ("__main__", "no_module"))

    assert first != second


def test_source_file_of_a_model_counts(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("x = 1")
    first = hash_source_file(path)
    path.write_text("x = 2")

    assert hash_source_file(path) != first


def test_known_model_is_identified_in_under_50_ms(model_dir: Path, memo: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())

    def identify() -> float:
        start = time.perf_counter()
        parts = {
            "weights": hash_weights(model_dir, memo),
            "config": hash_config(config),
            "implementation": hash_implementation("mlx_lm.models.llama"),
        }
        make_fingerprint(parts, model="tiny")
        return time.perf_counter() - start

    identify()

    assert min(identify() for _ in range(5)) < 0.05
