"""Fingerprints change with what KV values depend on, and with nothing else."""

import ast
import hashlib
import importlib.util
import json
from pathlib import Path

from promptcache.models.identity.source import hash_implementation
from promptcache.segments.fingerprint import make_fingerprint


def test_fingerprint_covers_its_parts_only() -> None:
    first = make_fingerprint({"weights": "1"}, model="a", source="here")
    renamed = make_fingerprint({"weights": "1"}, model="b", source="there")
    other = make_fingerprint({"weights": "2"}, model="a", source="here")
    more = make_fingerprint({"weights": "1", "kv": "8"}, model="a", source="here")

    assert first.digest == renamed.digest
    assert len({first.digest, other.digest, more.digest}) == 3
    assert first.parts == {"state_version": "3", "weights": "1"}
    assert bytes.fromhex(first.digest).hex() == first.digest
    assert len(first.digest) == 32


def test_order_of_the_parts_does_not_matter() -> None:
    left = make_fingerprint({"a": "1", "b": "2"}, model="m")
    right = make_fingerprint({"b": "2", "a": "1"}, model="m")

    assert left.digest == right.digest


def test_implementation_is_the_same_at_every_call() -> None:
    first = hash_implementation({"mlx_lm.models.llama": None})

    assert hash_implementation({"mlx_lm.models.llama": None}) == first
    assert hash_implementation({"mlx_lm.models.qwen3": None}) != first


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
    assert hash_implementation({"mlx_lm.models.llama": None}) == expected


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
    hashes = {
        hash_implementation({f"mlx_lm.models.{name}": None}) for name in names[::5]
    }

    assert len(hashes) == len(names[::5])


def test_module_without_a_source_counts_by_its_name() -> None:
    first, second = (
        hash_implementation({name: None}) for name in ("__main__", "no_module")
    )

    assert first != second


def test_source_file_of_a_model_counts(tmp_path: Path) -> None:
    first, copy, other = (tmp_path / name for name in ("a.py", "b.py", "c.py"))
    first.write_text("x = 1")
    copy.write_text("x = 1")
    other.write_text("x = 2")

    hashes = [hash_implementation({"model": str(p)}) for p in (first, copy, other)]

    assert hashes[0] == hashes[1] != hashes[2]
