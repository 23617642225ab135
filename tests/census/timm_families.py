"""The smallest model of each of timm's families (a family is a module of timm.models), bare or in TimmWrapper."""

from __future__ import annotations

import functools
import re
from typing import Any

import timm
import torch
import transformers as tf
from torch import nn

from deeparc_hf import find_stacks
from deeparc_hf.architectures import find_host
from deeparc_hf.errors import DeepArcError

from ..zoo import as_trained, spread
from .trial import Loaders, Row, removals, try_model

__all__ = ["families", "try_family"]

_SMALL = re.compile(r"test|nano|atto|pico|tiny|small|_s\d|_b0|_xx?s|_t\d?$|18|26|_0[0-9]")
_LOOKED_AT = 24


def families() -> list[str]:
    return timm.list_modules()


@functools.cache
def chosen(family: str, wrapped: bool) -> str | None:
    """The smallest architecture of a family that has a block to spare, else the smallest; None if none can be built."""
    likely = sorted(timm.list_models(module=family), key=lambda name: (not _SMALL.search(name), name))[:_LOOKED_AT]
    sizes = {name: size for name in likely if (size := _size(name)) is not None}
    names = sorted(sizes, key=sizes.__getitem__)
    spare = (name for name in names[:8] if _has_a_spare_block(name, wrapped))
    return next(spare, names[0] if names else None)


def _size(name: str) -> int | None:
    """How many parameters a model has; None if it cannot be built, or is no network for images alone."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())
    except Exception:
        return None


def _has_a_spare_block(name: str, wrapped: bool) -> bool:
    try:
        with torch.device("meta"):
            return any(removals(stack) for stack in find_stacks(_built(name, wrapped)).values())
    except DeepArcError:
        return False


def _built(name: str, wrapped: bool) -> nn.Module:
    if not wrapped:
        return timm.create_model(name, num_classes=10)
    config = tf.TimmWrapperConfig(architecture=name, num_labels=10, model_args={})
    return tf.TimmWrapperForImageClassification(config)


def try_family(family: str, loaders: Loaders, *, wrapped: bool) -> Row:
    """Try all removals on the smallest model of a family."""
    name = chosen(family, wrapped)
    row = Row(f"{family}, wrapped" if wrapped else family)
    if name is None:
        row.state, row.reason = "not built", "no model of it can be built"
        return row
    torch.manual_seed(0)
    model = as_trained(spread(_built(name, wrapped))).eval()

    def inputs(reach: Any) -> dict[str, Any]:
        return dict(find_host(model).example_inputs() or {})

    return try_model(row, model, inputs, loaders)
