"""Wanda: |W_ij| * ||x_j||_2, compared within each output row (Sun et al. 2023, arXiv 2306.11695, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError
from .base import SparsityMethod, register


@register("wanda")
class Wanda(SparsityMethod):
    summary = "|W| times the norm of the input it meets"
    needs_inputs = True

    def score(self, weight: Tensor, input_norms: Tensor | None = None) -> Tensor:
        if input_norms is None or input_norms.shape != weight.shape[1:]:
            found = "none" if input_norms is None else f"shape {tuple(input_norms.shape)}"
            raise CalibrationError(
                f"Wanda needs one input norm for each of the {weight.shape[1]} inputs, found {found}. Observe the map's inputs first."
            )
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return weight.abs().to(dtype) * input_norms.to(dtype)
