"""Partial freezing on a live model: what is frozen has no gradient, and its normalisation statistics stay put."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .architectures import Stack

__all__ = ["freeze_blocks", "frozen_parameters"]


def freeze_blocks(root: nn.Module, stacks: Mapping[str, Stack], frozen: Mapping[str, Sequence[int]]) -> list[nn.Parameter]:
    """Freeze blocks, and everything that runs before the first stack.

    Embeddings and stems are frozen too: otherwise the backward pass would still walk through every frozen block to reach
    them. Heads, final norms and poolers stay trainable.

    Args:
        root: the model.
        stacks: its stacks.
        frozen: the blocks to freeze, as indices into the stacks as they are now.

    Returns:
        The parameters that were trainable and no longer are.
    """
    changed = []
    for parameter in frozen_parameters(root, stacks, frozen):
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            parameter.grad = None
            changed.append(parameter)
    for module in root.modules():
        frozen_norm = isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad
        if frozen_norm and _keep_statistics not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_keep_statistics)
    return changed


def frozen_parameters(root: nn.Module, stacks: Mapping[str, Stack], frozen: Mapping[str, Sequence[int]]) -> list[nn.Parameter]:
    """The parameters that `freeze_blocks` freezes."""
    in_blocks = {id(p) for stack in stacks.values() for p in stack.container.parameters()}
    chosen = [p for name, indices in frozen.items() for i in indices for p in stacks[name].blocks[i].parameters()]
    first = id(next(iter(stacks.values())).container)
    before = True
    for module in root.modules():
        before = before and id(module) != first
        for parameter in module.parameters(recurse=False):
            # scalars at the top of a model (CLIP's temperature) belong to its head
            upstream = (before and parameter.ndim > 0) or isinstance(module, nn.Embedding)
            if upstream and id(parameter) not in in_blocks:
                chosen.append(parameter)
    return list({id(p): p for p in chosen}.values())


def _keep_statistics(module: nn.Module, args: Any) -> None:
    """Run a frozen BatchNorm on its running statistics, whatever mode the Trainer has put the model in."""
    if not module.weight.requires_grad:  # type: ignore[union-attr]
        module.training = False
