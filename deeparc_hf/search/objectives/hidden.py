"""How far the hidden states at the end of each stack are from the whole model's: squared error over their square."""

from __future__ import annotations

import torch
from torch import Tensor

from ...observe.batches import padding_masks
from .base import Answer, AnswerObjective, register

__all__ = ["HiddenStates"]


@register("hidden")
class HiddenStates(AnswerObjective):
    summary = "how far the hidden states at the end of each stack are from the whole model's"
    unit = "relative squared error"
    needs_hidden = True

    def wanted(self, answer: Answer) -> dict[str, Tensor]:
        return dict(answer.hidden)

    def losses(self, answer: Answer, wanted: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses, weights = [], []
        for name, states in wanted.items():
            found, states = answer.hidden[name].float(), states.float()
            losses.append(_means((found - states).square(), answer, name))
            weights.append(_means(states.square(), answer, name))
        return torch.stack(losses), torch.stack(weights)


def _means(squares: Tensor, answer: Answer, stack: str) -> Tensor:
    """The mean of each sample, over its unpadded positions where they are known."""
    mask = padding_masks(answer.inputs)[answer.sides[stack]]
    if mask is None or squares.ndim != 3 or mask.shape != squares.shape[:2]:
        return squares.flatten(1).mean(dim=1).cpu().double()
    rows, mask = squares.mean(dim=2).cpu().double(), mask.cpu()
    return (rows * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
