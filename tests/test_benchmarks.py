"""The benchmarks can be run: what they import is there."""

import importlib
from pathlib import Path

import pytest

import benchmarks

NAMES = sorted(path.stem for path in Path(benchmarks.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_finds_what_it_imports(name: str) -> None:
    if name == "plots":
        pytest.importorskip("matplotlib")

    importlib.import_module(f"benchmarks.{name}")
