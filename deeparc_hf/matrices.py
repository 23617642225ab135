"""The linear maps of a model's blocks as matrices: what weight sparsity works on.

Embeddings, heads, stems, norms and everything else outside the blocks is left alone, and so are tables and routers inside them.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .architectures import Host, Stack
from .errors import ConfigError, UnsupportedModelError

__all__ = ["Matrix", "find_matrices", "is_sharded"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_PACKED = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, eq=False)
class Matrix:
    """One linear map of a block: a Linear, GPT-2's Conv1D, or a convolution.

    Attributes:
        name: module path, seen from the host's root.
        module: the map.
        stack: the stack that its block belongs to.
        block: index of the block.
    """

    name: str
    module: nn.Module
    stack: Stack
    block: int

    @property
    def weight(self) -> nn.Parameter:
        return self.module._parameters["weight"]  # type: ignore[return-value]

    @property
    def role(self) -> str:
        """Path within the block: the same for the same map of every block."""
        return self.name.removeprefix(f"{self.stack.name}.").partition(".")[2]

    @property
    def groups(self) -> int:
        """Number of groups of output rows that meet inputs of their own: those of a convolution, else 1."""
        return self.module.groups if isinstance(self.module, _CONVOLUTIONS) else 1

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """The weight, or a tensor of its shape, as a view of shape (d_out, d_in); a convolution's inputs are channel x kernel position."""
        weight = self.weight.detach() if weight is None else weight
        if isinstance(self.module, Conv1D):
            return weight.t()  # stored as (d_in, d_out)
        return weight.flatten(1)

    def shaped(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`: a tensor of shape (d_out, d_in) in the shape of the weight."""
        if isinstance(self.module, Conv1D):
            return rows.t().contiguous()
        return rows.reshape(self.weight.shape)


def find_matrices(host: Host, stacks: Mapping[str, Stack], targets: Sequence[str] | None = None) -> list[Matrix]:
    """The linear maps of all blocks, in the order of the blocks.

    Args:
        host: the model.
        stacks: its stacks.
        targets: patterns (fnmatch) of the module paths of those that are wanted; None: all.

    Raises:
        ConfigError: if a pattern matches none.
        UnsupportedModelError: if one that is wanted cannot have single weights zeroed: fused experts, packed, tied or sharded weights,
            a map that computes with something else than its weight. The message names it.
    """
    if is_sharded(host.root):
        raise UnsupportedModelError(
            f"The parameters of {host.label} are sharded (FSDP, DeepSpeed), so no process sees whole rows of a matrix. Call sparsify_model "
            "before the model is wrapped, or train in DistributedDataParallel."
        )
    found: list[Matrix] = []
    refused: dict[str, str] = {}
    owners = _owners(host.root)
    for name, module, stack, block in _modules(stacks):
        reason = _refusal(module)
        if reason is None and _is_matrix(module):
            others = [path for path in owners[id(module._parameters["weight"])] if path != name]
            reason = f"its weight is tied to that of {others[0]}, which would get the zeros too" if others else None
            if reason is None:
                found.append(Matrix(name, module, stack, block))
        if reason is not None:
            refused[name] = reason
    _check_patterns(targets, [matrix.name for matrix in found] + list(refused), host)
    for name, reason in refused.items():
        if _wanted(name, targets, host):
            raise UnsupportedModelError(
                f"The weights of {name} of {host.label} cannot be zeroed one by one: {reason}. Nothing was changed. To leave it out, "
                f"name the maps that are meant: targets=[...], patterns of module paths{_example(found)}."
            )
    wanted = [matrix for matrix in found if _wanted(matrix.name, targets, host)]
    if not wanted:
        raise UnsupportedModelError(f"The blocks of {host.label} hold no linear maps (Linear, Conv1D, Conv1d, Conv2d) to sparsify.")
    for matrix in wanted:
        if matrix.weight.device.type == "meta":
            raise UnsupportedModelError(f"{matrix.name} of {host.label} has no weights (meta device). Load the model's checkpoint.")
    return wanted


def is_sharded(root: nn.Module) -> bool:
    """Whether the parameters of a model are spread over processes."""
    if any(type(module).__name__.startswith(("FullyShardedDataParallel", "DeepSpeedEngine")) for module in root.modules()):
        return True
    return any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in root.parameters())


def _modules(stacks: Mapping[str, Stack]) -> Iterator[tuple[str, nn.Module, Stack, int]]:
    for stack in stacks.values():
        for index, block in enumerate(stack.blocks):
            for path, module in block.named_modules():
                yield f"{stack.name}.{index}{'.' if path else ''}{path}", module, stack, index


def _owners(root: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each parameter."""
    owners: dict[int, list[str]] = defaultdict(list)
    for path, module in root.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(path)
    return owners


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, *_CONVOLUTIONS))


def _refusal(module: nn.Module) -> str | None:
    """Why a module's weights cannot be zeroed one by one; None if they can, or if it has none that would be."""
    kind = type(module)
    tensors = [*module._parameters.values(), *module._buffers.values()]
    packed = [t for t in tensors if t is not None and t.ndim > 1 and t.dtype in _PACKED]
    if packed or kind.__module__.startswith(("torch.ao.nn.quantized", "bitsandbytes.")):
        return f"it is packed by quantization ({kind.__name__}); sparsify the model first and quantize it afterwards"
    if _is_matrix(module):
        weight = module._parameters.get("weight")
        if weight is None:
            return f"its weight is computed from something else ({kind.__name__}, a parametrization)"
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            return f"it stores its weight as {type(weight.data).__name__} of {weight.dtype}, and not as plain numbers"
        own = kind.forward is not Conv1D.forward if isinstance(module, Conv1D) else not _computes_plainly(module)
        return f"{kind.__name__} does not compute with its weight as it is stored" if own else None
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention computes with its matrices in one fused call, whose inputs cannot be observed"
    fused = [name for name, p in module._parameters.items() if p is not None and p.ndim > 2 and max(p.shape[1:]) > 1]
    if fused and not isinstance(module, nn.Embedding):
        shape = tuple(module._parameters[fused[0]].shape)  # type: ignore[union-attr]
        return f"{kind.__name__}.{fused[0]} holds several matrices in one tensor {shape}, as fused experts do, each with inputs of its own"
    return None


def _computes_plainly(module: nn.Module) -> bool:
    """Whether a Linear or a convolution computes as torch's own: weight standardization, say, would undo zeros."""
    base = next(b for b in (nn.Linear, *_CONVOLUTIONS) if isinstance(module, b))
    plain = type(module).forward is base.forward
    return plain and getattr(type(module), "_conv_forward", None) is getattr(base, "_conv_forward", None)


def _wanted(name: str, targets: Sequence[str] | None, host: Host) -> bool:
    return targets is None or any(_matches(name, pattern, host) for pattern in targets)


def _matches(name: str, pattern: str, host: Host) -> bool:
    """Patterns may name modules with or without the prefix of the headless model ("bert.")."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.removeprefix(f"{host.base_prefix}."), pattern)


def _check_patterns(targets: Sequence[str] | None, names: Sequence[str], host: Host) -> None:
    for pattern in targets or ():
        if any(_matches(name, pattern, host) for name in names):
            continue
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else "A pattern covers the whole path: '*.query', say."
        raise ConfigError(
            f"targets: {pattern!r} matches no linear map in the blocks of {host.label} (embeddings, heads, stems are left alone). {hint} "
            f"Found, for example: {', '.join(list(names)[:4])}."
        )


def _example(found: Sequence[Matrix]) -> str:
    return f" such as '*.{found[0].role}'" if found else ""
