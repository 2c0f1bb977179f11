"""Sizes and ages as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from promptcache.errors import UsageError
from promptcache.units import format_age, format_size, parse_age, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("10kB", 10_000),
        ("10K", 10_000),
        ("10GB", 10_000_000_000),
        ("10GiB", 10 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2tb", 2 * 10**12),
        (" 1 MB ", 1_000_000),
    ],
)
def test_size_is_parsed(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e3", "1.GB", "1 G B", "10XB", "1,5GB", "١GB x", "1\n2"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size, write for example 10GB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (46_080_000, "46.1 MB"),
        (10**10, "10.0 GB"),
        (2 * 10**15, "2000.0 TB"),
    ],
)
def test_size_is_formatted(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@given(st.integers(0, 10**15))
def test_formatted_size_parses_to_nearly_the_same(nbytes: int) -> None:
    parsed = parse_size(format_size(nbytes))

    assert abs(parsed - nbytes) <= 0.051 * nbytes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45s", 45),
        ("30m", 1800),
        ("12h", 43200),
        ("7d", 604800),
        ("2w", 1209600),
        ("1.5h", 5400),
        (" 0s ", 0),
    ],
)
def test_age_is_parsed(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 d", "7D", "1y", "7dd"])
def test_what_is_no_age_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not an age, write for example 30m"):
        parse_age(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 m"),
        (3 * 3600 + 1, "3 h"),
        (86400, "1 d"),
        (15 * 86400, "2 w"),
    ],
)
def test_age_is_formatted(seconds: float, text: str) -> None:
    assert format_age(seconds) == text
