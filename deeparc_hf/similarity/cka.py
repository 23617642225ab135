"""Debiased linear CKA (Kornblith et al. 2019, arXiv 1905.00414; debiased: Nguyen et al. 2021, arXiv 2010.15327).

HSIC is estimated without bias (Song et al. 2012, JMLR 13, eq. 5), on groups of rows; CKA is the ratio of the sums over
the groups. Independent noise scores about 0 at any number of rows, and rotations and scalings of a block's outputs do
not matter. Groups have a fixed number of rows whatever the batch size, so the result does not depend on it.

Which rows are compared is chosen by evidence: similarity should rank blocks as the damage of their removal does.
Spearman correlation of 1 - CKA(j - 1, j), on training data, with the rise of the held-out loss when block j alone is
skipped (95 % bootstrap over held-out examples; benchmarks/rows_evidence.py):

    model, data (blocks that can go; held-out n)            tokens, 8 a sample  mean                 first
    MiniLM-L6 fine-tuned on Emotion (5; 2,000)              .20 (.00 .. .60)   -.70 (-.70 .. -.50)  -.70 (-.90 .. -.40)
    MiniLM-L6 fine-tuned on BBC News (5; 600)               .60 (.00 .. .80)   -.30 (-.70 .. .00)   -.92 (-.94 .. -.36)
    SmolLM2-135M (4-bit GGUF weights) on BBC News (29; 32)  .80 (.76 .. .82)    .54 (.50 .. .59)     .69 (.64 .. .75)
    small ResNet trained on a CIFAR-10 subset (12; 1,000)   .96 (.84 .. .97)    .77 (.57 .. .79)     .71 (.62 .. .86)

Tokens rank best of the three on all four, so they are the default; 32 or all tokens a sample rank no better than 8. The
mean and the first token mislead most in classifiers: there the last block looks redundant, and removing it alone takes
Emotion's accuracy from .93 to .47 (.89 for the block that tokens choose). Limits: two of the rankings rest on 5 blocks;
damage is that before retraining (40 steps take the last block's on Emotion from 1.24 to .15, and no choice of rows is
shown to rank MiniLM's blocks then); the cosine ranks SmolLM2's blocks better (.87) and the ResNet's worse (.49). In
causal models a few outsized activations can carry the variance of the tokens: most of SmolLM2's blocks score above .99
(0.98 would keep 6 of 30), so prefer a target to a threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .base import RowBuffer, SimilarityMetric, add_to, centered_grams, register

# Rows of a group. More rows lower the variance; the work grows as GROUP * D per row, far below a forward pass.
GROUP = 512


@register("cka")
class DebiasedCKA(SimilarityMetric):
    summary = "debiased linear CKA; independent of batch size and number of rows (the default)"
    rows = "tokens"
    tokens_per_sample = 8
    min_rows = 4

    def __init__(self) -> None:
        self._buffer = RowBuffer(GROUP)
        self._sums: dict[str, Tensor] = {}

    def update(self, rows: Sequence[Tensor], samples: Tensor) -> None:
        for group in self._buffer.add(rows):
            self._take(group)

    def finish(self) -> dict[str, Tensor]:
        rest = self._buffer.rest()
        if rest is not None and rest.shape[1] >= self.min_rows:
            self._take(rest)
        return self._sums

    def _take(self, group: Tensor) -> None:
        # weighted by its rows, so that a group of another size counts for what it is worth
        add_to(self._sums, {"hsic": group.shape[1] * hsic_matrix(group)})

    @staticmethod
    def matrix(sums: Mapping[str, Tensor]) -> Tensor:
        return normalize(sums["hsic"])


def hsic_matrix(rows: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of blocks.

    Args:
        rows: shape (L, n, D) with n >= 4.

    Returns:
        Shape (L, L).
    """
    n = rows.shape[1]
    grams = centered_grams(rows)
    grams.diagonal(dim1=1, dim2=2).zero_()
    # U-centering (Szekely & Rizzo 2014): the inner product of U-centred grams over n (n - 3) is Song et al.'s estimator
    sums = grams.sum(dim=2, keepdim=True)
    total = sums.sum(dim=1, keepdim=True)
    grams = grams - (sums + sums.transpose(1, 2)) / (n - 2) + total / ((n - 1) * (n - 2))
    grams.diagonal(dim1=1, dim2=2).zero_()
    flat = grams.flatten(start_dim=1)
    return flat @ flat.T / (n * (n - 3))


def normalize(hsic: Tensor) -> Tensor:
    """CKA from HSIC: divide by the root of both self-similarities. NaN where a block's own is not positive."""
    own = hsic.diagonal()
    scale = torch.where(own > 0, own, torch.nan).sqrt()
    cka = hsic / scale[:, None] / scale[None, :]
    cka.diagonal().copy_(torch.where(own > 0, 1.0, torch.nan))
    return cka
