"""The L2 norm of each input of linear maps over all unpadded positions of the calibration data.

Squares are added up in float64 (float32 where the device knows no float64); no activation outlives its forward
pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architectures import Subject
from ..core.caller import warn_caller
from ..core.offload import device_of, holding
from ..core.progress_bars import bar
from ..errors import CalibrationError, CalibrationWarning
from ..observe.axes import Axes
from ..observe.batches import batch_size, padding_masks
from ..observe.calibration import Calibration
from ..observe.forward import forward
from ..observe.hooks import given_hidden_states, hooked
from ..observe.rows import with_axes
from .matrices import CONVOLUTIONS, Matrix
from .sequential import Passes, block_by_block

__all__ = ["measured_inputs"]

_CHUNK = 8192  # positions that are squared in float64 at a time
_MEASURING = "Measuring inputs"


def measured_inputs(
    subject: Subject, matrices: Sequence[Matrix], calibration: Calibration | None, sequential: bool, progress: bool
) -> Iterator[tuple[int, Mapping[str, Tensor | None]]]:
    """Measure the inputs of linear maps of a model that is evaluating: block by block, where each block may be changed
    before the next are run, or all in one pass.

    Yields:
        The number of samples over all processes, and the norms of some maps: shape (d_in,), or (d_out, d_in) where
        groups of rows have inputs of their own. Without calibration data 0, and None for all of the maps.
    """
    if calibration is None:
        yield 0, dict.fromkeys(matrix.name for matrix in matrices)
        return
    unmasked: set[str] = set()  # maps whose inputs include padding
    yield from (_block_by_block if sequential else _at_once)(subject, matrices, calibration, progress, unmasked)
    if unmasked:
        more = f" and {len(unmasked) - 1} more" if len(unmasked) > 1 else ""
        warn_caller(
            f"The positions that {min(unmasked)}{more} computes on are not those of the attention mask, so padding "
            "counts among its inputs. Give batches of texts of about one length, or one text a batch.",
            CalibrationWarning,
        )


def _at_once(
    subject: Subject, matrices: Sequence[Matrix], calibration: Calibration, progress: bool, unmasked: set[str]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    host = subject.host

    def look() -> tuple[int, dict[str, Tensor]]:
        sizes: list[int] = []
        stacks = {matrix.stack.name: matrix.stack for matrix in matrices}
        batches, axes = with_axes(host, stacks.values(), calibration.inputs(host))

        def passes() -> Passes:
            for inputs in batches:
                yield inputs, partial(forward, host, inputs)
                sizes.append(batch_size(inputs))
                advance(sizes[-1])

        with calibration.bar(_MEASURING, progress) as advance:
            sums = _Inputs(matrices, axes, unmasked).sums(passes())
        return sum(sizes), sums

    seen, parts = zip(*calibration.together(look), strict=True)
    yield _require_samples(sum(seen)), _norms(matrices, parts)


def _block_by_block(
    subject: Subject, matrices: Sequence[Matrix], calibration: Calibration, progress: bool, unmasked: set[str]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    host = subject.host
    device = device_of(host.root)
    held: list[dict[str, Any]] = []

    def collect() -> int:
        # kept where they came from rather than on the accelerator; copies, as a loader may fill the same tensors again
        held.extend(_to("cpu", inputs, copy=True) for inputs in calibration.inputs(host))
        return sum(map(batch_size, held))

    def batches() -> Iterator[dict[str, Any]]:
        return (_to(device, inputs) for inputs in held)

    samples = _require_samples(sum(calibration.together(collect)))
    _, axes = with_axes(host, subject.stacks.values(), batches())
    blocks: dict[str, dict[int, list[Matrix]]] = {}
    for matrix in matrices:
        blocks.setdefault(matrix.stack.name, {}).setdefault(matrix.block, []).append(matrix)
    with bar(_MEASURING, progress, sum(map(len, blocks.values())), "block") as shown:
        for name, wanted in blocks.items():
            visits = block_by_block(host, subject.stacks[name], batches, max(wanted), calibration.together)
            for index, passes in enumerate(visits):
                if index in wanted:
                    observed = _Inputs(wanted[index], axes, unmasked)
                    # not beyond the yield: an error elsewhere would leave the weights held
                    with holding(subject.stacks[name].blocks[index]):
                        sums = calibration.together(partial(observed.sums, passes()))
                    yield samples, _norms(wanted[index], sums)
                    shown.update()


class _Inputs:
    """Observes the inputs of matrices during forward passes, and names those whose inputs include padding."""

    def __init__(self, matrices: Sequence[Matrix], axes: Mapping[str, Axes | str], unmasked: set[str]) -> None:
        self._matrices = matrices
        self._axes = axes
        self._unmasked = unmasked
        self._sums: dict[str, Tensor] = {}
        # of the batch at hand
        self._inputs: Mapping[str, Any] = {}
        self._masks: dict[str, Tensor | None] = {}  # by stack, in the order of its blocks' outputs
        self._lost: set[str] = set()  # stacks of which it is not known which positions are padding
        self._foreign: set[int] = set()  # storage of the encoder's output, as decoder blocks are handed it

    def sums(self, passes: Passes) -> dict[str, Tensor]:
        """Sums of squares by matrix, on the CPU: shape (groups, inputs)."""
        blocks = {(matrix.stack.name, matrix.block): matrix.stack.blocks[matrix.block] for matrix in self._matrices}
        of_blocks = [(block, partial(self._enter, name)) for (name, _), block in blocks.items()]
        of_maps = [(matrix.module, partial(self._take, matrix)) for matrix in self._matrices]
        with hooked(m.register_forward_pre_hook(hook, with_kwargs=True) for m, hook in [*of_blocks, *of_maps]):
            for inputs, run in passes:
                self._inputs, self._masks, self._lost = inputs, {}, set()
                run()
        return {name: value.cpu() for name, value in self._sums.items()}

    def _enter(self, stack: str, block: nn.Module, args: Any, kwargs: Any) -> None:
        values = [*args[1:], *(value for key, value in kwargs.items() if key != "hidden_states")]
        self._foreign = {
            v.data_ptr() for v in values if isinstance(v, Tensor) and v.ndim == 3 and v.is_floating_point()
        }
        hidden, axes = given_hidden_states(args, kwargs), self._axes.get(stack)
        if isinstance(hidden, Tensor) and isinstance(axes, Axes):
            self._masks[stack], unknown = axes.mask_of(self._inputs, hidden.shape)
            if unknown:
                self._lost.add(stack)

    def _take(self, matrix: Matrix, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if isinstance(module, CONVOLUTIONS):
            mask = self._masks.get(matrix.stack.name)
            # over the positions of a text: its kernel reaches over their ends
            if mask is not None and x.ndim == 3 and len(x) == len(mask) and not bool(mask.all()):
                self._unmasked.add(matrix.name)
            squares = _of_convolution(module, x)
        else:
            squares = _of_rows(self._rows(matrix, x))[None]
        self._sums[matrix.name] = squares + self._sums.get(matrix.name, 0.0)

    def _rows(self, matrix: Matrix, x: Tensor) -> Tensor:
        """The unpadded positions of a map's input, (..., d_in) -> (N, d_in)."""
        mask = self._masks.get(matrix.stack.name)
        if matrix.stack.name in self._lost:
            self._unmasked.add(matrix.name)
        if matrix.stack.side == "decoder" and x.data_ptr() in self._foreign:
            mask = padding_masks(self._inputs)["encoder"]  # keys and values of the cross-attention
        rows = x.reshape(-1, x.shape[-1])
        if mask is None or bool(mask.all()):
            return rows
        if x.shape[:-1] == mask.shape or (x.ndim == 2 and len(rows) == mask.numel()):
            return rows[mask.flatten()]
        unpadded = len(rows) == int(mask.sum())
        # what has another number of samples, or just one (tables of positions), knows no padding
        if not unpadded and (x.ndim == 2 or len(x) == len(mask) > 1):
            self._unmasked.add(matrix.name)
        return rows


