"""The house of the tests: no test module imports another."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent
MODULES = sorted(ROOT.rglob("test_*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the names of all that is imported anywhere, with their modules'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_tests(tree: ast.AST) -> list[str]:
    """Return the test modules, or names in them, that are imported."""
    names = (name for name in imports(tree) if name.split(".")[0] == "tests")
    return [n for n in names if any(part.startswith("test_") for part in n.split("."))]


def test_no_module_imports_another_test_module() -> None:
    found = {path: imported_tests(ast.parse(path.read_text())) for path in MODULES}

    assert {path: names for path, names in found.items() if names} == {}


def test_an_import_of_a_test_module_is_seen() -> None:
    code = "from tests.store.test_blobs import publish\nfrom tests.helpers import tiny"

    assert imported_tests(ast.parse(code)) == ["tests.store.test_blobs.publish"]
