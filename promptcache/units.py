"""Sizes and ages as people write them, to and from bytes and seconds."""

import re
from datetime import UTC, datetime

from promptcache.errors import UsageError

NBYTES_BY_UNIT = {
    **{u: 10**p for u, p in zip("KMGT", (3, 6, 9, 12), strict=True)},
    **{f"{u}B": 10**p for u, p in zip("KMGT", (3, 6, 9, 12), strict=True)},
    **{f"{u}IB": 2**p for u, p in zip("KMGT", (10, 20, 30, 40), strict=True)},
    "B": 1,
    "": 1,
}
# Python's calendar ends with the year 9999.
MAX_SECONDS = 253_402_300_800.0
SECONDS_BY_UNIT = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def parse_size(text: str) -> int:
    """Return the number of bytes in a size such as `10GB`, `1.5GiB` or `4096`.

    Raises UsageError if the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    # Twenty digits are more than there are bytes on any disk.
    if not match or len(match[1]) > 20 or match[2].upper() not in NBYTES_BY_UNIT:
        raise UsageError(f"{text!r} is not a size, write for example 10GB or 512MiB")
    return int(float(match[1]) * NBYTES_BY_UNIT[match[2].upper()])


def format_size(nbytes: int) -> str:
    """Return a size for people, in decimal units: `46.1 MB`."""
    for unit in ("TB", "GB", "MB", "kB"):
        factor = NBYTES_BY_UNIT[unit.upper()]
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"


def parse_age(text: str) -> float:
    """Return the seconds in an age such as `30m`, `12h`, `7d` or `2w`.

    Raises UsageError if the text is not an age.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if not match:
        raise UsageError(f"{text!r} is not an age, write for example 30m, 12h or 7d")
    return float(match[1]) * SECONDS_BY_UNIT[match[2]]


def format_age(seconds: float) -> str:
    """Return an age for people, in its largest whole unit: `3 h`."""
    for unit in ("w", "d", "h", "m"):
        if seconds >= SECONDS_BY_UNIT[unit]:
            return f"{int(seconds // SECONDS_BY_UNIT[unit])} {unit}"
    return f"{int(max(seconds, 0))} s"


def iso_time(seconds: float) -> str:
    """Return a Unix time as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
