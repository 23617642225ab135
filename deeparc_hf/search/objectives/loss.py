"""The model's own loss on the batches' labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CalibrationError
from ...observe.batches import batch_size
from .base import Answer, AnswerObjective, register

__all__ = ["Loss"]


@register("loss")
class Loss(AnswerObjective):
    summary = "the model's loss on the labels; a batch counts as one in its interval"
    unit = "loss"
    needs_labels = True

    def wanted(self, answer: Answer) -> None:
        self.losses(answer, None)

    def losses(self, answer: Answer, wanted: Any) -> tuple[Tensor, Tensor]:
        loss = answer.output.get("loss") if isinstance(answer.output, Mapping) else None
        if loss is None:
            raise CalibrationError(
                f"objective='loss' needs the model's loss, and {type(answer.host.root).__name__} puts out none for the "
                f"batches ({', '.join(answer.inputs)}). Give batches with labels, or take objective='divergence'."
            )
        size = batch_size(answer.inputs)
        weight = torch.full((1, 1), float(size), dtype=torch.float64)
        return weight * float(loss), weight
