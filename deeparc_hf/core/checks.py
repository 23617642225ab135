"""JSON from outside (a record, a plan, a report): checked before it is used, bounded; an error names the place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .plain_text import LIMIT, is_plain, plain, quoted

__all__ = [
    "MAX_BLOCKS",
    "MAX_ENTRIES",
    "MAX_TEXT",
    "Entry",
    "MalformedError",
    "at_most",
    "is_number",
    "read_json",
    "unboxed",
]

MAX_BLOCKS = 4096  # of a stack
MAX_ENTRIES = 256
MAX_TEXT = 512  # characters
_MAX_FILE = 16 * 2**20  # bytes
_MAX_WHOLE = 2**63 - 1
_MAX_NUMBER = 1e300


class MalformedError(ValueError):
    """What comes from outside is not what it should be; whoever reads it says what it is and what to do."""


@dataclass(frozen=True)
class Entry:
    """A value from outside, and its place in what was read.

    Attributes:
        value: any JSON type; None where the entry is missing, too.
        place: the path to it, as "stacks.encoder.layer.kept"; empty for the whole.
    """

    value: Any
    place: str = ""

    def must_be(self, good: bool, expected: str) -> None:
        """Refuse the value if it is not good.

        Raises:
            MalformedError: naming the place, what was expected, and what was found.
        """
        if not good:
            raise MalformedError(f"{self.place or 'it'} must be {expected}, found {quoted(self.value)}")

    def __getitem__(self, key: str) -> Entry:
        """The entry of an object; where it is missing, its value is None."""
        return Entry(self.mapping().get(key), f"{self.place}.{key}" if self.place else key)

    def get(self, key: str) -> Entry | None:
        """The entry of an object; None where it is missing or null."""
        entry = self[key]
        return None if entry.value is None else entry

    def optional(self, key: str, read: Callable[[Entry], Any], default: Any = None) -> Any:
        """What a reader makes of an entry of an object; the default where the entry is missing or null."""
        entry = self.get(key)
        return default if entry is None else read(entry)

    def mapping(self) -> Mapping[str, Any]:
        """An object, as it is."""
        self.must_be(isinstance(self.value, Mapping), "an object")
        return self.value

    def entries(self, most: int = MAX_ENTRIES) -> dict[str, Entry]:
        """The entries of an object, whatever their names hold."""
        mapping = self.mapping()
        self.must_be(len(mapping) <= most, f"an object with at most {most} entries")
        prefix = f"{self.place}." if self.place else ""
        return {key: Entry(value, f"{prefix}{plain(key, 80)}") for key, value in mapping.items()}

    def texts(self) -> dict[str, str]:
        """The texts and numbers of an object, short and plain."""
        entries = self.entries().items()
        return {plain(key, 60): plain(e.value) for key, e in entries if isinstance(e.value, (str, int, float))}

    def named(self, most: int = MAX_ENTRIES, limit: int = MAX_TEXT) -> dict[str, Entry]:
        """The entries of an object whose names are visible texts of limited length, and not empty."""
        entries = self.entries(most)
        for name in entries:
            good = is_plain(name, limit) and name != ""
            Entry(name, self.place).must_be(good, f"named by texts of at most {limit} visible characters")
        return entries

    def items(self, most: int = MAX_ENTRIES) -> list[Entry]:
        """The items of a list."""
        return [Entry(value, f"{self.place}[{index}]") for index, value in enumerate(self._list(most))]

    def number(self) -> float:
        """A finite number."""
        self.must_be(is_number(self.value), "a finite number")
        return float(self.value)

    def numbers(self, count: int) -> list[float]:
        """A list of so many finite numbers."""
        values = self._list(count)
        good = len(values) == count and all(map(is_number, values))
        self.must_be(good, f"a list of {count} finite numbers")
        return [float(value) for value in values]

    def whole(self, low: int = 0, high: int = _MAX_WHOLE) -> int:
        """A whole number."""
        good = type(self.value) is int and low <= self.value <= high
        self.must_be(good, f"a whole number from {low}" + (f" to {high}" if high < _MAX_WHOLE else ""))
        return self.value

    def wholes(self, high: int = _MAX_WHOLE, most: int = MAX_BLOCKS) -> tuple[int, ...]:
        """A list of whole numbers from 0."""
        values = self._list(most)
        good = all(type(value) is int and 0 <= value <= high for value in values)
        self.must_be(good, "a list of whole numbers from 0" + (f" to {high}" if high < _MAX_WHOLE else ""))
        return tuple(values)

    def text(self, limit: int = MAX_TEXT) -> str:
        """A text that shows as it is."""
        self.must_be(is_plain(self.value, limit), f"a text of at most {limit} visible characters")
        return self.value

    def shown(self, limit: int = LIMIT) -> str | None:
        """Any value as plain text; None where there is none."""
        return plain(self.value, limit) if self.value else None

    def _list(self, most: int) -> list[Any] | tuple[Any, ...]:
        self.must_be(isinstance(self.value, (list, tuple)) and len(self.value) <= most, f"a list of at most {most}")
        return self.value


def is_number(value: Any) -> bool:
    """Whether a value is a number, not a truth value, and finite."""
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER


def at_most(value: float, limit: float) -> bool:
    """Whether a number is within a limit, but for rounding: 0.92 - 0.91 is a little more than 0.01."""
    return value <= limit or math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-12)


def unboxed(value: Any) -> Any:
    """A number of NumPy's as Python's own; anything else as it is."""
    if type(value) in (bool, int, float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def read_json(source: Path | str) -> Any:
    """What a JSON file, or a JSON text, holds.

    Raises:
        MalformedError: if it is a folder, the file is too large, or this is not JSON.
    """
    if isinstance(source, Path) and source.is_dir():
        raise MalformedError("it is a folder, not a file")
    if isinstance(source, Path) and source.stat().st_size > _MAX_FILE:
        raise MalformedError(f"it is larger than {_MAX_FILE} bytes, so it is not read")
    try:
        return json.loads(source if isinstance(source, str) else source.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise MalformedError(f"it is not JSON: {plain(error)}") from error
