"""2:4 sparsity on a GPU: at run time, matrices with the pattern can be held in torch's semi-structured form."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn

from ..architectures import describe
from ..core.compat import parameters_of
from ..core.transaction import Transaction
from ..errors import UnsupportedModelError
from .matrices import find_matrices

__all__ = ["has_pattern", "to_semi_structured"]


def to_semi_structured(model: nn.Module) -> dict[str, str]:
    """Turn the Linears of a 2:4 sparse model into torch's semi-structured tensors, in place, for inference on this
    machine.

    A help at run time only: do not train or save the model afterwards, the checkpoint to keep is the dense one. Whether
    it is faster depends on the GPU, the sizes of the matrices and of the batch: measure it (`torch.utils.benchmark`) on
    your own.

    Args:
        model: a model in float16 or bfloat16 on a CUDA device of compute capability 8.0 or higher (torch's own
            condition), sparsified with `pattern="2:4"`.

    Returns:
        The maps that stay as they are, each with the reason.

    Raises:
        UnsupportedModelError: if there is no such device, or nothing can be turned; nothing is changed then.
    """
    subject = describe(model)
    host = subject.host
    device = next(host.root.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise UnsupportedModelError(
            f"Semi-structured tensors need a CUDA device of compute capability 8.0 or higher, found {device}. The "
            "model computes the same without them: leave this step out, or model.to('cuda') first."
        )
    left: dict[str, str] = {}
    matrices = find_matrices(subject)
    with Transaction() as transaction, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor.*prototype.*")
        for name, module, weight in [(matrix.name, matrix.module, matrix.weight) for matrix in matrices]:
            if not isinstance(module, nn.Linear):
                left[name] = f"it is a {type(module).__name__}, and no Linear"
            elif weight.dtype not in (torch.float16, torch.bfloat16):
                left[name] = f"its weights are {weight.dtype}"
            elif not has_pattern(weight.detach()):
                left[name] = "its zeros do not follow the 2:4 pattern"
            else:
                try:
                    sparse = torch.sparse.to_sparse_semi_structured(weight.detach().contiguous())
                except (RuntimeError, ValueError) as error:
                    left[name] = str(error).splitlines()[0]
                    continue
                parameters = parameters_of(module)
                transaction.on_failure(partial(parameters.update, weight=weight))
                parameters["weight"] = nn.Parameter(sparse, requires_grad=False)
        if len(left) == len(matrices):
            name, reason = next(iter(left.items()))
            raise UnsupportedModelError(
                f"None of the {len(left)} linear maps of {host.label} can be turned; of {name}, for example: {reason}. "
                "Sparsify the model with pattern='2:4' and load it in float16 or bfloat16."
            )
    return left


def has_pattern(rows: Tensor, keep: int = 2, group: int = 4) -> bool:
    """Whether of each `group` consecutive inputs of a matrix (d_out, d_in) at most `keep` are not zero."""
    if rows.shape[1] % group:
        return False
    return bool(((rows.reshape(len(rows), -1, group) != 0).sum(dim=2) <= keep).all())
