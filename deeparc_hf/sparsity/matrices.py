"""The linear maps of a model's blocks as matrices, without tables and routers: what weight sparsity works on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..architectures import Host, Stack, Subject
from ..core.block_paths import block_path, place_in
from ..core.compat import buffers_of, convolution_of, parameters_of
from ..core.plain_text import did_you_mean
from ..errors import ConfigError, UnsupportedModelError

__all__ = ["CONVOLUTIONS", "Matrix", "find_matrices", "is_sharded", "matrices_named"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
_MAPS = (nn.Linear, Conv1D, *CONVOLUTIONS)
_PACKED = (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
_ROUTER = re.compile(r"Router|Gating|Gate$")
_GATES = ("gate", "router", "shared_expert_gate")


@dataclass(frozen=True, eq=False)
class Matrix:
    """One linear map of a block: a Linear, GPT-2's Conv1D, or a convolution."""

    name: str  # module path, seen from the host's root
    module: nn.Module
    stack: Stack
    block: int  # its index in the stack

    @property
    def weight(self) -> nn.Parameter:
        return parameters_of(self.module)["weight"]  # type: ignore[return-value]

    @property
    def role(self) -> str:
        """Path within the block: the same for the same map of every block."""
        place = place_in(self.stack.name, self.name)
        return "" if place is None else place[1]

    @property
    def groups(self) -> int:
        """Number of groups of output rows that meet inputs of their own: those of a convolution, else 1."""
        return self.module.groups if isinstance(self.module, CONVOLUTIONS) else 1

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """The weight, or a tensor of its shape, as a view of shape (d_out, d_in); a convolution's inputs are channel x
        kernel position.
        """
        weight = self.weight.detach() if weight is None else weight
        return weight.t() if isinstance(self.module, Conv1D) else weight.flatten(1)  # Conv1D stores (d_in, d_out)

    def shaped(self, rows: Tensor) -> Tensor:
        """The inverse of `rows`: a tensor of shape (d_out, d_in) in the shape of the weight."""
        if isinstance(self.module, Conv1D):
            return rows.t().contiguous()
        return rows.reshape(self.weight.shape)


def find_matrices(subject: Subject, targets: Sequence[str] | None = None) -> list[Matrix]:
    """The linear maps of all blocks, in the order of the blocks; `targets` are patterns (fnmatch) of module paths.

    Raises:
        ConfigError: if a pattern matches none.
        UnsupportedModelError: if one that is wanted cannot have single weights zeroed. The message names it.
    """
    host = subject.host
    if is_sharded(host.root):
        raise UnsupportedModelError(
            f"The parameters of {host.label} are sharded (FSDP, DeepSpeed), so no process sees whole rows of a matrix. "
            "Call sparsify_model before the model is wrapped, or train in DistributedDataParallel."
        )
    found, refused = _survey(subject)
    wanted = _targeted(targets, [*(matrix.name for matrix in found), *refused], host)
    name = next((name for name in refused if name in wanted), None)
    if name is not None:
        advice = " To leave it out, name the maps that are meant: targets=[...], patterns of module paths such as "
        raise UnsupportedModelError(
            f"The weights of {name} of {host.label} cannot be zeroed one by one: {refused[name]}. Nothing was changed."
            + (f"{advice}'*.{found[0].role}'." if found else "")
        )
    chosen = [matrix for matrix in found if matrix.name in wanted]
    if not chosen:
        raise UnsupportedModelError(
            f"The blocks of {host.label} hold no linear maps (Linear, Conv1D, Conv1d, Conv2d) to sparsify."
        )
    return chosen


def matrices_named(subject: Subject, names: Collection[str]) -> dict[str, Matrix]:
    """Those of some linear maps that the model has, by their exact module paths."""
    return {matrix.name: matrix for matrix in _survey(subject)[0] if matrix.name in names}


def is_sharded(root: nn.Module) -> bool:
    """Whether the parameters of a model are spread over processes."""
    wrappers = ("FullyShardedDataParallel", "DeepSpeedEngine")
    return any(type(module).__name__.startswith(wrappers) for module in root.modules()) or any(
        type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id") for parameter in root.parameters()
    )


