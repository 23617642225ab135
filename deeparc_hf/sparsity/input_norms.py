"""How large the inputs of linear maps are: the L2 norm of each input over all unpadded positions of the calibration
data.

Sums of squares are added up in float64 (float32 where the device knows no float64, and float64 over its batches); no
activation outlives the forward pass that made it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import CalibrationError, CalibrationWarning
from ..observe.axes import Axes
from ..observe.batches import padding_masks
from ..observe.hooks import given_hidden_states, hooked
from .matrices import Matrix

__all__ = ["InputNorms", "finished_norms", "warn_unmasked"]

_CHUNK = 8192  # positions that are squared in float64 at a time


class InputNorms:
    """Observes the inputs of matrices during forward passes.

    Args:
        matrices: the maps to observe.
        axes: what the dimensions of the blocks' outputs mean, by stack (`find_axes`).
    """

    def __init__(self, matrices: Sequence[Matrix], axes: Mapping[str, Axes | str]) -> None:
        self._matrices = list(matrices)
        self._axes = axes
        self._inputs: Mapping[str, Any] = {}
        self._sums: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor | None] = {}  # by stack, in the order of its blocks' outputs
        self._lost: set[str] = set()  # stacks of which it is not known which positions of the batch are padding
        self._encoder_mask: Tensor | None = None
        self._foreign: set[int] = set()  # storage of the encoder's output, as decoder blocks are handed it
        self.unmasked: set[str] = set()  # maps whose inputs include padding

    def batch(self, inputs: Mapping[str, Any]) -> None:
        """Say which batch comes next."""
        self._inputs, self._masks, self._lost = inputs, {}, set()
        self._encoder_mask = padding_masks(inputs)["encoder"]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Hooks on the maps and on their blocks; gone afterwards."""
        blocks = {(matrix.stack.name, matrix.block): matrix.stack.blocks[matrix.block] for matrix in self._matrices}
        of_blocks = [(block, self._entering(name)) for (name, _), block in blocks.items()]
        of_maps = [(matrix.module, self._hook(matrix)) for matrix in self._matrices]
        with hooked(m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in [*of_blocks, *of_maps]):
            yield

    def sums(self) -> dict[str, Tensor]:
        """Sums of squares by matrix, on the CPU: shape (groups, inputs). Those of several processes are added up."""
        return {name: value.cpu() for name, value in self._sums.items()}

    def _entering(self, stack: str) -> Any:
        def enter(block: nn.Module, args: Any, kwargs: Any) -> None:
            values = [*args[1:], *(value for key, value in kwargs.items() if key != "hidden_states")]
            self._foreign = {
                v.data_ptr() for v in values if isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point()
            }
            hidden, axes = given_hidden_states(args, kwargs), self._axes.get(stack)
            if isinstance(hidden, Tensor) and isinstance(axes, Axes):
                self._masks[stack], unknown = axes.mask_of(self._inputs, hidden.shape)
                if unknown:
                    self._lost.add(stack)

        return enter

    def _hook(self, matrix: Matrix) -> Any:
        def take(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            convolution = isinstance(module, (nn.Conv1d, nn.Conv2d))
            if convolution:
                self._note_padding(matrix, x)
            squares = _of_convolution(module, x) if convolution else _of_rows(self._rows(matrix, x))[None]
            known = self._sums.get(matrix.name)
            self._sums[matrix.name] = squares if known is None else known + squares

        return take

    def _rows(self, matrix: Matrix, x: Tensor) -> Tensor:
        """The unpadded positions of a map's input, (..., d_in) -> (N, d_in)."""
        mask = self._masks.get(matrix.stack.name)
        if matrix.stack.name in self._lost:
            self.unmasked.add(matrix.name)
        if matrix.stack.side == "decoder" and x.data_ptr() in self._foreign:
            mask = self._encoder_mask  # keys and values of the cross-attention
        rows = x.reshape(-1, x.shape[-1])
        if mask is None or bool(mask.all()):
            return rows
        if x.shape[:-1] == mask.shape or (x.ndim == 2 and len(rows) == mask.numel()):
            return rows[mask.flatten()]
        unpadded = len(rows) == int(mask.sum())
        # what has another number of samples, or just one (tables of positions), knows no padding
        if not unpadded and (x.ndim == 2 or len(x) == len(mask) > 1):
            self.unmasked.add(matrix.name)
        return rows

    def _note_padding(self, matrix: Matrix, x: Tensor) -> None:
        """A convolution over the positions of a text: its kernel reaches over their ends."""
        mask = self._masks.get(matrix.stack.name)
        if mask is not None and x.ndim == 3 and len(x) == len(mask) and not bool(mask.all()):
            self.unmasked.add(matrix.name)


def finished_norms(matrices: Sequence[Matrix], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The norms of what several processes saw: shape (d_in,), or (d_out, d_in) where groups of rows have inputs of
    their own.

    Raises:
        CalibrationError: if a map did not run, or its inputs hold NaN or infinity.
    """
    norms = {}
    for matrix in matrices:
        found = [part[matrix.name] for part in parts if matrix.name in part]
        if not found:
            raise CalibrationError(
                f"{matrix.name} did not run in the forward passes over the calibration data, or the model uses its "
                "weight without calling it. Give batches that reach every part of the model, or leave it out: "
                "targets=[...] names the maps that are meant."
            )
        total = torch.stack([value.to(torch.float64) for value in found]).sum(dim=0)
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(
                f"The inputs of {matrix.name} hold NaN or infinity on the calibration data (its weights are "
                f"{matrix.weight.dtype}). Load the model in float32 or bfloat16, and check its weights and the data."
            )
        norm = total.sqrt()
        per_group = matrix.rows().shape[0] // matrix.groups
        norms[matrix.name] = norm[0] if matrix.groups == 1 else norm.repeat_interleave(per_group, dim=0)
    return norms


def warn_unmasked(names: set[str]) -> None:
    """Warn of maps whose inputs were counted with their padding."""
    if names:
        first = min(names)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"The positions that {first}{more} computes on are not those of the attention mask, so padding counts "
            "among its inputs. Give batches of texts of about one length, or one text a batch.",
            CalibrationWarning,
            stacklevel=4,
        )


def _accumulating(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _of_rows(rows: Tensor) -> Tensor:
    """Sums of squares of each column."""
    dtype = _accumulating(rows)
    parts = [chunk.to(dtype).square().sum(dim=0) for chunk in rows.split(_CHUNK)]
    return torch.stack(parts).sum(dim=0) if parts else torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)


def _padding(module: nn.Module) -> list[int]:
    """Positions that a convolution adds on both sides, the last dimension first, as `pad` takes them."""
    sides: list[int] = []
    for size, dilation, number in zip(
        reversed(module.kernel_size), reversed(module.dilation), range(len(module.kernel_size)), strict=True
    ):
        if module.padding == "same":
            total = dilation * (size - 1)
            sides += [total // 2, total - total // 2]
        else:
            both = 0 if module.padding == "valid" else module.padding[-1 - number]
            sides += [both, both]
    return sides


def _of_convolution(module: nn.Module, x: Tensor) -> Tensor:
    """Sums of squares over all places where the kernel is laid, for each channel and kernel position: (groups, channels
    x kernel).
    """
    kernel: tuple[int, ...] = module.kernel_size
    stride, dilation = module.stride, module.dilation
    if x.ndim == len(kernel) + 1:  # no batch dimension
        x = x[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, _padding(module), mode=mode)
    sizes = x.shape[2:]
    counts = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)]
    dtype = _accumulating(x)
    total = torch.zeros(x.shape[1], *kernel, dtype=dtype, device=x.device)
    for sample in x:
        squares = sample.to(dtype).square()
        for place in itertools.product(*map(range, kernel)):
            spans = [
                slice(p * d, p * d + s * (n - 1) + 1, s)
                for p, d, s, n in zip(place, dilation, stride, counts, strict=True)
            ]
            total[(slice(None), *place)] += squares[(slice(None), *spans)].flatten(1).sum(dim=1)
    return total.reshape(module.groups, -1)
