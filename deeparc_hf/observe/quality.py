"""The loss and the accuracy of a model as it is, on some batches with labels: what each step of a pruning did to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ..architectures import find_host
from ..core.statistics import wilson_interval
from ..errors import CalibrationError, DeepArcError
from .batches import batch_size
from .calibration import Calibration, Idle
from .forward import evaluating

__all__ = ["measure_quality"]

_Z = 1.959964  # of the normal distribution, for an interval of 95 %


def measure_quality(model: nn.Module, calibration: Calibration, bar: str | None = None) -> dict[str, Any] | None:
    """Measure a model in eval mode. It is left as it was, and so are the random states.

    Args:
        calibration: the data, with labels.
        bar: title of a progress bar; None for no bar.

    Returns:
        `loss`, the mean over the samples of the batches' losses, with `loss_interval` (95 %, normal, from the spread of
        the batches; None for a single one); `accuracy` with `accuracy_interval` (Wilson), where the model gives a row
        of logits for each sample and labels are classes, else None; `samples`. None where the model puts out no loss
        for these batches.
    """

    def look() -> list[tuple[float, int, int | None]] | None:
        try:
            with evaluating(model), calibration.bar(bar or "", bar is not None) as advance:
                return list(_answers(model, calibration, advance))
        except torch.OutOfMemoryError:  # the Trainer may try a smaller batch
            raise
        except (DeepArcError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # labels that the model cannot take: the training has a loss of its own

    parts = calibration.together(look)
    found = [entry for part in parts if part for entry in part]
    if not found or any(part is None for part in parts):
        return None
    samples = sum(size for _, size, _ in found)
    loss = sum(value * size for value, size, _ in found) / samples
    if not math.isfinite(loss):
        return None
    right = [correct for _, _, correct in found]
    correct = None if any(count is None for count in right) else sum(filter(None, right))
    return {
        "loss": loss,
        "loss_interval": _interval(loss, found),
        "accuracy": None if correct is None else correct / samples,
        "accuracy_interval": None if correct is None else list(wilson_interval(correct, samples)),
        "samples": samples,
    }


def _answers(
    model: nn.Module, calibration: Calibration, advance: Callable[[int], None]
) -> Iterator[tuple[float, int, int | None]]:
    """Loss, size and number of right answers of each batch."""
    host = find_host(model)
    set_seed(0)  # a collator that masks tokens at random masks the same each time
    for inputs in calibration.inputs(host):
        output = model(**inputs, **({"use_cache": False} if host.takes_cache else {}))
        if isinstance(inputs, Idle):
            continue
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is None:
            raise CalibrationError("The model puts out no loss.")
        yield float(loss), batch_size(inputs), _correct(output, inputs)
        advance(batch_size(inputs))


def _correct(output: Mapping[str, Any], inputs: Mapping[str, Any]) -> int | None:
    logits, labels = output.get("logits"), inputs.get("labels")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        return None
    return int((logits.argmax(1) == labels).sum())


def _interval(mean: float, found: list[tuple[float, int, int | None]]) -> list[float] | None:
    if len(found) < 2:
        return None
    total = sum(size for _, size, _ in found)
    spread = sum((size * (value - mean)) ** 2 for value, size, _ in found) * len(found) / (len(found) - 1)
    half = _Z * math.sqrt(spread) / total
    return [mean - half, mean + half]
