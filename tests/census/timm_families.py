"""A small model of each of timm's families (a family is a module of timm.models), bare and in TimmWrapper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
import transformers as tf
from torch import nn

from deeparc_hf import find_stacks
from deeparc_hf.architectures import find_host
from deeparc_hf.errors import DeepArcError

from ..zoo import as_trained, spread
from .table import row_of
from .trial import Loaders, Row, removals, try_model

__all__ = ["chosen", "families", "try_bare", "try_family", "try_wrapped"]

_SMALL = re.compile(r"test|nano|atto|pico|tiny|small|_s\d|_b0|_xx?s|_t\d?$|18|26|_0[0-9]")
_BUILT, _LOOKED_AT = 24, 8


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
            return any(removals(stack) for stack in find_stacks(built(name, wrapped)).values())
    except DeepArcError:
        return False


def built(name: str, wrapped: bool) -> nn.Module:
    if not wrapped:
        return timm.create_model(name, num_classes=10)
    config = tf.TimmWrapperConfig(architecture=name, num_labels=10, model_args={})
    return tf.TimmWrapperForImageClassification(config)


def try_bare(name: str, loaders: Loaders, only: Sequence[str] | None = None) -> Row:
    """Try removals on an architecture as timm builds it."""
    return _try(name, loaders, False, only)


def try_wrapped(name: str, loaders: Loaders, only: Sequence[str] | None = None) -> Row:
    """Try removals on an architecture in transformers' TimmWrapper."""
    return _try(name, loaders, True, only)


def _try(name: str, loaders: Loaders, wrapped: bool, only: Sequence[str] | None) -> Row:
    torch.manual_seed(0)
    model = as_trained(spread(built(name, wrapped))).eval()

    def inputs(reach: Any) -> dict[str, Any]:
        return dict(find_host(model).example_inputs() or {})

    return try_model(Row(name), model, inputs, loaders, only)


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
            stacks = find_stacks(built(name, wrapped=True))
    except DeepArcError:
        return ""
    told = [stack.uncounted or "no argument counts them" for stack in stacks.values() if stack.count is None]
    return told[0] if told else ""
