"""The source of a model: a hash over its code and what that imports of mlx-lm."""

import contextlib
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from promptcache.segments.fingerprint import hash_json

MODELS_PACKAGE = "mlx_lm.models"
# `from .x import …` and `from . import x, y`. Parsing the sources would take 35 ms,
# which every start would pay.
FROM_IMPORT = re.compile(
    r"^\s*from\s+(\.\w*|mlx_lm\.models[\w.]*)\s+import\s+(\([^)]*\)|[^\n#]*)",
    re.MULTILINE,
)


def hash_implementation(files: Mapping[str, str | None]) -> str:
    """Return the hash of a model's code: its modules and what they import of mlx-lm.

    Only modules inside `mlx_lm.models` are followed, so that a release of mlx-lm
    that leaves a model alone invalidates nothing. A module whose source cannot be
    found (a model written in a notebook) counts by its name.

    Args:
        files: By the names of the modules, the files they were loaded from, if known.
    """
    sources: dict[str, str] = {}
    pending = list(files)
    while pending:
        name = pending.pop()
        if name in sources:
            continue
        source = _read_source(name, files.get(name))
        sources[name] = hashlib.sha256(source.encode()).hexdigest()
        pending.extend(_imported_modules(source, name))
    return hash_json(sources)


def _read_source(module: str, file: str | None) -> str:
    """Return a module's source; a model's own file is no module that can be found."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        if file is not None and os.path.exists(file):
            return Path(file).read_text("utf-8")
        spec = importlib.util.find_spec(module)
        return Path(spec.origin).read_text("utf-8") if spec and spec.origin else ""
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
