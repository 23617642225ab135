"""What is tried when a training begins, so that what cannot work is refused before any step and not after epochs of
fine-tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..architectures import Host, Subject, describe
from ..core.distributed import gather
from ..errors import CalibrationError
from ..observe.axes import find_axes
from ..observe.batches import batch_size, forward_kwargs
from ..observe.forward import evaluating, forward
from ..observe.hooks import did_not_run, hooked
from ..observe.training_calibration import TrainingCalibration

__all__ = ["rehearse"]


def rehearse(model: nn.Module | Subject, calibration: TrainingCalibration, name: str) -> None:
    """Run the model on the first calibration batch of every process. Nothing is left of it.

    Args:
        model: the model, unwrapped.
        calibration: where the calibration batches come from.
        name: the callback, as messages name it.

    Raises:
        CalibrationError: in every process, if there is no batch, or the model cannot take it, or it does not reach
            every block; the message names `calibration`, with a line of code.
    """
    subject = describe(model)
    host = subject.host

    def work() -> int:
        with calibration.reading(), evaluating(host.root):
            try:
                batch = calibration.first()
                return 0 if batch is None else _run(subject, batch)
            except torch.OutOfMemoryError:  # the Trainer may try a smaller batch
                raise
            except CalibrationError as error:
                raise CalibrationError(f"{error} {_way_out(host, name, calibration)}") from error
            except Exception as error:
                raise CalibrationError(
                    f"No calibration batch could be made and run: {type(error).__name__}: {error}. "
                    f"{_way_out(host, name, calibration)}"
                ) from error

    if not sum(gather(work)):
        raise CalibrationError(f"The calibration data gave no samples. {_way_out(host, name, calibration)}")


def _run(subject: Subject, batch: Any) -> int:
    """The number of samples of a batch on which the model ran, all its blocks included."""
    host, stacks = subject.host, subject.stacks
    ran: set[tuple[str, int]] = set()

    def noting(key: tuple[str, int]) -> Callable[..., None]:
        return lambda *_: ran.add(key)

    inputs = forward_kwargs(host, batch)
    if batch_size(inputs) == 0:
        return 0
    blocks = [(stack, index, block) for stack in stacks.values() for index, block in enumerate(stack.blocks)]
    with hooked(block.register_forward_pre_hook(noting((stack.name, index))) for stack, index, block in blocks):
        forward(host, inputs)
    for stack, index, _ in blocks:
        if (stack.name, index) not in ran:
            raise did_not_run(stack, index)
    find_axes(host, stacks.values(), inputs)  # raises where the model cannot run on samples of the batch
    return batch_size(inputs)


def _way_out(host: Host, name: str, calibration: TrainingCalibration) -> str:
    """How to calibrate on data of its own, as a line of code."""
    batch = host.batch_code
    if calibration.is_given:
        return f"Give calibration batches as {type(host.root).__name__} takes them: {name}(calibration=[{batch}, ...])."
    return (
        f"If the training data cannot serve, give batches of training samples as {type(host.root).__name__} takes "
        f"them: {name}(calibration=[{batch}, ...])."
    )
