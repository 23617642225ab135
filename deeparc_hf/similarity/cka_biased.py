"""The biased linear CKA of the method's first experiments: the mean over sentences of each sentence's own CKA.

Rows are the tokens of one sentence, where there are tokens; otherwise 64 samples (a batch of those experiments). The
estimator is biased towards 1 when a group has fewer rows than features (independent noise in 768 dimensions scores 0.97
with 20 rows): offered to reproduce published figures, not to find redundant layers. Use "cka" for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import RowBuffer, SimilarityMetric, add_to, centered_grams, register
from .cka import normalize

GROUP = 64


@register("cka_biased")
class BiasedCKA(SimilarityMetric):
    summary = "biased linear CKA, averaged over sentences; reproduces the first experiments' thresholds"
    rows = "tokens"

    def __init__(self) -> None:
        self._buffer = RowBuffer(GROUP)
        self._sums: dict[str, Tensor] = {}

    def update(self, rows: Sequence[Tensor], samples: Tensor) -> None:
        _, counts = torch.unique_consecutive(samples, return_counts=True)
        # rows that are alone in their sample are pooled, whatever else is in the batch: results must not depend on its
        # size
        alone = torch.repeat_interleave(counts == 1, counts).to(rows[0].device)
        for group in self._buffer.add([block[alone] for block in rows]):
            self._take(group)
        sentences = [group for group in torch.stack(list(rows)).split(counts.tolist(), dim=1) if group.shape[1] > 1]
        for group in sentences:
            self._take(group)

    def finish(self) -> dict[str, Tensor]:
        rest = self._buffer.rest()
        if rest is not None:
            self._take(rest)
        return self._sums

    def _take(self, group: Tensor) -> None:
        if group.shape[1] >= self.min_rows:
            add_to(self._sums, {"cka": biased_cka(group), "groups": 1.0})

    @staticmethod
    def matrix(sums: Mapping[str, Tensor]) -> Tensor:
        return sums["cka"] / sums["groups"]


def biased_cka(rows: Tensor) -> Tensor:
    """Linear CKA of every pair of blocks on one group of rows, shape (L, n, D) -> (L, L)."""
    flat = centered_grams(rows).flatten(start_dim=1)
    return normalize(flat @ flat.T)
