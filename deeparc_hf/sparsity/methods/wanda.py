"""Wanda: |W_ij| * ||x_j||_2, compared within each output row (Sun et al. 2023, arXiv 2306.11695, eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CalibrationError
from .base import SparsityMethod, register


@register("wanda")
class Wanda(SparsityMethod):
    summary = "|W| times the norm of the input it meets"
    needs_inputs = True

    def score(self, weight: Tensor, input_norms: Tensor | None = None) -> Tensor:
        if input_norms is None or input_norms.shape not in (weight.shape[1:], weight.shape):
            found = "none" if input_norms is None else f"shape {tuple(input_norms.shape)}"
            raise CalibrationError(
                f"Wanda needs one input norm for each of the {weight.shape[1]} inputs, shape "
                f"{tuple(weight.shape[1:])}, or for each input of each output, shape {tuple(weight.shape)}; found "
                f"{found}. Observe the map's inputs first."
            )
        # in 64 bits, so that rounding makes or swaps no neighbours; MPS has no such type
        dtype = torch.float32 if weight.device.type == "mps" else torch.float64
        # one new matrix, changed in place: each further one of this size costs more time than the arithmetic
        return weight.detach().to(dtype, copy=True).mul_(input_norms).abs_()
