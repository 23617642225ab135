"""Copies that keep calibration and training apart: of rows, and of iterators."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
from collections import UserDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["apart", "copied_iterator", "is_bare_iterator", "slots_of"]

_OVER_SEQUENCES = tuple(
    type(iterator)
    for iterator in (
        iter([]),
        iter(()),
        iter(range(0)),
        iter(range(1 << 70)),
        iter(""),
        iter(b""),
        reversed([]),
        itertools.count(),
    )
)
_OVER_ITERATORS = (zip, map, enumerate, filter)


def apart(row: Any) -> Any:
    """A row as a collator may change it: containers, tensors and arrays are copied, and everything else is shared."""
    kind = type(row)
    if kind is dict:
        return {key: apart(value) for key, value in row.items()}
    if isinstance(row, UserDict):  # what a tokenizer gives
        copied = copy.copy(row)
        copied.data = apart(dict(row.data))
        return copied
    if isinstance(row, dict) or dataclasses.is_dataclass(row):
        return copy.deepcopy(row)
    if kind in (list, tuple):
        return kind(apart(value) for value in row)
    if isinstance(row, Tensor):
        return row.clone()
    if isinstance(row, np.ndarray):
        return row.copy()
    return row


def is_bare_iterator(value: Any) -> bool:
    """Whether something is an iterator whose place cannot be read or set from outside: a generator, or what
    `iter(rows)` gives.
    """
    if not hasattr(type(value), "__next__") or isinstance(value, (io.IOBase, Mapping)):
        return False
    return not hasattr(value, "__dict__") and not slots_of(value)


def slots_of(value: Any) -> dict[Any, Any]:
    """What an object keeps in `__slots__`, by the descriptors of the slots."""
    found = {}
    for cls in type(value).__mro__:
        if "__slots__" not in vars(cls):
            continue
        for name, slot in vars(cls).items():
            if hasattr(slot, "__set__") and hasattr(slot, "__objclass__") and name not in ("__dict__", "__weakref__"):
                try:
                    found[slot] = slot.__get__(value)
                except AttributeError:  # nothing in it
                    continue
    return found


def copied_iterator(iterator: Any) -> Any | None:
    """An iterator that goes on from the same place over the same rows; None where there is no such copy."""
    if not isinstance(iterator, (*_OVER_SEQUENCES, *_OVER_ITERATORS)):
        return None
    try:
        reduced: Any = iterator.__reduce__()
        make, arguments, *state = reduced
    except TypeError:  # Python 3.14 copies no itertools
        return None
    if isinstance(iterator, _OVER_ITERATORS):
        pairs = [(part, copied_iterator(part) if is_bare_iterator(part) else part) for part in arguments]
        if any(part is not None and copy is None for part, copy in pairs):
            return None
        arguments = tuple(copy for _, copy in pairs)
    fresh = make(*arguments)
    if state and state[0] is not None:
        fresh.__setstate__(state[0])
    return fresh
