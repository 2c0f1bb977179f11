"""The house: sizes of modules, classes and functions, and tests that stand alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
CODE = sorted([*(ROOT / "promptcache").rglob("*.py"), *(ROOT / "cli").rglob("*.py")])
MAX_MODULE_LINES = 400
# Docstrings are not counted.
MAX_FUNCTION_LINES = 50
MAX_PUBLIC_METHODS = 15


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
    found = {path: imported_tests(ast.parse(path.read_text())) for path in TESTS}

    assert {path: names for path, names in found.items() if names} == {}


def test_an_import_of_a_test_module_is_seen() -> None:
    code = "from tests.store.test_blobs import publish\nfrom tests.helpers import tiny"

    assert imported_tests(ast.parse(code)) == ["tests.store.test_blobs.publish"]


def num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_large(code: str) -> list[str]:
    """Return what of a module is larger than the house allows."""
    found = ["module"] if len(code.splitlines()) > MAX_MODULE_LINES else []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef):
            size = num_lines(node)
            size -= num_lines(node.body[0]) if ast.get_docstring(node) else 0
            found += [node.name] if size > MAX_FUNCTION_LINES else []
        elif isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
            num_public = sum(not name.startswith("_") for name in methods)
            found += [node.name] if num_public > MAX_PUBLIC_METHODS else []
    return found


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_larger_than_a_screen_or_two(path: Path) -> None:
    assert too_large(path.read_text()) == []


def test_what_is_too_large_is_seen() -> None:
    body = "\n".join("    pass" for _ in range(MAX_FUNCTION_LINES + 1))
    methods = "\n".join(
        f"    def method_{i}(self): pass" for i in range(MAX_PUBLIC_METHODS + 1)
    )

    assert too_large(f"def long():\n{body}") == ["long"]
    assert too_large(f"class Wide:\n{methods}") == ["Wide"]
    assert too_large("\n" * (MAX_MODULE_LINES + 1)) == ["module"]
