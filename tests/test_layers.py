"""The architecture: who may import what, and who may do what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from segments import save, tokens

import promptcache
from promptcache.store import PrefixStore

PACKAGE = Path(promptcache.__file__).parent


def name_of(path: Path) -> str:
    """Return a module's name below promptcache; a package has the one of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


TREES = {
    name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = sorted(name for name in TREES if name != "__init__")

# From the bottom up; a module imports from lower lines only.
LAYERS = [
    ["printable"],
    ["errors", "locks"],
    [
        *[
            "units",
            "names",
            "types",
            "writer",
            "checksum",
            "files",
            "inventory",
            "chain",
            "state",
            "treatment",
            "at_rest",
        ],
        "length_dependence",
        "module_tree",
        "array_digests",
        "chat_prompt",
    ],
    [
        "cover",
        "cutting",
        "stretches",
        "manifest",
        "reports",
        "transcript",
        "volatility",
    ],
    ["prompt_parts", "plain_rows", "culprits", "explanation"],
    ["header", "layout"],
    ["destination", "differences", "hot_tier"],
    ["uploading", "reading", "index.schema"],
    ["index.database"],
    ["index.fingerprints", "index.prefixes", "index.uses", "index.clock"],
    ["index.history"],
    ["index.index"],
    [
        "location",
        "allowance",
        "fingerprint",
        "blobs",
        "index",
        "eviction",
        "capturing",
    ],
    ["known_models"],
    ["chat_template", "codec", "matching", "memory", "recovery"],
    ["splitting"],
    ["pruning"],
    ["neighbourhood", "identity", "store.secret"],
    ["store.folder", "store.listing", "store.room", "store.speeds"],
    ["store.receipts", "store.segment_writer"],
    ["store.store"],
    ["store"],
    ["prefill", "rendering", "sampling", "gguf"],
    ["inquiry", "lint"],
    ["default_model", "decoding", "saving", "settings", "json_form"],
    ["loading", "quiet_saver", "request", "resuming", "speculation"],
    ["loaded_model", "starting"],
    ["generation"],
    ["building"],
    ["generator"],
    ["conversation", "parity", "syncing"],
    *[
        [f"server.{name}" for name in layer]
        for layer in [
            [
                "mlx_lm_server",
                "served_model",
                "served_prompt",
                "metrics",
                "background_saver",
            ],
            ["request_check", "api_keys"],
            ["model_provider", "served_request", "clerk"],
            ["served_cache"],
            ["single_flight", "cache_api"],
            ["response_generator"],
            ["api_errors"],
            ["api_handler"],
            ["http_server"],
        ]
    ],
    ["server"],
]
HEIGHTS = {name: i for i, layer in enumerate(LAYERS) for name in layer}

# Where tensors live. The first import mlx when they are imported themselves.
TENSOR_MODULES = {
    "building",
    "decoding",
    "generation",
    "generator",
    "loaded_model",
    "parity",
    "request",
    "sampling",
    "server.http_server",
    "server.mlx_lm_server",
    "server.model_provider",
    "server.response_generator",
    "server.served_cache",
    "speculation",
    "starting",
}
LAZY_TENSOR_MODULES = {
    "array_digests",
    "at_rest",
    "capturing",
    "codec",
    "default_model",
    "destination",
    "gguf",
    "loading",
    "memory",
    "module_tree",
    "plain_rows",
    "prefill",
    "quiet_saver",
    "reading",
    "resuming",
    "saving",
    "uploading",
    "state",
    "treatment",
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the names of all that is imported anywhere, with their modules'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_on_import(tree: ast.Module) -> Iterator[str]:
    """Yield what is imported outside of functions and of `if TYPE_CHECKING`."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        # A class is made on import, its methods' bodies are not run.
        for part in node.body if isinstance(node, ast.ClassDef) else [node]:
            if not isinstance(part, ast.FunctionDef):
                yield from imports(part)


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


def test_every_module_has_a_layer() -> None:
    assert sorted(HEIGHTS) == MODULES


def test_the_architecture_page_names_every_module() -> None:
    page = (PACKAGE.parent / "docs/architecture.md").read_text()
    named = page.split("```")[1].split()

    assert {name.split(".")[-1] for name in MODULES} - set(named) == set()


@pytest.mark.parametrize("name", MODULES)
def test_module_imports_from_lower_layers_only(name: str) -> None:
    too_high = {i for i in own_imports(name) if HEIGHTS[i] >= HEIGHTS[name]}

    assert too_high == set()


def test_imports_are_seen() -> None:
    assert own_imports("store.store") >= {"location", "chain", "errors", "store.room"}
    assert own_imports("index.prefixes") >= {"index.database", "index.schema", "types"}
    assert own_imports("default_model") >= {"gguf"}


@pytest.mark.parametrize("name", TREES)
def test_library_never_imports_the_command_line(name: str) -> None:
    found = top_names(imports(TREES[name]))

    assert not found & {"promptcache_cli", "click", "rich"}


@pytest.mark.parametrize("name", TREES)
def test_mlx_is_imported_where_tensors_live_only(name: str) -> None:
    tensors = {"mlx", "mlx_lm", "tokenizers", "transformers"}
    lazily = top_names(imports(TREES[name])) & tensors
    at_once = top_names(imports_on_import(TREES[name])) & tensors

    assert not lazily or name in TENSOR_MODULES | LAZY_TENSOR_MODULES
    assert not at_once or name in TENSOR_MODULES


def test_modules_that_may_import_mlx_do() -> None:
    users = {n for n in TREES if top_names(imports(TREES[n])) & {"mlx", "mlx_lm"}}

    assert users == TENSOR_MODULES | LAZY_TENSOR_MODULES


@pytest.mark.parametrize(
    ("module", "owners"),
    [
        ("sqlite3", {"index.database", "index.schema"}),
        ("sqlite_utils", {"index.schema"}),
        ("platformdirs", {"location"}),
        ("fcntl", {"files", "locks"}),
        ("subprocess", {"default_model", "locks"}),
    ],
)
def test_module_has_its_owners(module: str, owners: set[str]) -> None:
    assert {n for n in TREES if module in top_names(imports(TREES[n]))} == owners


@pytest.mark.parametrize(
    ("words", "owners"),
    [
        (
            [".unlink(", "os.remove", "rmtree", ".rmdir("],
            {"blobs", "default_model", "files"},
        ),
        (["environ", "getenv"], {"location"}),
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
