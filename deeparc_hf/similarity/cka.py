"""Debiased linear CKA (Kornblith et al. 2019, arXiv 1905.00414; debiased: Nguyen et al. 2021, arXiv 2010.15327).

HSIC is estimated without bias (Song et al. 2012, JMLR 13, eq. 5), on groups of rows; CKA is the ratio of the sums over
the groups. Independent noise scores about 0 at any number of rows, and rotations and scalings of a block's outputs do
not matter. Groups have a fixed number of rows whatever the batch size, so the result does not depend on it.
Tokens are compared, 8 a sample: of the choices tried their ranking of blocks is nearest to that by the damage of a
removal (figures at the head of benchmarks/rows_evidence.py). Most blocks of SmolLM2 score above .99: prefer a target.

With rows="flat" a row is a sample's whole output, as in the method's first experiments with images, and the groups are
the batches, because whole outputs of more samples do not fit into memory: the minibatch CKA of Nguyen et al. 2021. The
batch size changes its variance; its expectation little, since every batch's estimate is unbiased.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .base import ROW_KINDS, GroupMetric, add_to, centered_grams, register


@register("cka")
class DebiasedCKA(GroupMetric):
    summary = "debiased linear CKA; independent of batch size and number of rows (the default)"
    rows = "tokens"
    row_kinds = ROW_KINDS
    tokens_per_sample = 8
    min_rows = 4
    group_size = 512  # more rows lower the variance; the work grows as group_size * D per row, far below a forward pass

    def sums_of(self, group: Tensor) -> dict[str, Tensor | float]:
        return self._sums_of_grams(centered_grams(group))

    def update_grams(self, grams: Tensor) -> None:
        if grams.shape[1] >= self.min_rows:
            add_to(self._sums, self._sums_of_grams(grams))

    @staticmethod
    def _sums_of_grams(grams: Tensor) -> dict[str, Tensor | float]:
        # weighted by its rows, so that a group of another size counts for what it is worth
        return {"hsic": grams.shape[1] * hsic_matrix(grams)}

    @staticmethod
    def matrix(sums: Mapping[str, Tensor]) -> Tensor:
        return normalize(sums["hsic"])


def hsic_matrix(grams: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of blocks, from Gram matrices of centred rows, shape (L, n, n), n >= 4 -> (L, L)."""
    n = grams.shape[1]
    flat, own = grams.flatten(start_dim=1), grams.diagonal(dim1=1, dim2=2)
    # Song et al.'s estimator is of Gram matrices whose diagonal is zero. The rows of a centred one add up to zero, so
    # without its diagonal they add up to minus that: there is no need to change the matrices.
    total = own.sum(dim=1)
    traces = flat @ flat.T - own @ own.T
    hsic = traces + total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * (own @ own.T)
    return hsic / (n * (n - 3))


def normalize(hsic: Tensor) -> Tensor:
    """CKA from HSIC: divide by the root of both self-similarities. NaN where a block's own is not positive."""
    own = hsic.diagonal()
    scale = torch.where(own > 0, own, torch.nan).sqrt()
    cka = hsic / scale[:, None] / scale[None, :]
    cka.diagonal().copy_(torch.where(own > 0, 1.0, torch.nan))
    return cka
