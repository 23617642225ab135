"""Families of models: what their stacks are, which blocks are pinned, and how their settings count blocks.

One file describes one kind of model; `auto` serves most of transformers. See CONTRIBUTING.md, "add a family".
"""

from __future__ import annotations

from torch import nn

from .base import CountKey, Family, Stack, families, register
from .hosts import Host, find_host
from .layout import Layout
from .subject import Subject, describe

__all__ = [
    "CountKey",
    "Family",
    "Host",
    "Layout",
    "Stack",
    "Subject",
    "describe",
    "families",
    "find_host",
    "find_stacks",
    "register",
]


def find_stacks(model: nn.Module) -> dict[str, Stack]:
    """Find the stacks of a model: the runs of blocks in which a block can be removed.

    Args:
        model: a transformers or timm model, or a module that holds one (DDP, torch.compile, a sentence-transformers
            pipeline). It may be on the meta device. Nothing is changed.

    Returns:
        The stacks by name (module path), in forward order.

    Raises:
        UnsupportedModelError: if the model has none, or is of a kind that cannot be pruned correctly; the message names
            its type, what was found, and why.
    """
    return dict(describe(model).stacks)
