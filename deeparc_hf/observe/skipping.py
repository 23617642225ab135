"""Skipping: forward passes over calibration batches, whole and with each block left out in turn, feeding metrics of the
model's outputs.

A hook gives out a block's input in the place of its hidden states; nothing is removed, and the model is left as it was.
A batch takes one forward pass, and one more for each block that can go. Memory does not grow with the number of
samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..architectures import Host, Stack
from ..errors import CalibrationError
from ..similarity import SkippingMetric
from ..similarity.divergence import Head
from .batches import batch_size
from .calibration import Calibration
from .collect import Observed, collect
from .forward import evaluating, forward
from .hooks import skipped
from .outputs import heads_of

__all__ = ["StackSkipper", "skip_blocks"]


class StackSkipper:
    """Hands a metric the model's outputs with each block of one stack skipped.

    Args:
        host: the model.
        stack: the stack.
        metric: a fresh metric, which receives the outputs.
    """

    def __init__(self, host: Host, stack: Stack, metric: SkippingMetric) -> None:
        self.stack = stack
        self.metric = metric
        self.count = 0
        self._host = host
        self._first: dict[str, Tensor] = {}
        self._varying: set[str] = set()

    def take(self, inputs: Mapping[str, Any], full: list[Head]) -> None:
        """Skip each block in turn on one batch.

        Args:
            inputs: as `forward.forward` takes them.
            full: what the whole model puts out for them.

        Raises:
            CalibrationError: if an output is not finite, or a block did not run or cannot be skipped.
        """
        self._note(full)
        for index in range(len(self.stack)):
            if index not in self.stack.pinned:
                with skipped(self.stack, index):
                    found = heads_of(self._host, forward(self._host, inputs, without_cache=True), inputs)
                check_finite(self._host, found, f" without block {index} of {self.stack.name}")
                self.metric.update(index, full, found)

    def label(self, key: int | str) -> str:
        return f"{type(self._host.root).__name__} ({key})"

    def observed(self) -> Observed:
        """What was seen so far."""
        constant: dict[int | str, Tensor] = {name: row.cpu() for name, row in self._first.items()}
        # a model that puts out one and the same has no effects to compare; one output among several may well be
        # constant
        return Observed(self.metric.finish(), self.count, {} if self._varying else constant)

    def _note(self, full: list[Head]) -> None:
        self.count += max(len(head.values) for head in full)
        for head in full:
            if head.name not in self._varying and len(head.values):
                first = self._first.setdefault(head.name, head.values[0].clone())
                if bool((head.values != first).any()):
                    self._varying.add(head.name)


def skip_blocks(
    host: Host,
    skippers: Iterable[StackSkipper],
    calibration: Calibration,
    *,
    progress: bool = True,
) -> tuple[int, list[Observed]]:
    """Run the model over calibration batches, whole and with each block skipped, and feed the metrics.

    Args:
        host: the model.
        skippers: one a stack.
        calibration, progress: as in `rows.observe`.

    Returns:
        The number of samples seen, and what was seen of each stack, over all processes.

    Raises:
        CalibrationError: as `rows.observe`; and if an output of the model is not finite, or a block cannot be
            skipped.
    """
    skippers = list(skippers)

    def look() -> tuple[int, list[Observed]]:
        return _look(host, skippers, calibration, progress), [skipper.observed() for skipper in skippers]

    return collect(look, skippers, calibration)


def _look(host: Host, skippers: list[StackSkipper], calibration: Calibration, progress: bool) -> int:
    seen = 0
    with evaluating(host.root), calibration.bar("Skipping blocks", progress) as advance:
        for inputs in calibration.inputs(host):
            full = heads_of(host, forward(host, inputs, without_cache=True), inputs)
            check_finite(host, full)
            for skipper in skippers:
                skipper.take(inputs, full)
            seen += batch_size(inputs)
            advance(batch_size(inputs))
    return seen


def check_finite(host: Host, heads: Iterable[Head], where: str = "") -> None:
    """Refuse NaN and infinity.

    Raises:
        CalibrationError: naming the output, and what to do.
    """
    for head in heads:
        if not bool(torch.isfinite(head.values).all()):
            hint = (
                "Load it in float32 or bfloat16."
                if head.values.dtype == torch.float16
                else "Check its weights and the inputs."
            )
            raise CalibrationError(
                f"{type(host.root).__name__}{where} puts out NaN or infinity on the calibration data ({head.name}, "
                f"{head.values.dtype}). {hint}"
            )
