"""The architecture: who may import what, and who may do what."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import promptcache
from promptcache.store import PrefixStore
from tests.helpers.segments import save, tokens

PACKAGE = Path(promptcache.__file__).parent


def name_of(path: Path) -> str:
    """Return a module's name below promptcache; a package has the one of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


TREES = {
    name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = sorted(name for name in TREES if name != "__init__")

# The layers from the top, as the page lists them.
PAGE = (PACKAGE.parent / "docs/architecture.md").read_text()
ROWS = re.findall(r"^\| (\d) \| ((?:`\w+` ?)+)\|", PAGE, re.MULTILINE)
LAYERS = {name: int(n) for n, names in ROWS for name in re.findall(r"\w+", names)}
# Its parts build on one another.
LOWEST = 1

# Where tensors live.
TENSOR_PARTS = {"aio", "engine", "kvcache", "models", "parity", "server", "tiers"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the names of all that is imported anywhere, with their modules'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    """Return the modules of promptcache that a module imports."""
    found = [imported.split(".") for imported in imports(TREES[name])]
    own = [parts[1:] for parts in found if parts[0] == "promptcache" and parts[1:]]
    # What is no module itself is something in one.
    paths = {".".join(p) if ".".join(p) in TREES else ".".join(p[:-1]) for p in own}
    return paths & set(MODULES)


def top_names(names: Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def code_of(name: str) -> str:
    """Return a module's code without comments."""
    return ast.unparse(TREES[name])


def part_of(module: str) -> str:
    """Return the package, or the module at the top, that a module belongs to."""
    return module.split(".")[0]


def too_high(module: str, imported: set[str]) -> set[str]:
    """Return what a module may not import because of its layer."""
    part = part_of(module)
    others = {name for name in imported if part_of(name) != part}
    height = LAYERS[part] + (LAYERS[part] == LOWEST)
    return {name for name in others if LAYERS[part_of(name)] >= height}


def cycle_in(imports: Mapping[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, if there are any."""
    left = {name: {*imported} for name, imported in imports.items()}
    while free := {name for name, imported in left.items() if not imported}:
        left = {n: imported - free for n, imported in left.items() if n not in free}
    return sorted(left)


def test_every_package_has_a_layer() -> None:
    assert sorted(LAYERS) == sorted({part_of(name) for name in MODULES})
    assert len({*LAYERS.values()}) <= 7


def test_modules_import_from_lower_layers_only() -> None:
    found = {name: too_high(name, own_imports(name)) for name in MODULES}

    assert {name: imported for name, imported in found.items() if imported} == {}


def test_imports_make_no_cycle() -> None:
    assert cycle_in({name: own_imports(name) for name in MODULES}) == []


def test_an_import_of_the_same_or_a_higher_layer_is_seen() -> None:
    assert too_high("store.lookup", {"kvcache.encode"}) == {"kvcache.encode"}
    assert too_high("tiers.prompt_saver", {"engine.prefill"}) == {"engine.prefill"}
    assert too_high("files", {"store"}) == {"store"}
    assert too_high("files", {"locks"}) == set()
    assert too_high("store.lookup", {"store.writer", "segments.chain"}) == set()


def test_a_cycle_is_seen() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_every_package_says_what_it_is_for() -> None:
    packages = {"", *(name for name in MODULES if has_modules(name))}
    documents = {
        name: ast.get_docstring(TREES[name or "__init__"]) for name in packages
    }

    assert [name for name, text in documents.items() if not text] == []


def has_modules(name: str) -> bool:
    return any(module.startswith(f"{name}.") for module in MODULES)


def test_imports_are_seen() -> None:
    assert own_imports("store.store") >= {"config", "segments.chain", "locks"}
    assert own_imports("store.index.prefixes") >= {"store.index.database"}
    assert own_imports("models.default.download") >= {"models.default.gguf"}


def test_library_never_imports_the_command_line() -> None:
    command_line = {"promptcache_cli", "click", "rich"}

    users = {n for n, tree in TREES.items() if top_names(imports(tree)) & command_line}
    assert users == set()


def test_mlx_is_imported_where_tensors_live_only() -> None:
    tensors = {"mlx", "mlx_lm", "tokenizers", "transformers"}
    users = {part_of(n) for n in TREES if top_names(imports(TREES[n])) & tensors}

    assert users == TENSOR_PARTS


@pytest.mark.parametrize(
    ("module", "owners"),
    [
        (
            "sqlite3",
            {f"store.index.{name}" for name in ("connection", "database", "schema")},
        ),
        ("sqlite_utils", {"store.index.schema"}),
        ("platformdirs", {"config"}),
        ("fcntl", {"files", "locks"}),
        ("subprocess", {"models.default.download", "locks"}),
    ],
)
def test_module_has_its_owners(module: str, owners: set[str]) -> None:
    assert {n for n in TREES if module in top_names(imports(TREES[n]))} == owners


@pytest.mark.parametrize(
    ("words", "owners"),
    [
        (
            [".unlink(", "os.remove", "rmtree", ".rmdir("],
            {"files", "models.default.download", "store.blobs.store_files"},
        ),
        (["environ", "getenv"], {"config"}),
        (["pickle"], set()),
    ],
)
def test_deed_has_its_doers(words: list[str], owners: set[str]) -> None:
    doers = {name for name in TREES if any(word in code_of(name) for word in words)}

    assert doers <= owners


HEAVY = ("mlx", "mlx_lm", "transformers", "sqlite_utils", "numpy", "huggingface_hub")


def modules_after(code: str) -> set[str]:
    """Return the heavy modules that a new process has imported after some code."""
    report = f"import sys; print(*(n for n in {HEAVY!r} if n in sys.modules))"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(process.stdout.split())


def test_importing_promptcache_imports_nothing_heavy() -> None:
    assert modules_after("import promptcache, promptcache.store") == set()


def test_using_a_store_imports_nothing_heavy(store: PrefixStore) -> None:
    save(store, tokens(100))

    found = modules_after(
        "from promptcache import Fingerprint, PrefixStore, PrunePolicy\n"
        f"with PrefixStore({str(store.path)!r}) as store:\n"
        "    store.prefixes()\n"
        f"    store.lookup([1], Fingerprint({'0' * 32!r}, 'model'))\n"
        "    store.plan_prune(PrunePolicy())"
    )

    assert found == set()


def test_heavy_imports_would_be_seen() -> None:
    assert "mlx" in modules_after("import mlx.core")


CACHE_CLASSES = re.compile(r"(\w*KVCache|ArraysCache|CacheList)")


def test_cache_classes_are_named_in_one_module() -> None:
    """So supporting a new one is an entry in that module."""
    namers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and CACHE_CLASSES.fullmatch(node.value)
    }

    assert namers == {"kvcache.classes"}