def _survey(subject: Subject) -> tuple[list[Matrix], dict[str, str]]:
    """All linear maps of the blocks, and those whose weights cannot be zeroed one by one, each with the reason."""
    found: list[Matrix] = []
    refused: dict[str, str] = {}
    owners: dict[int, dict[int, str]] = defaultdict(dict)  # of each parameter, each with a path that leads to it
    for path, module in subject.root.named_modules():
        for parameter in parameters_of(module).values():
            owners[id(parameter)][id(module)] = path
    for name, module, stack, block in _modules(subject.stacks):
        reason = _refusal(module, owners)
        if reason is not None:
            refused[name] = reason
        elif isinstance(module, _MAPS):
            found.append(Matrix(name, module, stack, block))
    return found, refused


def _modules(stacks: Mapping[str, Stack]) -> Iterator[tuple[str, nn.Module, Stack, int]]:
    for stack in stacks.values():
        for index, block in enumerate(stack.blocks):
            routers: tuple[str, ...] = ()
            for path, module in block.named_modules():
                if _routes(block, path, module):
                    routers += (f"{path}.",)
                if not f"{path}.".startswith(routers):
                    yield block_path(stack.name, index, path), module, stack, index


def _routes(block: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a module chooses among experts: a few weights on which everything depends."""
    if _ROUTER.search(type(module).__name__):
        return True
    above, _, name = path.rpartition(".")
    siblings = (child for child, _ in block.get_submodule(above).named_children())
    return name in _GATES and any("expert" in child for child in siblings if child != name)


def _refusal(module: nn.Module, owners: Mapping[int, Mapping[int, str]]) -> str | None:
    """Why a module's weights cannot be zeroed one by one; None if they can, or if it has none that would be."""
    kind = type(module)
    packed = any(
        t is not None and t.ndim > 1 and (t.dtype in _PACKED or name.startswith("qweight"))
        for name, t in {**parameters_of(module), **buffers_of(module)}.items()
    )
    if packed or kind.__module__.startswith(("torch.ao.nn.quantized", "bitsandbytes.")):
        return f"it is packed by quantization ({kind.__name__}); sparsify the model first and quantize it afterwards"
    if isinstance(module, _MAPS):
        weight = parameters_of(module).get("weight")
        if weight is None:
            return f"its weight is computed from something else ({kind.__name__}, a parametrization)"
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            return f"it stores its weight as {type(weight.data).__name__} of {weight.dtype}, and not as plain numbers"
        if not _computes_plainly(module):
            return f"{kind.__name__} does not compute with its weight as it is stored"
        others = [path for owner, path in owners[id(weight)].items() if owner != id(module)]
        return f"its weight is tied to that of {others[0]}, which would get the zeros too" if others else None
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention computes with its matrices in one fused call, whose inputs cannot be observed"
    fused = [name for name, p in parameters_of(module).items() if p is not None and p.ndim > 2 and max(p.shape[1:]) > 1]
    if fused and not isinstance(module, nn.Embedding):
        shape = tuple(parameters_of(module)[fused[0]].shape)  # type: ignore[union-attr]
        return (
            f"{kind.__name__}.{fused[0]} holds several matrices in one tensor {shape}, as fused experts do, each "
            "with inputs of its own"
        )
    return None


def _computes_plainly(module: nn.Module) -> bool:
    """Whether a map computes as its library's own: weight standardization, say, would undo zeros."""
    base = next(b for b in _MAPS if isinstance(module, b))
    if type(module).forward is base.forward:
        return convolution_of(type(module)) is convolution_of(base)
    weight = module.weight
    if base is not nn.Linear or weight.device.type == "meta":
        return base is nn.Linear
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        with torch.no_grad():
            return bool(torch.allclose(module(x), functional.linear(x, weight, module.bias), rtol=1e-2, atol=1e-4))
    except Exception:
        return False


def _targeted(targets: Sequence[str] | None, names: Sequence[str], host: Host) -> set[str]:
    """The names that a pattern means, with or without the prefix of the headless model ("bert.")."""
    if targets is None:
        return set(names)
    found: set[str] = set()
    for pattern in targets:
        bare = f"{host.base_prefix}."
        matches = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.removeprefix(bare), pattern)]
        if not matches:
            hint = did_you_mean(pattern, names, cutoff=0.5) or " A pattern covers the whole path: '*.query', say."
            raise ConfigError(
                f"targets: {pattern!r} matches no linear map in the blocks of {host.label} (embeddings, heads, stems "
                f"are left alone).{hint} Found, for example: {', '.join(names[:4])}."
            )
        found.update(matches)
    return found
