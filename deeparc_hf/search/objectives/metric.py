"""The metric that the user measures: each candidate is made, as a copy, and handed to `evaluate`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Answer, Objective, register

__all__ = ["Metric"]


@register("metric")
class Metric(Objective):
    summary = "what `evaluate` gives, negated where larger is better; each candidate is made and measured"
    unit = "metric"
    needs_model = True

    def wanted(self, answer: Answer) -> Any:
        raise NotImplementedError("The metric is measured on a model, not on its answers.")

    def losses(self, answer: Answer, wanted: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("The metric is measured on a model, not on its answers.")
