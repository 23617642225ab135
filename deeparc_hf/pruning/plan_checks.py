"""What may stand in a plan that is read from JSON; each check gives the value, or raises a TypeError that says what was
found.
"""

from __future__ import annotations

import math
from typing import Any

from ..core.plain_text import is_plain, quoted

__all__ = ["items", "number", "stack_name", "whole_number"]

_LONGEST_NAME = 512


def stack_name(value: Any) -> str:
    if not is_plain(value, _LONGEST_NAME):
        raise TypeError(f"expected the name of a stack, found {quoted(value)}")
    return str(value)


def whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"expected a whole number from 0, found {quoted(value, 40)}")
    return value


def number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise TypeError(f"expected a finite number, found {quoted(value, 40)}")
    return float(value)


def items(value: Any) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return list(value)
