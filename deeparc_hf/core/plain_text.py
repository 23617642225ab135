"""The one door for text of others: what a downloaded record, report or config says becomes visible text of limited
length here before it is printed or written, without what steers a terminal or forges a line.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable
from typing import Any

__all__ = ["LIMIT", "allowed", "did_you_mean", "is_plain", "listed", "plain", "plain_lines", "quoted"]

LIMIT = 200
_LONGEST = 10_000  # of a message of several lines
_NAMES = 5
# control, format (bidirectional marks too), surrogate, private and unassigned signs, line and paragraph separators
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
# escape sequences as a whole ("[31m" does not stay): CSI, OSC and the like with their text, and those of two signs
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
_MARKS = re.compile(
    r"(?<=.)[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f]{3,}"
)


def plain(value: Any, limit: int = LIMIT) -> str:
    """One line of visible text, of limited length."""
    text = _ESCAPE.sub("", _text(value)[: 4 * limit])
    shown = " ".join(
        _MARKS.sub("", "".join(" " if unicodedata.category(sign) in _UNSEEN else sign for sign in text)).split()
    )
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def plain_lines(text: Any, limit: int = LIMIT, longest: int = _LONGEST) -> str:
    """Several lines of visible text, each of at most `limit` signs: breaks and indents stay, all else as in `plain`."""
    lines = _text(text)[:longest].replace("\t", "    ").split("\n")
    return "\n".join(" " * min(limit, len(line) - len(line.lstrip(" "))) + _kept_apart(line, limit) for line in lines)


def _kept_apart(line: str, limit: int) -> str:
    """A line with the runs of spaces that make columns of a table."""
    return "".join(part if part.isspace() else plain(part, limit) for part in re.split(r"( {2,})", line.strip(" ")))[
        :limit
    ]


def quoted(value: Any, limit: int = 80) -> str:
    """A value as Python writes it, for messages that say what was found; what cannot be seen is escaped."""
    if isinstance(value, str):
        value = value[: 4 * limit]
    try:
        shown = repr(value)
    except (ValueError, RecursionError):  # a number of more than sys.get_int_max_str_digits() digits
        shown = f"a {type(value).__name__} too long to print"
    return plain(shown, limit)


def listed(names: Iterable[Any], most: int = _NAMES, limit: int = 60) -> str:
    """Some names, one after the other, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(plain(name, limit) for name in names[:most]) + more


def did_you_mean(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """What to add to a message about a word that is not known: the nearest of the known ones, if one is near."""
    near = difflib.get_close_matches(word, sorted(words), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""


def allowed(value: Any, words: Collection[str]) -> str | None:
    """The value if it is one of the words; None otherwise."""
    return value if isinstance(value, str) and value in words else None


def is_plain(value: Any, limit: int = LIMIT) -> bool:
    """Whether a value is a text of limited length that shows as it is."""
    return isinstance(value, str) and len(value) <= limit and value.isprintable()


def _text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to print"
