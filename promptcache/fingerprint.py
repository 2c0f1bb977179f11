"""Fingerprints: what besides the token ids KV values depend on.

A fingerprint changes when the values could change and only then: paths, file
times, names and unrelated releases of mlx-lm do not matter.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from promptcache.types import Fingerprint

# Raised when the way segments are computed or kept makes older ones unusable.
STATE_VERSION = "2"
# Keys of config.json that name things and change no value.
NEUTRAL_CONFIG_KEYS = {"_name_or_path", "transformers_version", "eos_token_id"}
MODELS_PACKAGE = "mlx_lm.models"
# `from .x import …` and `from . import x, y`. Parsing the sources would take 35 ms,
# which every start would pay.
FROM_IMPORT = re.compile(
    r"^\s*from\s+(\.\w*|mlx_lm\.models[\w.]*)\s+import\s+(\([^)]*\)|[^\n#]*)",
    re.MULTILINE,
)


def make_fingerprint(
    parts: Mapping[str, str],
    *,
    model: str,
    source: str | None = None,
    exact: Fingerprint | None = None,
) -> Fingerprint:
    """Return the fingerprint over named parts."""
    complete = {"state_version": STATE_VERSION, **parts}
    return Fingerprint(hash_json(complete), model, source, complete, exact)


def hash_json(value: object) -> str:
    """Return the XXH3-128 of a value's canonical JSON, in hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def hash_config(config: Mapping[str, Any]) -> str:
    """Return the hash of a model's config without the keys that change nothing."""
    return hash_json({k: v for k, v in config.items() if k not in NEUTRAL_CONFIG_KEYS})


def hash_weights(folder: Path, memo: Path) -> str:
    """Return the hash of the content of a folder's weight files.

    Raises OSError.
    """
    return hash_files(sorted(folder.glob("model*.safetensors")), memo)


def hash_adapter(folder: Path, memo: Path) -> str:
    """Return the hash of a LoRA adapter's weights and config. Raises OSError."""
    names = ("adapters.safetensors", "adapter_config.json")
    return hash_files([folder / name for name in names], memo)


def hash_files(paths: Iterable[Path], memo: Path) -> str:
    """Return a hash over the content of files; their names do not matter.

    Files of the Hugging Face cache are named by their SHA-256 already; others are
    read once and remembered in `memo` by path, size, mtime and inode.
    """
    known = _read_memo(memo)
    num_known = len(known)
    digests = [_hash_file(path, known) for path in paths]
    if len(known) > num_known:
        _write_memo(memo, known)
    return hash_json(sorted(digests))


def _hash_file(path: Path, known: dict[str, str]) -> str:
    target = path.resolve()
    if _is_sha256(target.name) and target.parent.name == "blobs":
        return target.name
    stat = target.stat()
    identity = f"{target}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
    if identity not in known:
        with open(target, "rb") as file:
            known[identity] = hashlib.file_digest(file, "sha256").hexdigest()
    return known[identity]


def _is_sha256(name: str) -> bool:
    return len(name) == 64 and all(c in "0123456789abcdef" for c in name)


def _read_memo(memo: Path) -> dict[str, str]:
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write_memo(memo: Path, known: dict[str, str]) -> None:
    """Remember hashes of files that are still there.

    Not being able to only costs reading the files again.
    """
    known = {i: d for i, d in known.items() if Path(i.rsplit(":", 3)[0]).exists()}
    tmp = memo.with_name(f"{memo.name}.{os.getpid()}")
    try:
        memo.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        tmp.write_text(json.dumps(known))
        tmp.replace(memo)
    except OSError:
        return


def hash_implementation(module: str) -> str:
    """Return the hash of a model's code: its module and what it imports of mlx-lm.

    Only modules inside `mlx_lm.models` are followed, so that a release of mlx-lm
    that leaves a model alone invalidates nothing. A module whose source cannot be
    found (a model written in a notebook) counts by its name.
    """
    sources: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in sources:
            continue
        source = _read_source(name)
        sources[name] = hashlib.sha256(source.encode()).hexdigest()
        pending.extend(_imported_modules(source, name))
    return hash_json(sources)


def hash_source_file(path: Path) -> str:
    """Return the hash of a model's own source file. Raises OSError."""
    return hash_json(hashlib.sha256(path.read_bytes()).hexdigest())


def _read_source(module: str) -> str:
    try:
        spec = importlib.util.find_spec(module)
        return Path(spec.origin).read_text("utf-8") if spec and spec.origin else ""
    except (ImportError, ValueError, OSError):
        return ""


def _imported_modules(source: str, module: str) -> Iterator[str]:
    """Yield the modules of `mlx_lm.models` that a module of it imports."""
    if not module.startswith(f"{MODELS_PACKAGE}."):
        return
    for package, names in FROM_IMPORT.findall(source):
        name = package.removeprefix(MODELS_PACKAGE).strip(".")
        if name:
            yield f"{MODELS_PACKAGE}.{name}"
        else:
            aliases = names.strip("()").split(",")
            yield from (
                f"{MODELS_PACKAGE}.{alias.split()[0]}"
                for alias in aliases
                if alias.strip()
            )
