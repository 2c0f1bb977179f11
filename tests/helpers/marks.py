"""Marks of tests: what `make test` leaves to `make test-long`, and what runs alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# Runs by itself: it measures times, memory or the whole machine's behaviour.
alone = pytest.mark.alone


def all_but(representatives: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return values to parametrize with; all but the representatives are long.

    A tuple is one value for each of several parameters.
    """
    return [value if value in representatives else _long(value) for value in values]


def _long(value: Any) -> Any:
    values = value if isinstance(value, tuple) else (value,)
    return pytest.param(*values, marks=pytest.mark.long)
