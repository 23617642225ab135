"""How a block ends: the last linear map, what its output is scaled by, and the module that makes the block's output of
the sum.

    s = scale * map(z) + rest,    output = final(s)

Pre-norm blocks (T5, Llama) have no final module, post-norm ones (BERT) a norm, ResNet's bottlenecks an activation. None
of it is read from names: a block is run with its map's output changed a little, and what the change does to s tells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.compat import BatchNorm
from ..observe.hooks import hidden_states, hooked

__all__ = ["Ending", "at_home", "find_ending", "rows"]

_ROUNDING = 1e-4


@dataclass(frozen=True)
class Ending:
    """The end of a block; paths are those within the block."""

    map: str  # the last linear map: a Linear, GPT-2's Conv1D, or a 1x1 convolution
    batch_norm: str | None  # right behind it
    final: str | None  # the module that makes the block's output of s; None: s is the output
    scale: Tensor  # what the map's output is multiplied by, shape (d_out,)


@dataclass(eq=False)
class _Run:
    path: str
    module: nn.Module
    input: Tensor
    output: Tensor


def find_ending(block: nn.Module, run: Callable[[], Any]) -> Ending | str:
    """Find how a block that is evaluating ends, or why not in a way that can be refitted; `run` calls it on a batch."""
    output, leaves = _observed(block, run, None)
    maps = [leaf for leaf in leaves if isinstance(leaf.module, (nn.Linear, Conv1D, nn.Conv2d))]
    found: Ending | str = "it has no linear map"
    for last in reversed(maps[-2:]):  # the very last one may be that of a shortcut
        ending = _tried(block, run, output, leaves, last)
        if isinstance(ending, Ending):
            return ending
        found = ending if last is maps[-1] else found
    return found


def _tried(block: nn.Module, run: Callable[[], Any], output: Tensor, leaves: list[_Run], last: _Run) -> Ending | str:
    """The ending, if it is this map's output that the block's sum is made of."""
    if isinstance(last.module, nn.Conv2d):
        m = last.module
        if (m.kernel_size, m.stride, m.groups) != ((1, 1), (1, 1), 1) or m.padding not in ((0, 0), 0):
            return f"its last map, {last.path}, is a convolution over neighbours"
    if any(leaf.path == last.path and leaf.output.shape != last.output.shape for leaf in leaves):
        return f"its last map, {last.path}, runs more than once"  # on global tokens by themselves (PEGASUS-X)
    behind = leaves[leaves.index(last) + 1 :]
    norm = next(
        (leaf for leaf in behind if isinstance(leaf.module, BatchNorm) and torch.equal(leaf.input, last.output)), None
    )
    if norm is not None and any(getattr(norm.module, name) is None for name in ("weight", "bias", "running_mean")):
        return f"{norm.path} has no weights or no running statistics of its own, which would have to be refitted"
    generator = torch.Generator().manual_seed(0)
    change = (torch.randn(last.output.shape, generator=generator) * _size(last.output, output)).to(last.output)
    output_changed, leaves_changed = _observed(block, run, (last.path, change))
    final, final_changed = leaves[-1], leaves_changed[-1]
    effect, final_path, what = output_changed - output, None, "its output"
    # an activation may let everything through on this batch, so it is looked for first
    if final is not last and final.path == final_changed.path and torch.equal(final.output, output):
        effect, final_path, what = final_changed.input - final.input, final.path, f"what goes into {final.path}"
    scale = _scale(effect, change, last.module)
    if scale is None:
        return f"{what} is not a sum of its last map's output and something else"
    return Ending(last.path, None if norm is None else norm.path, final_path, scale)


def at_home(tensor: Tensor) -> Tensor:
    """The tensor where float64 can be computed with: on its device, or on the CPU instead of Apple's GPU."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def rows(tensor: Tensor, module: nn.Module) -> Tensor:
    """Positions in rows: (..., features), or of a convolution (batch, features, height, width), as (N, features)."""
    if isinstance(module, nn.Conv2d):
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1])


def _size(put_out: Tensor, output: Tensor) -> float:
    """How much the map's output is changed: a little, but where numbers have few digits so much that these show it."""
    size = 0.1 * float(put_out.float().std())
    return size if put_out.dtype.itemsize > 2 else max(size, 4.0 * float(output.float().square().mean().sqrt()))


def _scale(effect: Tensor, change: Tensor, module: nn.Module) -> Tensor | None:
    """The factor of each output by which a change of the map's output reaches a sum; None if it does more."""
    if effect.shape != change.shape or not bool(effect.any()):
        return None
    most = 1e-2 if effect.dtype.itemsize > 2 else 2e-2
    effect, change = at_home(rows(effect, module)).double(), at_home(rows(change, module)).double()
    scale = (effect * change).sum(dim=0) / change.square().sum(dim=0)
    error = (effect - change * scale).norm() / effect.norm().clamp(min=1e-30)
    if not float(error) < most:  # NaN too
        return None
    # most blocks add the map's output as it is; what rounding makes of that hangs on the batch
    return torch.where((scale - 1.0).abs() < _ROUNDING, 1.0, scale)


def _observed(block: nn.Module, run: Callable[[], Any], change: tuple[str, Tensor] | None) -> tuple[Tensor, list[_Run]]:
    """The block's hidden states, and its innermost modules in the order in which they end; one's output may change."""
    leaves: list[_Run] = []
    inputs: dict[nn.Module, Any] = {}
    paths = {module: path for path, module in block.named_modules() if next(module.children(), None) is None}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        value = args[0] if args else next(iter(kwargs.values()), None)
        inputs[module] = value.clone() if isinstance(value, Tensor) else value

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not isinstance(inputs.get(module), Tensor):
            return None
        if change is not None and change[0] == paths[module]:
            output = output + change[1]
        leaves.append(_Run(paths[module], module, inputs[module], output.clone()))
        return output

    noting = (module.register_forward_pre_hook(before, with_kwargs=True) for module in paths)
    changing = (module.register_forward_hook(after) for module in paths)
    with hooked(chain(noting, changing)):
        return hidden_states(run()), leaves
