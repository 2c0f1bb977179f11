"""Find text that changes from run to run, such as dates, ids and hostnames."""

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

KINDS = (
    "date",
    "time",
    "UUID",
    "random id",
    "hostname",
    "working directory",
    "counter",
)


class Volatile(NamedTuple):
    """Volatile text in `[start, end)` of a text; `kind` is one of KINDS.

    A cue is not part of it, `pwd=` of `pwd=/x` for example. Counters are whole, as a
    number alone says nothing.
    """

    kind: str
    start: int
    end: int
    text: str


# Every pattern can begin only once in a run of its characters, and what repeats in it
# is bounded or shares no character with what follows. So each takes linear time.

_MONTH = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?"
    r"|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_WEEKDAY = (
    "(?:Mon(?:day)?|Tue(?:s(?:day)?)?|Wed(?:nesday)?|Thu(?:r(?:s(?:day)?)?)?"
    r"|Fri(?:day)?|Sat(?:urday)?|Sun(?:day)?)\b\.?"
)
_YEAR = r"(?:19|20)\d\d(?!\d)"
_DAY = r"(?:0?[1-9]|[12]\d|3[01])(?!\d)"
_MONTH_NUMBER = r"(?:0?[1-9]|1[0-2])(?!\d)"
_TH = r"(?:st|nd|rd|th)?\b"
_GAP = r"(?:, ?| {1,2}|-)"
_MONTH_DAY = f"{_MONTH}[ -]{{1,2}}{_DAY}{_TH}"
_DAY_MONTH = rf"(?:the )?{_DAY}{_TH}(?:[ -]| of ){_MONTH}"
_WORDS = f"(?:{_MONTH_DAY}|{_DAY_MONTH})"
_DIGITS = (
    rf"(?:{_YEAR}(?:-\d\d-\d\d|/\d\d?/\d\d?|\.\d\d\.\d\d)"
    rf"|{_DAY}(?P<sep>[-/.]){_MONTH_NUMBER}(?P=sep){_YEAR}"
    rf"|{_MONTH_NUMBER}(?P<us>[-/]){_DAY}(?P=us){_YEAR})(?!\d)"
)
_ZONE = (
    r"(?: ?(?:Z|UTC|GMT|[ECMPA][SD]T|AK[SD]T|HST|CES?T|EES?T|WES?T|BST|MSK|IST|JST|KST"
    r"|SGT|AE[SD]T|NZ[SD]T)\b| ?[+-]\d\d:?\d\d\b)?"
)
_SECONDS = r":[0-5]\d(?:[.,]\d{1,9})?"
_AM_PM = r" ?[AaPp](?:\.[Mm]\.|[Mm]\b)"
_CLOCK = (
    rf"(?:(?:[01]?\d|2[0-3]):[0-5]\d(?:(?:{_SECONDS})(?:{_AM_PM})?|{_AM_PM})"
    rf"|(?:[01]\d|2[0-3]):[0-5]\d)(?![\d:]){_ZONE}"
)
# What is named after a date, such as a model or an API's version, does not change,
# nor does what a model knows.
_FRESH = (
    r"(?<![\w.-])(?i:(?<!updated on )(?<!cutoff: )(?<!cutoff is )(?<!cutoff date: )"
    r"(?<!cutoff date is ))"
)
_DONE = r"(?![A-Za-z0-9_]|-\w|[/.]\d)"
_DATE = (
    rf"(?:(?:{_WEEKDAY}(?:, ?| ))?(?:(?<!/){_DIGITS}|{_WORDS}(?:, ?| |-){_YEAR})"
    rf"|{_WEEKDAY}(?:, ?| ){_WORDS}"
    rf"|(?:(?<=today is )|(?<=date is )|(?<=date: )){_WORDS})"
)
_AT = r"(?:,? at |, ?|[ T_]| - )"
_DATE_TIME = (
    rf"(?:(?:{_WEEKDAY},? )?{_WORDS}{_GAP}{_CLOCK}(?: {_YEAR})?|{_DATE}{_AT}{_CLOCK}"
    r"|(?:19|20)\d\d[01]\d[0-3]\dT[0-2]\d[0-5]\d[0-5]\dZ?)"
)
_HEX = "[0-9a-fA-F]"
_UUID = f"{_HEX}{{8}}(?:-{_HEX}{{4}}){{3}}-{_HEX}{{12}}"
_IS = r"[^\w\n]{0,4}(?:(?:is|of|id)\b)?[^\w\n]{1,4}"
# Segments of a path; a full stop at its end is the sentence's.
_PATH_REST = r"(?:[/\\]+(?:[\w@%+=~#$-]|\.(?=[\w/.-]))*)*"
_PATH = rf"(?:~|[A-Za-z]:(?=\\)|(?=/[\w.@~])){_PATH_REST}"
_SAME = r"""["'`*]{0,3}(?:[ \t]{0,3}[:=]|[ \t]is\b)[ \t]{0,3}["'`*]{0,3}"""
_NO_HOST = (
    "(?!(?:localhost|str|string|text|none|null|required|optional|name|hostname"
    r"|127\.0\.0\.1|0\.0\.0\.0)\b)"
)
_MARK = r"""["'`*]{0,2}[ \t]?(?:[:=][ \t]?#?|#)[ \t]?"""
# The order decides between two that find the same text.
_PATTERNS = (
    ("time", rf"{_FRESH}(?i:{_DATE_TIME}){_DONE}"),
    ("date", rf"{_FRESH}(?i:{_DATE}){_DONE}"),
    ("time", rf"(?<![\w:.])(?<!\w\[){_CLOCK}(?!\w)"),
    (
        "time",
        r"(?i:timestamp|time|epoch|(?<![a-z])now)\w{0,8}"
        rf"(?:[^\w\n]{{0,4}}\bin (?:milli)?seconds)?{_IS}"
        r"(?P<value>1\d{9}(?:\d{3})?(?:\.\d{1,9})?)(?![\w.]*\d)(?!\w)",
    ),
    ("UUID", rf"(?<![0-9A-Za-z]){_UUID}(?![0-9A-Za-z])"),
    ("UUID", rf"(?i:uuid|guid){_IS}(?P<value>{_HEX}{{32}})(?!\w)"),
    # Digits and letters, but not a number, a word or the alphabet.
    (
        "random id",
        rf"(?<![0-9A-Za-z])(?<!\d\.)(?:0x)?(?=\d*[a-fA-F])(?=[a-fA-F]*\d)"
        rf"(?!{_HEX}*0123456789){_HEX}{{16,}}(?![0-9A-Za-z])",
    ),
    (
        "random id",
        rf"\b(?i:commits?|sha(?:1|256)?|rev(?:ision)?|build)\b[^\w]{{0,4}}"
        rf"(?:(?:is|id|hash)\b)?[^\w]{{1,4}}"
        rf"(?P<value>(?=[a-fA-F]*\d){_HEX}{{7,64}})(?![\w.-]*\w)",
    ),
    (
        "hostname",
        rf"(?i:\b(?<!/)hostname{_SAME}|\bhost=[\"'`]?)(?P<value>(?i:{_NO_HOST})"
        r"[A-Za-z0-9](?:[\w-]|\.(?=\w)){0,252})(?![\w(\[]| [a-z])",
    ),
    (
        "hostname",
        r"(?<![\w.-])\w(?:[\w-]|\.(?=\w))*"
        r"(?<=[\w-])\.(?:local|lan|internal)(?![\w(-]|\.\w)",
    ),
    (
        "working directory",
        r"(?i:\b(?:cwd|pwd|(?:working|current)[ _-]?(?:working[ _-]?)?"
        rf"dir(?:ectory)?){_SAME})(?P<value>{_PATH})",
    ),
    (
        "working directory",
        rf"(?<![\w.~-])(?:/home/|/Users/|[A-Za-z]:\\{{1,2}}Users\\{{1,2}})"
        rf"\w[\w.-]*(?<=\w){_PATH_REST}",
    ),
    (
        "counter",
        rf"(?i:\b(?:(?:turn|attempt|iteration|session|request|run){_MARK}"
        rf"|(?:pid|process id)(?:{_MARK}| )))\d{{1,9}}(?![\w-]|[.,:/]\d)",
    ),
)


