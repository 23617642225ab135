"""How far what the model puts out is from what the whole model does. No labels are needed.

Of distributions the mean Kullback-Leibler divergence from the whole model's, in nats; of other outputs (embeddings,
regressions) the squared error over the square of the whole model's. EvoPress searches by the same divergence
(Sieberling et al. 2025, arXiv 2410.14649).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...observe.outputs import heads_of
from ...similarity.divergence import Head, divergence, mean_square
from .base import Answer, AnswerObjective, register

__all__ = ["Divergence", "relative_errors"]

_ROWS = 1024  # compared at once: a causal model's row holds a float for every word of its vocabulary


@register("divergence")
class Divergence(AnswerObjective):
    summary = "how far the model's outputs are from the whole model's; without labels"
    unit = "divergence"
    keeps_outputs = True

    def wanted(self, answer: Answer) -> list[Head]:
        return heads_of(answer.host, answer.output, answer.inputs)

    def losses(self, answer: Answer, wanted: list[Head]) -> tuple[Tensor, Tensor]:
        found = heads_of(answer.host, answer.output, answer.inputs)
        return relative_errors(found, wanted)


def relative_errors(found: list[Head], wanted: list[Head]) -> tuple[Tensor, Tensor]:
    """By head and sample, the divergence summed over the rows, and what it is measured in: rows, or their squares."""
    count = max(int(head.samples.max()) + 1 for head in wanted if head.samples is not None and len(head.samples))
    losses, weights = torch.zeros(2, len(wanted), count, dtype=torch.float64)
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        for start in range(0, len(theirs.values), _ROWS):
            one, other = (Head(h.name, h.kind, h.values[start : start + _ROWS]) for h in (ours, theirs))
            assert theirs.samples is not None
            samples = theirs.samples[start : start + _ROWS].cpu()
            losses[number].index_add_(0, samples, divergence(one, other).detach().cpu().double())
            unit = mean_square(other).cpu().double() if other.kind == "values" else torch.ones(len(samples)).double()
            weights[number].index_add_(0, samples, unit)
    return losses, weights
