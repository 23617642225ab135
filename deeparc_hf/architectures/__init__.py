"""Families of models: what their stacks are, which blocks are pinned, and how their settings count blocks.

One file describes one kind of model; `auto` serves most of transformers. See CONTRIBUTING.md, "add a family".
"""

from __future__ import annotations

from torch import nn

from ..errors import UnsupportedModelError
from .base import CountKey, Family, Stack, families, register
from .hosts import Host, find_host

__all__ = ["CountKey", "Family", "Host", "Stack", "describe", "families", "find_host", "find_stacks", "register"]


def describe(model: nn.Module) -> tuple[Host, Family, dict[str, Stack]]:
    """The host, family and stacks of a model; `find_stacks` is the public face of it."""
    host = find_host(model)
    for family in sorted((cls() for cls in families), key=lambda f: (-f.priority, f.name)):
        if family.matches(host):
            return host, family, {stack.name: stack for stack in family.stacks(host)}
    raise UnsupportedModelError(
        f"No family of deeparc_hf describes {host.label}, of {host.library}. Known families: "
        f"{', '.join(families.names())}. To support it, add a family: one file, see 'add a family' in CONTRIBUTING.md."
    )


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
    return describe(model)[2]
