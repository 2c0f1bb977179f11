"""The docs name files and commands that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def named_tests(text: str) -> set[tuple[str, str]]:
    """Return the test files that a text names, each with a test of it or with "".

    A test without a file is of the one that its paragraph, item or row named last.
    """
    pattern = r"(?:tests/)?((?:[a-z]+/)*test_\w+\.py)(?:::(\w+))?|`(test_\w+)`"
    found = set()
    for block in re.split(r"\n(?=[-|\n])", text):
        file = ""
        for path, name, other in re.findall(pattern, block):
            file = path or file
            if file:
                found.add((file, name or other))
    return found


def is_there(file: str, name: str) -> bool:
    path = ROOT / "tests" / file
    return path.is_file() and f"def {name}" in path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_tests_that_are_there(page: Path) -> None:
    missing = {t for t in named_tests(page.read_text()) if not is_there(*t)}

    assert missing == set()


def test_tests_of_pages_are_seen() -> None:
    text = "`a/test_b.py::test_c`, `test_d`; `test_e.py`"

    assert named_tests(text) == {
        ("a/test_b.py", "test_c"),
        ("a/test_b.py", "test_d"),
        ("test_e.py", ""),
    }


def test_every_promise_names_its_test() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    text = text[text.index("## Nothing is lost") : text.index("## Nothing fills up")]
    rows = re.findall(r"^\| (?!promise|---)(.*) \|$", text, re.MULTILINE)
    promises = [row.split(" | ")[1] for row in rows]

    assert len(promises) > 20
    assert [proof for proof in promises if "::test_" not in proof] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_modules_that_are_there(page: Path) -> None:
    text = page.read_text()
    modules = re.findall(r"python -m ((?:benchmarks|tests)[.\w]+)", text)
    paths = [Path(*name.split(".")).with_suffix(".py") for name in modules]
    paths += map(Path, re.findall(r"\bpromptcache/[\w/]+\.py", text))

    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_pages_are_seen() -> None:
    text = "".join(page.read_text() for page in PAGES)

    assert "reliability/test_crash.py" in text
