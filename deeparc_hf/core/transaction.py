"""All or nothing: changes to live objects that are taken back, last first, if anything fails on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from .interrupts import uninterrupted

__all__ = ["Transaction"]

_MISSING = object()


class Transaction:
    """A context manager that takes its changes back when the body raises, Ctrl-C included.

    One that is kept can be taken back later, as long as nothing else has changed the same things in between.
    """

    def __init__(self) -> None:
        self._undo = ExitStack()

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """`setattr` that can be taken back."""
        self._undo.callback(_set_back, owner, attribute, vars(owner).get(attribute, _MISSING))
        setattr(owner, attribute, value)

    def on_failure(self, step: Callable[[], Any]) -> None:
        """Have a change that is about to be made taken back by `step`."""
        self._undo.callback(step)

    def keep_children(self, container: nn.ModuleList | nn.Sequential, kept: list[nn.Module]) -> None:
        """Leave only these children in a container, renumbered; the container stays the same object."""
        self._undo.callback(_refill, container, list(container))
        _refill(container, kept)

    def __enter__(self) -> Transaction:
        return self

    def __exit__(self, kind: type[BaseException] | None, *of: object) -> None:
        if kind is not None:
            self.roll_back()

    def roll_back(self) -> None:
        """Take all changes back, last first."""
        with uninterrupted():
            self._undo.__exit__(*sys.exc_info())  # an error of a step names the one that it was to take back


def _set_back(owner: Any, attribute: str, old: Any) -> None:
    if old is not _MISSING:
        setattr(owner, attribute, old)
    elif hasattr(owner, attribute):  # else Ctrl-C came before it was set
        delattr(owner, attribute)


def _refill(container: nn.ModuleList | nn.Sequential, children: list[nn.Module]) -> None:
    del container[:]
    container.extend(children)
