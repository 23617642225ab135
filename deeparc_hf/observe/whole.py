"""Rows of whole outputs: what a block puts out for a sample, all positions and features, is one row.

The rows of a large image model's batch do not fit into memory together (64 outputs of 256 x 56 x 56 values are 200 MB a
block), so each block's hook makes them a Gram matrix at once. Gram matrices of blocks with outputs of different shapes
can be compared, so the stacks of a chain (the stages of a CNN) are observed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..architectures import Stack
from ..errors import CalibrationError
from ..similarity import SimilarityMetric
from ..similarity.base import centered_gram
from .axes import SIDE_BY_SIDE, Axes
from .collect import Observed, require_finite
from .hooks import did_not_run, hidden_states

__all__ = ["WholeObserver"]


class WholeObserver:
    """Collects the Gram matrices of whole outputs of the blocks of a chain of stacks, and hands them to a metric.

    Args:
        stacks: in forward order; each one's output goes to the next.
        metric: a fresh metric, which receives the Gram matrices, of all blocks in their order.
    """

    def __init__(self, stacks: Sequence[Stack], metric: SimilarityMetric) -> None:
        self.stacks = list(stacks)
        self.name = ", ".join(stack.name for stack in stacks)
        self.metric = metric
        self.count = 0
        self.obstacle: str | None = None  # why the stacks cannot be compared
        self._axes: dict[str, Axes] = {}
        self._inputs: Mapping[str, Any] = {}
        self._grams: dict[tuple[str, int], Tensor] = {}
        self._shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self._largest = 0

    def settle(self, known: Mapping[str, Axes | str]) -> None:
        """Take note of what the dimensions of the blocks' outputs mean, or why that is not known."""
        for axes in (known[stack.name] for stack in self.stacks if stack.name in known):
            if isinstance(axes, str):
                self.obstacle = axes
            elif axes.samples is None:
                self.obstacle = SIDE_BY_SIDE
        if self.obstacle is None:
            self._axes = {name: axes for name, axes in known.items() if isinstance(axes, Axes)}

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Say which batch comes next."""
        self._inputs = inputs

    def hooks(self) -> Iterator[RemovableHandle]:
        """Set a forward hook on each block."""
        for stack in self.stacks:
            for index, block in enumerate(stack.blocks):
                yield block.register_forward_hook(partial(self.take, stack, index))

    def flush(self) -> None:
        """Hand the batch's Gram matrices to the metric.

        Raises:
            CalibrationError: if one holds NaN or infinity, or a block did not run.
        """
        if self.obstacle is not None:
            return
        grams = []
        for stack in self.stacks:
            for index in range(len(stack)):
                if (stack.name, index) not in self._grams:
                    raise did_not_run(stack, index)
                grams.append(self._grams[stack.name, index])
                dtype = next(stack.blocks[index].parameters()).dtype
                require_finite(grams[-1], f"Block {index} of {stack.name}", dtype, f"its weights are {dtype}")
        self._grams = {}
        self.metric.update_grams(torch.stack([gram.to(grams[0].device) for gram in grams]))
        self.count += len(grams[0]) if len(grams[0]) >= self.metric.min_rows else 0
        self._largest = max(self._largest, len(grams[0]))

    def label(self, key: int | str) -> str:
        return f"Block {key} of {self.name}"

    def observed(self) -> Observed:
        """What was seen so far. No `flush` may follow."""
        sums = {key: value.detach().cpu() for key, value in self.metric.finish().items()}
        return Observed(sums, self.count, {}, obstacle=self.obstacle, batch=self._largest)

    def take(self, stack: Stack, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """The hook: keep the Gram matrix of what a block puts out."""
        if stack.name not in self._axes:
            return
        hidden = hidden_states(output).detach()
        padding = self._axes[stack.name].padding(self._inputs, hidden.shape)
        if padding.unknown or (padding.mask is not None and not bool(padding.mask.all())):
            raise CalibrationError(
                f"rows='flat' compares whole outputs, and a calibration batch has padding, which {stack.name} would be "
                "compared on. Give samples of equal length, or compare other rows (rows='tokens')."
            )
        axes = self._axes[stack.name]
        shape = tuple(size for axis, size in enumerate(hidden.shape) if axis != axes.samples)
        before = self._shapes.setdefault((stack.name, index), shape)
        if before != shape:
            raise CalibrationError(
                f"rows='flat' compares whole outputs, so all samples must give outputs of one shape: block {index} of "
                f"{stack.name} gave {_times(before)} values a sample in one batch and {_times(shape)} in another. "
                "Scale (or cut) all samples to one size, or compare other rows (rows='tokens')."
            )
        self._grams[stack.name, index] = centered_gram(axes.rows(hidden).flatten(start_dim=1))


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
