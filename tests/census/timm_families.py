"""A small model of each of timm's families (a family is a module of timm.models), bare and in TimmWrapper."""

from __future__ import annotations

import contextlib
import copy
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import transformers as tf
from torch import nn

from deeparc_hf import find_stacks
from deeparc_hf.architectures import Stack, describe, find_host
from deeparc_hf.errors import DeepArcError

from ..zoo import as_trained, spread
from .inputs import NoInputsError
from .table import row_of
from .trial import Loaders, Row, removals, try_model

__all__ = ["chosen", "families", "try_bare", "try_family", "try_wrapped"]

_SMALL = re.compile(r"test|nano|atto|pico|tiny|small|_s\d|_b0|_xx?s|_t\d?$|18|26|_0[0-9]")
_BUILT, _LOOKED_AT = 24, 6
_MOST = 4  # blocks of a stack


def families() -> list[str]:
    return timm.list_modules()


def chosen(family: str) -> str:
    """The smallest architecture of a family that timm can build without one of its blocks; else the smallest that
    deeparc_hf can, else the smallest.
    """
    likely = sorted(timm.list_models(module=family), key=lambda name: (not _SMALL.search(name), name))[:_BUILT]
    names = sorted(likely, key=_size)[:_LOOKED_AT]
    return next((name for wrapped in (False, True) for name in names if _has_a_spare_block(name, wrapped)), names[0])


def _size(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name).parameters())


def _has_a_spare_block(name: str, wrapped: bool) -> bool:
    try:
        with torch.device("meta"):
            return any(removals(stack) for stack in find_stacks(_created(name, wrapped, {})).values())
    except DeepArcError:
        return False


def built(name: str, wrapped: bool) -> nn.Module:
    """A model of an architecture, with few blocks where its arguments can say so."""
    with torch.device("meta"):
        whole = _created(name, wrapped, {})
        try:
            subject = describe(whole)
        except DeepArcError:
            subject = None
    args: dict[str, Any] = {}
    if subject is not None:
        places_of = {name: range(len(stack)) for name, stack in subject.stacks.items()}
        fewer = {
            name: places[:_MOST] if _ends_anywhere(subject.stacks[name]) else places
            for name, places in places_of.items()
        }
        settings = subject.host.settings()
        try:
            subject.family.shrink(settings, list(subject.stacks.values()), fewer)
            args = settings["model_args"] if wrapped else settings
            with torch.device("meta"):
                _created(name, wrapped, args)
        except Exception:
            args = {}  # of some, blocks are counted from the end
    return _created(name, wrapped, args)


def _ends_anywhere(stack: Stack) -> bool:
    """Whether a stack can be built with its first blocks only: a number counts them, and no stages are among them."""
    return stack.count is not None and not stack.count.stages and not stack.count.values


def _created(name: str, wrapped: bool, args: Mapping[str, Any]) -> nn.Module:
    if not wrapped:
        return timm.create_model(name, **{"num_classes": 10, **args})
    config = tf.TimmWrapperConfig(architecture=name, num_labels=10, model_args=dict(args))
    return tf.TimmWrapperForImageClassification(config)


def try_bare(name: str, loaders: Loaders, only: Sequence[str] | None = None) -> Row:
    """Try removals on an architecture as timm builds it."""
    return _try(name, loaders, False, only)


def try_wrapped(name: str, loaders: Loaders, only: Sequence[str] | None = None) -> Row:
    """Try removals on an architecture in transformers' TimmWrapper."""
    return _try(name, loaders, True, only)


def _try(name: str, loaders: Loaders, wrapped: bool, only: Sequence[str] | None) -> Row:
    row = Row(name)
    torch.manual_seed(0)
    model = as_trained(spread(built(name, wrapped))).eval()
    row.model = type(model).__name__
    try:
        with tempfile.TemporaryDirectory() as folder:
            find_host(model).save(folder)
    except RuntimeError as error:
        row.state, row.reason = "stock differs", "the whole model cannot be saved: " + " ".join(str(error).split())
        return row
    return try_model(row, model, lambda reach: _images(model), loaders, only)


def _images(model: nn.Module) -> dict[str, Any]:
    """Images as the package makes them up, or the smallest that the model takes."""
    given = dict(find_host(model).example_inputs() or {})
    sizes = [images.shape[1:] for images in given.values()]
    sizes += [(3, size, size) for size in (112, 128, 224, 256)]
    for size in sizes:
        given = {key: torch.randn(1, *size, generator=torch.Generator().manual_seed(0)) for key in given}
        with contextlib.suppress(Exception), torch.no_grad():
            copy.deepcopy(model)(**given)
            return given
    raise NoInputsError("it takes images of none of the sizes that were tried")


def try_family(family: str, loaders: Loaders) -> dict[str, Any]:
    """What the table keeps of a family: of its chosen architecture, bare and wrapped, all removals."""
    name = chosen(family)
    row = {"architecture": name}
    why = _not_counted(name)
    rows = {"bare": row_of(try_bare(name, loaders)), "wrapped": row_of(try_wrapped(name, loaders))}
    return row | ({"why": why} if why else {}) | rows


def _not_counted(name: str) -> str:
    """Why timm cannot leave out blocks that only deeparc_hf can."""
    try:
        with torch.device("meta"):
            stacks = find_stacks(_created(name, True, {}))
    except DeepArcError:
        return ""
    told = [stack.uncounted or "no argument counts them" for stack in stacks.values() if stack.count is None]
    return told[0] if told else ""
