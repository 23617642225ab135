"""Weights of which every process holds a part: FSDP2 of torch, ZeRO-3 of DeepSpeed. While a module runs its weights are
whole in each process, and so are hidden states.

All processes have to run the same modules in the same order: one that runs a module alone waits for the others for
ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import UnsupportedModelError

__all__ = ["moves_together", "numel", "whole_weights"]


def numel(parameter: nn.Parameter) -> int:
    """The number of values of a parameter, in shards or whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def moves_together(model: nn.Module) -> bool:
    """Whether processes have to run a model all at once, because each holds a part of its weights."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _is_sharded(owner: Any) -> bool:
    """Whether the weights that FSDP2 keeps for a module, those of modules inside with their own aside, are in shards
    now.
    """
    others: list[Any] = [module for module in owner.modules() if isinstance(module, FSDPModule) and module is not owner]
    inside = {parameter for module in others for parameter in module.parameters()}
    return any(isinstance(p.data, DTensor) for p in owner.parameters() if p not in inside)


@contextmanager
def whole_weights(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, the weights of these modules are whole in every process, whatever runs; what holds them already goes on
    to. What is changed of them is lost afterwards. All processes have to come here together.

    Raises:
        UnsupportedModelError: if they are in shards in another way than that of FSDP2 with each block by itself.
    """
    modules = list(modules)
    owners = dict.fromkeys(m for module in modules for m in module.modules() if isinstance(m, FSDPModule))
    with ExitStack() as stack:
        for owner in filter(_is_sharded, owners):
            for switch in (owner.set_reshard_after_forward, owner.set_reshard_after_backward):
                switch(False, recurse=False)
                stack.callback(switch, True, recurse=False)
            owner.unshard()
            stack.callback(owner.reshard)
        for name, parameter in (pair for module in modules for pair in module.named_parameters()):
            if isinstance(parameter.data, DTensor):
                raise UnsupportedModelError(
                    f"{name} of a block is in shards that belong to a larger part of the model, so the block cannot be "
                    "looked at by itself. Have FSDP2 wrap each block: fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP."
                )
            if hasattr(parameter, "ds_id"):
                raise UnsupportedModelError(
                    "The weights are in shards (DeepSpeed ZeRO-3), which cannot be held while blocks run. Repair "
                    "blocks (heal=...) under FSDP2 or ZeRO-2, or leave heal out."
                )
        yield
