"""Skipping: forward passes over calibration batches, whole and with each block that can go left out by hooks in turn,
feeding metrics of the model's outputs.

Memory does not grow with the number of samples, and the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..architectures import Host, Stack
from ..similarity import SkippingMetric
from ..similarity.divergence import Head
from .calibration import Calibration, Idle
from .collect import Observed, collect, note_first, require_finite
from .forward import forward
from .hooks import skipped
from .outputs import heads_of

__all__ = ["StackSkipper", "skip_blocks"]


class StackSkipper:
    """Hands a fresh metric the model's outputs with each block of one stack skipped."""

    def __init__(self, host: Host, stack: Stack, metric: SkippingMetric) -> None:
        self.stack = stack
        self.name = stack.name
        self.metric = metric
        self.count = 0
        self._host = host
        self._first: dict[int | str, Tensor | None] = {}

    def take(self, inputs: Mapping[str, Any], full: list[Head]) -> None:
        """Skip each block in turn on one batch, for which the whole model puts out `full`.

        Raises:
            CalibrationError: if an output is not finite, or a block did not run or cannot be skipped.
        """
        counts = not isinstance(inputs, Idle)
        if counts:
            self.count += max(len(head.values) for head in full)
            for head in full:
                note_first(self._first, head.name, head.values)
        for index in range(len(self.stack)):
            if index not in self.stack.pinned:
                with skipped(self.stack, index):
                    found = heads_of(self._host, forward(self._host, inputs, without_cache=True), inputs)
                if counts:
                    _check_finite(self._host, found, f" without block {index} of {self.stack.name}")
                    self.metric.update(index, full, found)

    def label(self, key: int | str) -> str:
        return f"{type(self._host.root).__name__} ({key})"

    def observed(self) -> Observed:
        """What was seen so far."""
        constant = {name: row.cpu() for name, row in self._first.items() if row is not None}
        # a model that puts out one and the same has no effects to compare; one output among several may be constant
        return Observed(self.metric.finish(), self.count, constant if len(constant) == len(self._first) else {})


def skip_blocks(
    host: Host, skippers: Iterable[StackSkipper], calibration: Calibration, *, progress: bool = True
) -> tuple[int, list[Observed]]:
    """Run the model over calibration batches, whole and with each block skipped; gives what `collect` does.

    Raises:
        CalibrationError: as `rows.observe`; and if an output of the model is not finite, or a block cannot be
            skipped.
    """
    skippers = list(skippers)

    def passes() -> Generator[dict[str, Any]]:
        for inputs in calibration.inputs(host):
            full = heads_of(host, forward(host, inputs, without_cache=True), inputs)
            _check_finite(host, full)
            for skipper in skippers:
                skipper.take(inputs, full)
            if not isinstance(inputs, Idle):
                yield inputs

    return collect(host, skippers, calibration, passes, "Skipping blocks", progress)


def _check_finite(host: Host, heads: Iterable[Head], where: str = "") -> None:
    for head in heads:
        dtype = head.values.dtype
        require_finite(head.values, f"{type(host.root).__name__}{where}", dtype, f"{head.name}, {dtype}")
