"""Hooks on models that are no part of them: what is saved or copied with a model in their place does nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

__all__ = ["LocalHook"]


class LocalHook:
    """A hook that works on live models of this process, and with `copied` on deep copies of them too.

    It is pickled with its module as a part of the standard library that takes anything and does nothing: where the
    pickle is read this package may not be there.
    """

    def __init__(self, act: Callable[..., Any], copied: bool = False) -> None:
        self.act = act
        self._copied = copied

    def __call__(self, *args: Any) -> Any:
        return self.act(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self if self._copied else contextlib.nullcontext().__exit__
