"""The effect of a block: how much what the model puts out changes when the block is skipped.

As in Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834) and SLEB (Song et al. 2024, arXiv 2402.09025), but without
labels. Of distributions it is the mean Kullback-Leibler divergence from the whole model's, in nats, summed over the
outputs; of other outputs the squared error over the square of the whole model's, so that 1 is as far away as zeros are.

The similarity is exp(-sum of the effects in a run): an estimate, as measuring every run would take L^2 / 2 forward
passes, and too good where blocks do the same work. Pinned blocks are not skipped, stay, and add nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import SkippingMetric, register
from .divergence import Head, divergence, mean_square

# Rows that are compared at once: a causal model's row holds a float for every word of its vocabulary.
ROWS = 1024
# exp(-MOST) is above zero still; infinite effects would leave no difference between two sums of them.
MOST = 700.0


@register("effect")
class Effect(SkippingMetric):
    summary = (
        "exp(-change of the model's outputs without the block): effect, not likeness; a forward pass for each block"
    )

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        # the rows that each block was left out for; a stack without a block that can go has these sums too
        self._sums = {"rows": torch.zeros(blocks, dtype=torch.float64)}

    def update(self, block: int, full: Sequence[Head], skipped: Sequence[Head]) -> None:
        for wanted, found in zip(full, skipped, strict=True):
            self._sums["rows"][block] += len(wanted.values)
            for name, total in zip(("change", "scale"), _totals(found, wanted), strict=True):
                key = f"{name} of {wanted.name}"
                self._sums.setdefault(key, torch.zeros(self.blocks, dtype=torch.float64))[block] += total

    def finish(self) -> dict[str, Tensor]:
        return self._sums

    @staticmethod
    def matrix(sums: Mapping[str, Tensor]) -> Tensor:
        return remaining(effects(sums))


def effects(sums: Mapping[str, Tensor]) -> Tensor:
    """The effect of each block, shape (L,), float64: nats, or relative squared errors; 0 for a block that was not
    skipped.
    """
    total = torch.zeros_like(sums["rows"])
    for key, change in sums.items():
        if key.startswith("change of "):
            # nothing over nothing (not skipped) is no effect; something over nothing is as much as can be
            total = total + (change / sums[key.replace("change", "scale", 1)]).nan_to_num(nan=0.0, posinf=MOST)
    return total


def remaining(effect: Tensor) -> Tensor:
    """What is left of the model when runs go, shape (L,) -> (L, L): exp(-sum of the effects of the run).

    Entry (i, j) is for block i staying and those from its neighbour to block j, on either side, going.
    """
    ends = torch.cat([effect.new_zeros(1), effect.clamp(0, MOST).cumsum(0)])
    # i < j: blocks i + 1 .. j go; i > j: blocks j .. i - 1
    after = ends[None, 1:] - ends[1:, None]
    before = ends[:-1, None] - ends[None, :-1]
    return torch.exp(-(after.triu(1) + before.tril(-1)))


def _totals(found: Head, wanted: Head) -> tuple[float, float]:
    """Sums over the rows: of the change, and of what it is measured in."""
    change, scale = 0.0, 0.0
    for start in range(0, len(wanted.values), ROWS):
        ours, theirs = (Head(head.name, head.kind, head.values[start : start + ROWS]) for head in (found, wanted))
        # on its own device first: mps has no float64
        change += float(divergence(ours, theirs).cpu().sum(dtype=torch.float64))
        scale += (
            float(mean_square(theirs).cpu().sum(dtype=torch.float64)) if wanted.kind == "values" else len(theirs.values)
        )
    return change, scale
