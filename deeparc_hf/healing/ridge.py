"""Ridge least squares from streamed sums: the change D of a linear map, so that inputs x D + d come close to errors e
(target minus what the map gives now).

Only sums over positions are kept, in float64: x'x, x'e and e'e, with x extended by 1 where there is an intercept. The
error on held-out positions follows from their sums too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RidgeSums", "Solution", "solve"]

_PARTS = 8
STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class RidgeSums:
    """Sums over positions."""

    inputs: Tensor  # x'x, shape (d, d)
    cross: Tensor  # x'e, shape (d, d_out)
    errors: float  # e'e summed over the outputs
    count: int  # number of positions

    @classmethod
    def of(cls, x: Tensor, e: Tensor) -> RidgeSums:
        """Sums of some positions: x of shape (N, d), e of shape (N, d_out)."""
        x, e = x.double(), e.double()
        return cls(_gram(x), x.T @ e, float(e.square().sum()), len(x))

    def __add__(self, other: RidgeSums) -> RidgeSums:
        return RidgeSums(
            self.inputs + other.inputs, self.cross + other.cross, self.errors + other.errors, self.count + other.count
        )

    def __mul__(self, weight: float) -> RidgeSums:
        return RidgeSums(self.inputs * weight, self.cross * weight, self.errors * weight, self.count)

    def squared_error(self, change: Tensor) -> float:
        """Sum of squares of e - x D over the positions."""
        return float((change * (self.inputs @ change)).sum() - 2 * (change * self.cross).sum()) + self.errors


def _gram(x: Tensor) -> Tensor:
    """x'x. It is symmetric: a little more than half of it is computed."""
    width = x.shape[1]
    found = torch.empty(width, width, dtype=x.dtype, device=x.device)
    step = max(64, -(-width // _PARTS))
    for start in range(0, width, step):
        end = min(start + step, width)
        found[start:end, start:] = x[:, start:end].T @ x[:, start:]
        found[end:, start:end] = found[start:end, end:].T
    return found


@dataclass(frozen=True)
class Solution:
    """A fitted change, shape (d, d_out), an intercept in the last row; None: no strength lowers the held-out error."""

    change: Tensor | None
    strength: float | None  # of the ridge, relative to the mean of the diagonal of x'x
    held_out: float  # squared error on the held-out positions with the change, relative to that without


def solve(fit: RidgeSums, held_out: RidgeSums, intercept: bool, strengths: Sequence[float] = STRENGTHS) -> Solution:
    """Fit on one part of the positions for each strength, and keep the change whose error on the other is the least.
    With `intercept` the last input is the constant 1, which is not shrunk.
    """
    best = Solution(None, None, 1.0)
    if held_out.errors <= 0 or fit.errors <= 0:
        return best
    shrunk = torch.ones(len(fit.inputs), dtype=torch.float64, device=fit.inputs.device)
    if intercept:
        shrunk[-1] = 0.0
    mean = float(fit.inputs.diagonal()[: len(shrunk) - intercept].mean())
    for strength in strengths:
        factor, failed = torch.linalg.cholesky_ex(fit.inputs + torch.diag(shrunk * strength * mean))
        if int(failed):
            continue
        change = torch.cholesky_solve(fit.cross, factor)
        held = held_out.squared_error(change) / held_out.errors
        if held < best.held_out:
            best = Solution(change, strength, held)
    return best
