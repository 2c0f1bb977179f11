"""Printable text: foreign text, in a form that a terminal only shows.

Names, prompts and request lines come from stores, files and clients. Raw, they could
set a terminal's title, clear it, write to its clipboard, or show other text than there
is. What is printed, warned of, logged or raised goes through here; JSON stays exact.
"""

import json
import re
from collections.abc import Callable

# Blanks that Python does not call printable: a no-break space, and wide ones.
_BLANKS = frozenset(
    "\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u202f\u205f\u3000"
)
# Characters that nobody sees and that Python calls printable: fillers, and selectors
# that can carry text.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\U000e0100-\U000e01ef]"
)
# What texts of several lines are made of. The joiners belong to scripts and to emoji.
_OF_TEXTS = frozenset("\n\t\u200c\u200d")
_OF_JSON = frozenset("\n")
_NOTHING: frozenset[str] = frozenset()


def printable(text: object) -> str:
    r"""Return a text in one line: what a terminal would not show is escaped.

    That is control characters (`\x1b`), marks that turn the direction of writing
    (`\u202e`), characters that are not seen, and bytes that were not text (`\udcff`).
    """
    return _escaped(str(text), _NOTHING, _as_python)


def printable_text(text: str) -> str:
    """Return a text of several lines, in which newlines, tabs and joiners stay."""
    return _escaped(text, _OF_TEXTS, _as_python)


def printable_json(encoded: str) -> str:
    """Return JSON that means the same, with more of it escaped."""
    return _escaped(encoded, _OF_JSON, lambda character: json.dumps(character)[1:-1])


def _escaped(text: str, more: frozenset[str], escape: Callable[[str], str]) -> str:
    if text.isprintable() and not _UNSEEN.search(text):
        return text
    shown = _BLANKS | more
    return "".join(
        c if c in shown or (c.isprintable() and not _UNSEEN.match(c)) else escape(c)
        for c in text
    )


def _as_python(character: str) -> str:
    return character.encode("unicode_escape").decode()
