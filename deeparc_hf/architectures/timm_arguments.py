"""The arguments that a timm model's class is built with: most of them stand in no settings, but in timm's entry points.

They are read where a build stops. One for a device that does not exist ends at the first layer, within the `__init__`
of the model's class, whose arguments the traceback shows. What is found is only tried.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .skeleton import state_shapes

__all__ = ["arguments_of", "refusal", "stays"]

# The first ends at a layer, which may be one of a part that is built before the model; the second ends at the head.
_IMPOSSIBLE: tuple[dict[str, Any], ...] = ({"device": "none such"}, {"num_classes": "none such"})


def arguments_of(model: nn.Module, architecture: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the class of a timm model, by name; also what stands in a config among them, under its own name.

    Args:
        architecture, given: what `timm.create_model` was given for it.
    """
    import timm

    for impossible in _IMPOSSIBLE:
        try:
            with torch.device("meta"):
                timm.create_model(architecture, pretrained=False, **{**given, **impossible})
        except Exception as error:
            found = _read(error, type(model))
            if found:
                return found
    return {}


def _read(error: Exception, cls: type[nn.Module]) -> dict[str, Any]:
    """The arguments of the model of a class that an error kept from being built; {} if it was not begun."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found: dict[str, Any] = {}
    for caller, frame in itertools.pairwise(frames):
        code, values = frame.f_code, frame.f_locals
        if code.co_name != "__init__" or type(values.get("self")) is not cls:
            continue
        if not found:  # the class may have changed its own before it came to the error
            found |= {name: value for inner in caller.f_locals.values() for name, value in _held_in(inner)}
        for name in code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]:
            for key, value in ((name, values.get(name)), *_held_in(values.get(name))):
                found.setdefault(key, value)
    return found


def _held_in(value: Any) -> Iterator[tuple[str, Any]]:
    """What a config holds, of those that a class lets single arguments overrule."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    elif isinstance(value, dict):
        yield from ((name, inner) for name, inner in value.items() if isinstance(name, str))


def stays(architecture: str, given: Mapping[str, Any]) -> bool:
    """Whether a build leaves enough of its arguments for another one: what it leaves is what timm records."""
    import timm

    used = copy.deepcopy(dict(given))
    with torch.device("meta"):
        first = timm.create_model(architecture, pretrained=False, **used)
        if used == dict(given):
            return True
        try:
            second = timm.create_model(architecture, pretrained=False, **used)
        except Exception:
            return False
    return state_shapes(first) == state_shapes(second)


def refusal(architecture: str, name: str, error: Exception) -> str:
    """Why an argument cannot be given."""
    if isinstance(error, TypeError) and "multiple values" in str(error):
        return f"the entry point of {architecture} gives {name} itself"
    return f"{name} cannot be given: {type(error).__name__}: {error}"
