"""What the benchmarks share: machine, medians, tables."""

import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

NARRATOR = Path(__file__).parents[1] / "docs" / "examples" / "narrator.txt"


def machine() -> str:
    """Return one line about the machine and the versions that were measured."""
    import mlx.core as mx

    names = ("promptcache", "mlx", "mlx-lm")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{platform.platform()}, {mx.default_device()}, {versions}"


def median_and_spread(seconds: Sequence[float]) -> str:
    """Return the median with the smallest and the largest value."""
    low, high = min(seconds), max(seconds)
    return f"{statistics.median(seconds):.3f} s ({low:.3f} to {high:.3f})"


def table(headers: Sequence[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    for row in (headers, ["---"] * len(headers), *rows):
        yield "| " + " | ".join(str(cell) for cell in row) + " |"


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print("\n".join(table(headers, rows)), flush=True)
