"""Observation: one forward pass over calibration batches, with hooks on the blocks, feeding similarity metrics.

Where rows are whole outputs, `whole` does what `StackObserver` does here. Memory does not grow with the number of
samples, and the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..architectures import Host, Stack
from ..similarity import SimilarityMetric
from .axes import SIDE_BY_SIDE, Axes, Padding, find_axes
from .calibration import Calibration, Idle
from .collect import Observed, collect, note_first, require_finite
from .forward import forward
from .hooks import did_not_run, hidden_states, hooked
from .whole import WholeObserver

__all__ = ["StackObserver", "observe", "with_axes"]


class StackObserver:
    """Collects the rows ("tokens", "mean" or "first") of one stack's blocks in a forward pass for a fresh metric."""

    def __init__(self, stack: Stack, metric: SimilarityMetric, rows: str) -> None:
        self.stack = stack
        self.name = stack.name
        self.metric = metric
        self.rows = rows
        self.count = 0
        self.obstacle: str | None = None  # why the stack cannot be compared
        self._axes: Axes | None = None
        self._inputs: Mapping[str, Any] = {}
        self._unmasked = False  # whether padding was compared, because it is not known where it is
        self._samples = 0
        self._batch: dict[int, Tensor] = {}
        self._first: dict[int | str, Tensor | None] = {}
        # what is the same for all blocks in the batch at hand: the padding, and where rows are tokens the positions
        self._shape: tuple[int, ...] = ()
        self._padding = Padding(None)
        self._chosen = torch.empty(0, dtype=torch.long)
        self._per_sample: list[int] = []

    @property
    def stacks(self) -> list[Stack]:
        return [self.stack]

    def settle(self, known: Mapping[str, Axes | str]) -> None:
        """Take note of what the dimensions of the blocks' outputs mean, or why that is not known."""
        axes = known.get(self.name)
        if isinstance(axes, Axes) and axes.samples is None and self.rows != "tokens":
            self.obstacle = SIDE_BY_SIDE
        elif isinstance(axes, str):
            self.obstacle = axes
        elif axes is not None:
            self._axes = axes

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Say which batch comes next."""
        self._inputs, self._shape = inputs, ()

    def hooks(self) -> Iterator[RemovableHandle]:
        """Set a forward hook on each block."""
        for index, block in enumerate(self.stack.blocks):
            yield block.register_forward_hook(partial(self.take, index))

    def take(self, index: int, module: nn.Module, args: Any, output: Any) -> None:
        """The hook: keep the rows of what a block puts out."""
        if self._axes is not None:
            self._batch[index] = self._select(self._axes, hidden_states(output).detach())

    def flush(self) -> None:
        """Hand the batch's rows to the metric.

        Raises:
            CalibrationError: if a block's rows hold NaN or infinity, or a block did not run.
        """
        if self.obstacle is not None:
            return
        missing = [i for i in range(len(self.stack)) if i not in self._batch]
        if missing:
            raise did_not_run(self.stack, missing[0])
        rows = [self._batch[i] for i in range(len(self.stack))]
        self._batch = {}
        sizes = sorted({tuple(block_rows.shape) for block_rows in rows})
        if len(sizes) > 1:
            self.obstacle = f"they put out {' and '.join(f'{n} rows of {d} values' for n, d in sizes)} for one batch"
            return
        for index, block_rows in enumerate(rows):
            dtype = next(self.stack.blocks[index].parameters()).dtype
            require_finite(block_rows, self.label(index), dtype, f"its weights are {dtype}")
            note_first(self._first, index, block_rows)
        samples = torch.arange(len(rows[0]), device=rows[0].device)
        if self.rows == "tokens":
            samples = torch.repeat_interleave(torch.arange(len(self._per_sample)), torch.tensor(self._per_sample))
        self.metric.update(rows, samples + self._samples)
        self._samples += len(self._per_sample) if self.rows == "tokens" else len(rows[0])
        self.count += len(rows[0])

    def label(self, key: int | str) -> str:
        return f"Block {key} of {self.stack.name}"

    def observed(self) -> Observed:
        """What was seen so far. No `flush` may follow."""
        sums = {key: value.detach().cpu() for key, value in self.metric.finish().items()}
        constant = {index: row.cpu() for index, row in self._first.items() if row is not None}
        return Observed(sums, self.count, constant, self._unmasked, self.obstacle)

    def _select(self, axes: Axes, hidden: Tensor) -> Tensor:
        """Rows (N, D) in float32 of a block's output."""
        if not self._batch or self._shape != tuple(hidden.shape):
            self._shape = tuple(hidden.shape)
            self._padding = axes.padding(self._inputs, self._shape)
            self._unmasked = self._unmasked or self._padding.unknown
            if self.rows != "mean":
                self._chosen = self._positions(*axes.extent(self._shape), self._padding.mask)
        if self.rows != "mean":
            self._chosen = self._chosen.to(hidden.device)
            return axes.rows_at(hidden, self._chosen).float()
        states, mask = axes.rows(hidden), self._padding.mask
        if mask is None:
            return states.float().mean(dim=1)
        mask = mask.to(states.device)
        weight = mask.to(torch.float32)
        total = torch.einsum("bt,btd->bd", weight, states.float())
        return (total / weight.sum(dim=1, keepdim=True).clamp(min=1))[mask.any(dim=1)]

    def _positions(self, count: int, length: int, mask: Tensor | None) -> Tensor:
        """Which positions of all samples one after the other to compare: each one's first, or some of each."""
        found: list[Tensor] = []
        mask = None if mask is None else mask.cpu()
        limit = 1 if self.rows == "first" else self.metric.tokens_per_sample or length
        for sample in range(count):
            positions = torch.arange(length) if mask is None else mask[sample].nonzero().flatten()
            if len(positions) > limit:
                # evenly spaced; in float64, whatever torch's default is
                chosen = torch.linspace(0, len(positions) - 1, limit, dtype=torch.float64).round().long()
                positions = positions[chosen]
            found.append(positions + sample * length)
        self._per_sample = list(map(len, found))
        return torch.cat(found)


def observe(
    host: Host, observers: Iterable[StackObserver | WholeObserver], calibration: Calibration, *, progress: bool = True
) -> tuple[int, list[Observed]]:
    """Run the model over calibration batches and feed the observers, one a stack or a chain of stacks; gives what
    `collect` does.

    Raises:
        CalibrationError: if there is no data, too little of it, a batch the model cannot take, or a block whose
            output is not finite or constant.
    """
    observers = list(observers)

    def passes() -> Generator[dict[str, Any]]:
        stacks = [stack for observer in observers for stack in observer.stacks]
        batches, axes = with_axes(host, stacks, calibration.inputs(host))
        for observer in observers:
            observer.settle(axes)
        with hooked(chain.from_iterable(observer.hooks() for observer in observers)):
            for inputs in batches:
                for observer in observers:
                    observer.begin(inputs)
                forward(host, inputs)
                if isinstance(inputs, Idle):
                    continue  # what the hooks have kept gives way to the next batch
                for observer in observers:
                    observer.flush()
                yield inputs

    return collect(host, observers, calibration, passes, "Comparing blocks", progress)


def with_axes(
    host: Host, stacks: Iterable[Stack], batches: Iterator[dict[str, Any]]
) -> tuple[Iterator[dict[str, Any]], Mapping[str, Axes | str]]:
    """The same batches, and what the dimensions of the stacks' outputs mean, tried on the first of them if any."""
    for first in batches:
        return chain([first], batches), find_axes(host, stacks, first)
    return iter(()), {}
