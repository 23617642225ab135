"""The biased linear CKA of the method's first experiments, to reproduce them: the mean of each sentence's own CKA.

Without tokens 64 samples are a group. It is biased towards 1 where a group has fewer rows than features (independent
noise in 768 dimensions scores 0.97 with 20 rows): use "cka" to find redundant blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import GroupMetric, add_to, centered_grams, register
from .cka import normalize


@register("cka_biased")
class BiasedCKA(GroupMetric):
    summary = "biased linear CKA, averaged over sentences; reproduces the first experiments' thresholds"
    rows = "tokens"
    group_size = 64

    def update(self, rows: Sequence[Tensor], samples: Tensor) -> None:
        _, counts = torch.unique_consecutive(samples, return_counts=True)
        # rows that are alone in their sample are pooled: results must not depend on the batch's size
        alone = torch.repeat_interleave(counts == 1, counts).to(rows[0].device)
        super().update([block[alone] for block in rows], samples)
        for sentence in torch.stack(list(rows)).split(counts.tolist(), dim=1):
            if sentence.shape[1] > 1:
                add_to(self._sums, self.sums_of(sentence))

    def sums_of(self, group: Tensor) -> dict[str, Tensor | float]:
        return {"cka": biased_cka(group), "groups": 1.0}

    @staticmethod
    def matrix(sums: Mapping[str, Tensor]) -> Tensor:
        return sums["cka"] / sums["groups"]


def biased_cka(rows: Tensor) -> Tensor:
    """Linear CKA of every pair of blocks on one group of rows, shape (L, n, D) -> (L, L)."""
    flat = centered_grams(rows).flatten(start_dim=1)
    return normalize(flat @ flat.T)
