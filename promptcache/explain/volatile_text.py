"""Volatile text: what changes from run to run, such as dates, ids and counters."""

import re
from collections.abc import Callable, Collection, Iterator
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
_ID_PREFIX = (
    "(?:asst|batch|call|chatcmpl|cmpl|conv|evt|fc|file|gen|job|msg|req|request|resp"
    "|rs|run|sess|session|span|step|task|thread|toolu|trace|trial|user)"
)
# Segments of a path; a full stop at its end is the sentence's.
_PATH_REST = r"(?:[/\\]+(?:[\w@%+=~#$-]|\.(?=[\w/.-]))*)*"
_PATH = rf"(?:~|[A-Za-z]:(?=\\)|(?=/[\w.@~])){_PATH_REST}"
_SAME = r"""["'`*]{0,3}(?:[ \t]{0,3}[:=]|[ \t]is\b)[ \t]{0,3}["'`*]{0,3}"""
_NO_HOST = (
    "(?!(?:localhost|str|string|text|none|null|required|optional|name|hostname"
    r"|127\.0\.0\.1|0\.0\.0\.0)\b)"
)
# "run 3 tests" counts no runs, "turn 3 of the game" counts turns.
_NO_NOUN = r"(?! (?!(?:of|in|is|has|and|at|on|for|out|to|the)\b)(?-i:[a-z]))"
_TOTAL = r"(?: ?/ ?| of )\d{1,9}"
_NUMBER = r"(?: (?:number|no\.?|id|count)|_(?:number|id|count|index))"
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
    (
        "random id",
        rf"(?<![0-9A-Za-z])(?<!\d\.)(?:0x)?(?P<hex>{_HEX}{{16,}})(?![0-9A-Za-z])",
    ),
    (
        "random id",
        rf"\b(?i:commits?|sha(?:1|256)?|rev(?:ision)?|build)\b[^\w]{{0,4}}"
        rf"(?:(?:is|id|hash)\b)?[^\w]{{1,4}}(?P<sha>{_HEX}{{7,64}})(?![\w.-]*\w)",
    ),
    (
        "random id",
        rf"(?<![A-Za-z0-9]){_ID_PREFIX}[-_](?P<body>[A-Za-z0-9]{{8,}})(?![\w-])",
    ),
    ("random id", r"(?<!\w)(?P<ulid>[0-7][0-9A-HJKMNP-TV-Z]{25})(?!\w)"),
    (
        "random id",
        r"(?<![A-Za-z0-9+/.@%?&#~])(?P<base64>[A-Za-z0-9+][A-Za-z0-9+/]{19,}={0,2})",
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
        rf"(?i:\b(?:turn|attempt|iteration|session){_NUMBER}?(?:{_MARK}|[ ])"
        rf"\d{{1,9}}(?:{_TOTAL})?(?![\w-]|[.,:]\d){_NO_NOUN})",
    ),
    (
        "counter",
        rf"(?i:\b(?:request|message|run|retry)(?:{_NUMBER} ?{_MARK}|{_NUMBER} | ?\#)"
        rf"\d{{1,9}}(?:{_TOTAL})?(?![\w-]|[.,:]\d))",
    ),
    (
        "counter",
        rf"(?i:\b(?:step|request|message|run|retry)(?:{_MARK}| )\d{{1,9}}{_TOTAL})"
        r"(?![\w-]|[.,:/]\d)",
    ),
    ("counter", rf"(?i:\b(?:pid|process id)(?:{_MARK}| ))\d{{1,9}}(?![\w.-]*\w)"),
    (
        "counter",
        rf"(?i:\b(?:tokens? (?:left|remaining|used)|token usage)(?:{_MARK}| ))"
        r"\d[\d,_]{0,14}(?: ?/ ?\d[\d,_]{0,14})?(?<=\d)(?!\w)",
    ),
    ("counter", r"(?<![\w,.])\d[\d,]{0,14} (?i:tokens? (?:left|remaining))\b"),
)


def _is_mixed(token: str) -> bool:
    """Tell random digits and letters from numbers, words and alphabets."""
    return not (token.isdigit() or token.isalpha() or "0123456789" in token)


def _is_prefixed_id(token: str) -> bool:
    """Tell `oIHazX6yQrB8hUwl` from the names of functions such as `function2`."""
    num_digits = sum(map(str.isdigit, token))
    if num_digits >= (1 if len(token) >= 16 else 2):
        return not token.isdigit() and _num_changes(token) * 5 >= len(token)
    return len(token) >= 16 and _num_changes(token) * 5 >= 2 * len(token)


def _is_base64(token: str) -> bool:
    """Tell random characters from long names and paths.

    In base64, six of ten neighbours are of different kinds.
    """
    has_all = token.lower() != token != token.upper()
    num_digits = sum(map(str.isdigit, token))
    return has_all and num_digits >= 3 and _num_changes(token) * 5 >= 2 * len(token)


def _num_changes(token: str) -> int:
    """Count where small letters, capitals and digits take turns."""
    return len(re.findall(r"[a-z]+|[A-Z]+|\d+", token)) - 1


def _always(token: str) -> bool:
    return True


def _has_digit(token: str) -> bool:
    return not token.isalpha()


# What the named group of a pattern has to be.
_CHECKS: dict[str, Callable[[str], bool]] = {
    "value": _always,
    "sha": _has_digit,
    "hex": _is_mixed,
    "body": _is_prefixed_id,
    "ulid": _is_mixed,
    "base64": _is_base64,
}


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
    for found in re.finditer(pattern, text):
        name = found.lastgroup if found.lastgroup in _CHECKS else None
        if name is None or _CHECKS[name](found[name]):
            part = name if name in {"value", "sha"} else 0
            start, end = found.span(part)
            yield Volatile(kind, start, end, text[start:end])


def _without_overlaps(found: list[Volatile]) -> Iterator[Volatile]:
    end = 0
    for volatile in found:
        if volatile.start >= end:
            yield volatile
            end = volatile.end