def _norms(matrices: Sequence[Matrix], parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The norms of what several processes saw."""
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


def _require_samples(samples: int) -> int:
    if samples == 0:
        raise CalibrationError(
            "The calibration data gave no samples. Give a dataloader that is not empty; an iterator can be used only "
            "once."
        )
    return samples


def _to(device: torch.device | str, inputs: Mapping[str, Any], copy: bool = False) -> dict[str, Any]:
    return {k: value.to(device, copy=copy) if isinstance(value, Tensor) else value for k, value in inputs.items()}


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
    for place in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[place] * (module.kernel_size[place] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [0 if module.padding == "valid" else module.padding[place]] * 2
    return sides


def _of_convolution(module: nn.Module, x: Tensor) -> Tensor:
    """Sums of squares over all places where the kernel is laid: (groups, channels x kernel positions)."""
    kernel: tuple[int, ...] = module.kernel_size
    if x.ndim == len(kernel) + 1:  # no batch dimension
        x = x[None]
    x = functional.pad(x, _padding(module), mode=module.padding_mode.replace("zeros", "constant"))
    dtype = _accumulating(x)
    total = torch.zeros(x.shape[1], *kernel, dtype=dtype, device=x.device)
    for sample in x:
        squares = sample.to(dtype).square()
        for dim, (size, stride, dilation) in enumerate(zip(kernel, module.stride, module.dilation, strict=True), 1):
            # from the first place where the kernel is laid to the last, for each position in it
            span = (sample.shape[dim] - dilation * (size - 1) - 1) // stride * stride + 1
            squares = squares.unfold(dim, span, dilation).narrow(dim, 0, size)[..., ::stride]
        total += squares.sum(dim=tuple(range(-len(kernel), 0)))
    return total.reshape(module.groups, -1)
