"""Magnitude: the smallest weights of each output row matter least. The baseline of Sun et al.
2023 (arXiv 2306.11695).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SparsityMethod, register


@register("magnitude")
class Magnitude(SparsityMethod):
    summary = "|W|; needs no data"

    def score(self, weight: Tensor, input_norms: Tensor | None = None) -> Tensor:
        return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))
