"""Weights of which every process holds a part: FSDP2 of torch, ZeRO-3 of DeepSpeed. While a module runs its weights are
whole in each process, and so are hidden states.

All processes have to run the same modules in the same order: one that runs a module alone waits for the others for
ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..errors import UnsupportedModelError
from .compat import users_in_deepspeed

__all__ = ["moves_together", "numel", "shape_of", "whole_weights"]


_HOLDER = -1  # no module of DeepSpeed's has that number


def numel(parameter: nn.Parameter) -> int:
    """The number of values of a parameter, in shards or whole."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter or buffer, in shards or whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


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
        UnsupportedModelError: if FSDP2 has them in shards that belong to a larger part of the model.
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
        parameters = [p for module in modules for p in module.parameters() if hasattr(p, "ds_id")]
        if parameters:
            stack.enter_context(_whole_of_deepspeed(parameters))
        yield


@contextmanager
def _whole_of_deepspeed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    from deepspeed.runtime.zero import GatheredParameters

    free = [parameter for parameter in parameters if not users_in_deepspeed(parameter)]
    with GatheredParameters(free), ExitStack() as stack:
        for parameter in free:  # a module that has run lets go of what nobody else uses
            users_in_deepspeed(parameter).add(_HOLDER)
            stack.callback(users_in_deepspeed(parameter).discard, _HOLDER)
        yield
