"""Copies of models that run by themselves."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from types import FunctionType, MethodType
from typing import Any

from torch import nn

__all__ = ["FUSED", "independent_copy"]

FUSED = "fused_lm_head"  # the argument by which TRL's forward is asked for its fused head, else it is the model's own
_DEPTH = 8  # functions around a forward


def independent_copy(model: nn.Module) -> nn.Module:
    """A deep copy. A model that TRL has given a fused head runs its own forward by a method that a copy would share, so
    that the copy would run the model that it was made of: it gets the forward of its class back, which is the same
    where the fused head is not asked for. (What other replaced forwards do is not known: they stay.)
    """
    made = copy.deepcopy(model)
    for module in made.modules():
        forward = vars(module).get("forward")
        if forward is not None and any(FUSED in names for names in _arguments(forward, _DEPTH)):
            del module.forward
    return made


def _arguments(function: Any, depth: int) -> Iterator[tuple[str, ...]]:
    """The arguments of a callable, and of the callables that it encloses or holds."""
    function = function.__func__ if isinstance(function, MethodType) else function
    if depth == 0 or isinstance(function, (type, nn.Module)):
        return
    held = list(vars(function).values()) if hasattr(function, "__dict__") else []
    if isinstance(function, FunctionType):
        code = function.__code__
        yield code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # not filled yet
                held.append(cell.cell_contents)
    for each in held:
        if callable(each):
            yield from _arguments(each, depth - 1)
