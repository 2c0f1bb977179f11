"""Marks of tests: what `make test` leaves to `make test-long`, and what runs alone."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# Runs by itself: it measures times, memory or the whole machine's behaviour.
alone = pytest.mark.alone


def all_but(representatives: Collection[Any], values: Iterable[Any]) -> list[Any]:
    """Return values to parametrize with; all but the representatives are long."""
    return [
        value
        if value in representatives
        else pytest.param(value, marks=pytest.mark.long)
        for value in values
    ]
