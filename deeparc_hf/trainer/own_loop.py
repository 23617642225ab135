"""For training loops of one's own: what `Accelerator.prepare` made follows a removal, and zeros stay zero."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..architectures import describe
from ..checkpoint.record import current_record
from ..core.distributed import gather, rebuild_reducer
from ..errors import SurgeryError
from ..pruning.surgery import forget_parameters
from ..sparsity.masks import Zeros
from ..sparsity.matrices import is_sharded
from ..sparsity.sparsify import keep_recorded

__all__ = ["KeptZeros", "follow"]


def follow(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Have a prepared model and its optimizer follow what was done to the model within: blocks removed, blocks frozen.

    Call it in every process, between two steps of the optimizer, after `apply_plan`, `prune_model` or `remove_blocks`
    on `accelerator.unwrap_model(model)`. DistributedDataParallel has noted which gradients it waits for, and the next
    step would fail without this. A learning-rate scheduler needs nothing: groups of the optimizer stay.

    Args:
        model: what `Accelerator.prepare` gave, or any model.
        optimizer: what `Accelerator.prepare` gave, or any optimizer, over the parameters of this model alone: those
            that the model has no more leave it, and the state of frozen ones goes.

    Raises:
        SurgeryError: if the model is sharded over processes, or is not the same in all of them.
    """
    if is_sharded(model):
        raise SurgeryError(
            "The parameters of this model are spread over processes (FSDP, DeepSpeed), and blocks cannot be removed "
            "from shards. Prune the model before accelerator.prepare."
        )
    wrappers = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    root = wrappers[0].module if wrappers else model
    _require_same(root)
    if optimizer is not None:
        inner = getattr(optimizer, "optimizer", optimizer)
        left = {id(parameter) for parameter in root.parameters()}
        gone = [p for group in inner.param_groups for p in group["params"] if id(p) not in left]
        forget_parameters(inner, gone, [p for p in root.parameters() if not p.requires_grad])
    for wrapper in wrappers:
        rebuild_reducer(wrapper)
    torch.compiler.reset()  # frames that were compiled for the model as it was


def _require_same(root: nn.Module) -> None:
    """Compare the parameters' names, shapes and gradients over the processes."""
    seen = gather(lambda: [(name, tuple(p.shape), p.requires_grad) for name, p in root.named_parameters()])
    for index, other in enumerate(seen):
        odd = next((pair for pair in zip(seen[0], other, strict=False) if pair[0] != pair[1]), None)
        if odd is not None or len(other) != len(seen[0]):
            name = odd[1][0] if odd is not None else "the number of parameters"
            raise SurgeryError(
                f"The model in process {index} is not that in process 0: they differ at {name}. Make one plan, and "
                "give it to all processes before apply_plan (accelerate.utils.broadcast_object_list, plan.to_json())."
            )


class KeptZeros:
    """The zeros that a model's record lists (after `sparsify_model`), kept in a loop of one's own.

        zeros = KeptZeros(accelerator.unwrap_model(model))
        ...
        optimizer.step()
        zeros.apply()

    Masks belong to parameters: they follow later prunings, and checkpoints that are loaded into the model.

    Args:
        model: the model, not wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        subject = describe(model)
        self._model = model
        self._zeros = Zeros()
        keep_recorded(self._zeros, subject, current_record(subject))

    def __len__(self) -> int:
        """Number of matrices."""
        return len(self._zeros)

    def apply(self) -> None:
        """Zero them again: after each step of the optimizer."""
        self._zeros.apply()

    def check(self) -> None:
        """Check that they are zero.

        Raises:
            SparsityError: naming a matrix in which they are not.
        """
        self._zeros.check(self._model, "Call apply after every step of the optimizer, and after weights were loaded.")
