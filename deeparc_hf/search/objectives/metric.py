"""The metric that the user measures, negated where larger is better."""

from __future__ import annotations

import math

from .base import ModelObjective, register

__all__ = ["Metric"]

_WORST = 1e100  # of what is no number


@register("metric")
class Metric(ModelObjective):
    summary = "what `evaluate` gives, negated where larger is better; each candidate is made and measured"
    unit = "metric"

    @staticmethod
    def loss(measured: float, greater_is_better: bool) -> float:
        if not math.isfinite(measured):
            return _WORST
        return -measured if greater_is_better else measured
