"""Mean cosine of the outputs of two blocks, over tokens; of neighbours, 1 - cosine is the block influence of ShortGPT
(Men et al. 2024, arXiv 2403.03853). Values lie close to 1 in pre-norm models: prefer a target to a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import SimilarityMetric, add_to, register


@register("cosine")
class Cosine(SimilarityMetric):
    summary = "mean cosine over tokens (1 - block influence)"
    rows = "tokens"
    min_rows = 1

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def update(self, rows: Sequence[Tensor], samples: Tensor) -> None:
        stacked = torch.stack(list(rows), dim=1)  # (N, L, D)
        if not len(stacked):
            return
        # a zero row has no direction; NaN says so, and a block that is always zero is reported by name
        directions = stacked / stacked.norm(dim=2, keepdim=True)
        cosines = (directions @ directions.transpose(1, 2)).to(
            "cpu" if stacked.device.type == "mps" else stacked.device
        )
        add_to(self._sums, {"cosine": cosines.sum(dim=0, dtype=torch.float64), "rows": float(len(stacked))})

    def finish(self) -> dict[str, Tensor]:
        return self._sums

    @staticmethod
    def matrix(sums: Mapping[str, Tensor]) -> Tensor:
        cosine = sums["cosine"] / sums["rows"]
        constant = cosine.diagonal().isnan()
        cosine.diagonal().copy_(torch.where(constant, torch.nan, 1.0))
        return cosine
