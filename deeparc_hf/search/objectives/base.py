"""What an objective is: for each sample a loss and what it is measured in, and a score with its interval."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...architectures import Host
from ...core.registry import Registry

__all__ = ["Answer", "AnswerObjective", "ModelObjective", "Objective", "Score", "objectives", "register"]

_WORST = 1e30
_Z = 1.959964  # of the normal distribution, for an interval of 95 %


@dataclass(frozen=True)
class Answer:
    """What a model made of a batch.

    Attributes:
        host: the model.
        inputs: the batch, with its labels.
        output: what the model put out.
        hidden: by stack, what its last kept block put out.
        sides: by stack, whose padding counts (`Stack.side`).
    """

    host: Host
    inputs: Mapping[str, Any]
    output: Any
    hidden: Mapping[str, Tensor]
    sides: Mapping[str, str | None]


@dataclass(frozen=True, eq=False)
class Score:
    """A mean over samples: of several outputs the sum of their means. Lower is better.

    Attributes:
        losses: shape (outputs, samples), float64, on the CPU.
        weights: what each loss is measured in, of the same shape: the mean is that of the losses over that of these.
    """

    losses: Tensor
    weights: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, Tensor]]) -> Score:
        """From the losses and weights of batches."""
        losses, weights = zip(*parts, strict=True)
        # a model that overflows is as bad as can be, and figures stay figures
        known = torch.cat(losses, dim=1).nan_to_num(nan=_WORST, posinf=_WORST, neginf=_WORST)
        return cls(known, torch.cat(weights, dim=1))

    @property
    def samples(self) -> int:
        return self.losses.shape[1]

    @cached_property
    def value(self) -> float:
        return float(_ratio(self.losses.sum(dim=1), self.weights.sum(dim=1)).sum())

    def first(self, count: int) -> Score:
        """That of the first samples alone."""
        return Score(self.losses[:, :count], self.weights[:, :count])

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, normal, from the samples' jackknife, cut off at 0, which no loss is below; None for fewer than two."""
        left = self._without_each()
        if left is None:
            return None
        low, high = _interval(self.value, left)
        return max(low, min(self.value, 0.0)), high

    def difference(self, other: Score) -> tuple[float, tuple[float, float] | None]:
        """How much larger this one is than another on the same samples, with its 95 % interval."""
        ours, theirs = self._without_each(), other._without_each()
        value = self.value - other.value
        if ours is None or theirs is None or ours.shape != theirs.shape:
            return value, None
        return value, _interval(value, ours - theirs)

    def _without_each(self) -> Tensor | None:
        if self.samples < 2:
            return None
        losses, weights = (sums.sum(dim=1, keepdim=True) - sums for sums in (self.losses, self.weights))
        return _ratio(losses, weights).sum(dim=0)


def _ratio(losses: Tensor, weights: Tensor) -> Tensor:
    # nothing over nothing is no loss
    return torch.where(weights > 0, losses / weights.clamp(min=1e-300), losses)


def _interval(value: float, left: Tensor) -> tuple[float, float]:
    count = len(left)
    half = _Z * math.sqrt(float((left - left.mean()).square().sum()) * (count - 1) / count)
    return value - half, value + half


class Objective:
    """Tells how good what is left of a model is. There are two kinds, by what they look at: see the subclasses.

    Attributes:
        name: set by `register`.
        summary: one line for the tables of the documents and the command line.
        unit: what a value is, in a word or two.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    unit: ClassVar[str]


class ModelObjective(Objective, ABC):
    """Looks at what the user's `evaluate` gives: each candidate is made for it, as a copy."""

    @staticmethod
    @abstractmethod
    def loss(measured: float, greater_is_better: bool) -> float:
        """What is made small, of what was measured; finite."""


class AnswerObjective(Objective, ABC):
    """Looks at what the model makes of the calibration batches.

    Attributes:
        needs_labels: whether the model is given the labels of the batches.
        needs_hidden: whether `Answer.hidden` is looked at.
        keeps_outputs: whether `wanted` keeps what the model puts out: for the account of memory.
    """

    needs_labels: ClassVar[bool] = False
    needs_hidden: ClassVar[bool] = False
    keeps_outputs: ClassVar[bool] = False

    @abstractmethod
    def wanted(self, answer: Answer) -> Any:
        """What is to be kept of the whole model's answer to a batch."""

    @abstractmethod
    def losses(self, answer: Answer, wanted: Any) -> tuple[Tensor, Tensor]:
        """Losses and weights of an answer to the same batch, shape (outputs, samples) each, float64, on the CPU."""


objectives: Registry[Objective] = Registry("search objective", "deeparc_hf.search.objectives", Objective)
register = objectives.register
