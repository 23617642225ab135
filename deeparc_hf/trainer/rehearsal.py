"""What is tried when a training begins, so that what cannot work is refused before any step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..architectures import Subject, describe
from ..core.distributed import gather
from ..core.shards import moves_together
from ..errors import CalibrationError
from ..observe.axes import find_axes
from ..observe.batches import batch_size, forward_kwargs
from ..observe.forward import evaluating, forward
from ..observe.hooks import did_not_run, hooked
from ..observe.training_calibration import TrainingCalibration

__all__ = ["rehearse"]


def rehearse(model: nn.Module | Subject, calibration: TrainingCalibration, name: str) -> None:
    """Run the model on the first calibration batch of every process. Nothing is left of it.

    Raises:
        CalibrationError: in every process, if there is no batch, or the model cannot take it, or it does not reach
            every block; the message names the callback's `calibration`, with a line of code.
    """
    subject = describe(model)
    host = subject.host
    what = "If the training data cannot serve, give batches of training samples"
    if calibration.is_given:
        what = "Give calibration batches"
    way_out = f"{what} as {type(host.root).__name__} takes them: {name}(calibration=[{host.batch_code}, ...])."

    def work() -> int:
        with calibration.reading(), evaluating(host.root):
            try:
                batch = calibration.first()
                return 0 if batch is None else _run(subject, batch)
            except torch.OutOfMemoryError:  # the Trainer may try a smaller batch
                raise
            except CalibrationError as error:
                raise CalibrationError(f"{error} {way_out}") from error
            except Exception as error:
                raise CalibrationError(
                    f"No calibration batch could be made and run: {type(error).__name__}: {error}. {way_out}"
                ) from error

    if not sum(gather(work, together=moves_together(host.root))):
        raise CalibrationError(f"The calibration data gave no samples. {way_out}")


def _run(subject: Subject, batch: Any) -> int:
    """The number of samples of a batch on which the model ran, all its blocks included."""
    host, stacks = subject.host, subject.stacks
    inputs = forward_kwargs(host, batch)
    if batch_size(inputs) == 0:
        return 0
    ran: set[nn.Module] = set()
    blocks = [(stack, index, block) for stack in stacks.values() for index, block in enumerate(stack.blocks)]
    with hooked(block.register_forward_pre_hook(lambda block, args: ran.add(block)) for _, _, block in blocks):
        forward(host, inputs)
    for stack, index, block in blocks:
        if block not in ran:
            raise did_not_run(stack, index)
    find_axes(host, stacks.values(), inputs)  # raises where the model cannot run on samples of the batch
    return batch_size(inputs)