def find_volatile(
    text: str,
    *,
    hostnames: Collection[str] = (),
    directories: Collection[str] = (),
) -> list[Volatile]:
    """Return what is likely to change from run to run, in the order of the text.

    Where two overlap, the earlier one is returned, and of those the longer one.

    Args:
        text: Any text, a rendered prompt for example.
        hostnames: Names of machines to find as whole words, in any letter case.
        directories: Absolute paths to find, alone or at the start of a longer path.
    """
    patterns = [*_PATTERNS, *_given_patterns(hostnames, directories)]
    matches = [
        volatile
        for kind, pattern in patterns
        for volatile in _search(kind, pattern, text)
    ]
    # The sort is stable, so the order of the patterns decides the rest.
    matches.sort(key=lambda volatile: (volatile.start, -volatile.end))
    return list(_without_overlaps(matches))


def _given_patterns(
    hostnames: Collection[str], directories: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Yield patterns for the names that the caller knows."""
    hosts = [re.escape(name) for name in hostnames if name not in {"", "localhost"}]
    if hosts:
        yield "hostname", rf"(?i:(?<![\w-])(?:{_any_of(hosts)})(?![\w-]))"
    paths = [re.escape(path.rstrip("/\\")) for path in directories]
    paths = [path for path in paths if path]
    if paths:
        end = r"(?![\w-]|\.\w)"
        yield (
            "working directory",
            rf"(?<![\w.~-])(?:{_any_of(paths)}){end}{_PATH_REST}",
        )


def _any_of(patterns: list[str]) -> str:
    return "|".join(sorted(patterns, key=len, reverse=True))


def _search(kind: str, pattern: str, text: str) -> Iterator[Volatile]:
    """Yield what a pattern finds, without its cue."""
    for match in re.finditer(pattern, text):
        start, end = match.span("value" if match.lastgroup == "value" else 0)
        yield Volatile(kind, start, end, text[start:end])


def _without_overlaps(volatiles: list[Volatile]) -> Iterator[Volatile]:
    end = 0
    for volatile in volatiles:
        if volatile.start >= end:
            yield volatile
            end = volatile.end
