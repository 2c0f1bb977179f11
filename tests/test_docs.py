"""The docs name files and commands that are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_test_files_that_are_there(page: Path) -> None:
    names = re.findall(r"(?:tests/)?((?:[a-z]+/)*test_\w+\.py)", page.read_text())

    assert [name for name in names if not (ROOT / "tests" / name).exists()] == []


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
