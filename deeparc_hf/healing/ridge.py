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

__all__ = ["CrossSolution", "RidgeSums", "Solution", "fitted", "solve", "solve_crosswise"]

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


@dataclass(frozen=True)
class CrossSolution:
    """Changes of one strength, fitted on either of two parts and on both; None: no strength lowers the error of each
    part with what is fitted on the other.
    """

    changes: tuple[Tensor, Tensor, Tensor] | None
    strength: float | None


def solve(fit: RidgeSums, held_out: RidgeSums, intercept: bool, strengths: Sequence[float] = STRENGTHS) -> Solution:
    """Fit on one part of the positions for each strength, and keep the change whose error on the other is the least.
    With `intercept` the last input is the constant 1, which is not shrunk.
    """
    best = Solution(None, None, 1.0)
    if held_out.errors <= 0 or fit.errors <= 0:
        return best
    for strength in strengths:
        change = fitted(fit, intercept, strength)
        if change is None:
            continue
        held = held_out.squared_error(change) / held_out.errors
        if held < best.held_out:
            best = Solution(change, strength, held)
    return best


def solve_crosswise(
    one: RidgeSums, other: RidgeSums, intercept: bool, strengths: Sequence[float] = STRENGTHS
) -> CrossSolution:
    """Fit on each of two parts for each strength, and keep that where the error on the respective other is the least
    (cross-validation in two folds); with it fit on both parts together too.
    """
    best, found = CrossSolution(None, None), None
    least = one.errors + other.errors
    if one.errors <= 0 or other.errors <= 0:
        return best
    for strength in strengths:
        changes = fitted(one, intercept, strength), fitted(other, intercept, strength)
        if changes[0] is None or changes[1] is None:
            continue
        error = other.squared_error(changes[0]) + one.squared_error(changes[1])
        if error < least:
            least, found, best = error, changes, CrossSolution(None, strength)
    if found is None or best.strength is None:
        return best
    whole = fitted(one + other, intercept, best.strength)
    assert found[0] is not None and found[1] is not None and whole is not None  # the sum is as definite as its parts
    return CrossSolution((found[0], found[1], whole), best.strength)


def fitted(sums: RidgeSums, intercept: bool, strength: float) -> Tensor | None:
    """The change of one strength; None where it is too small for these sums."""
    shrunk = torch.ones(len(sums.inputs), dtype=torch.float64, device=sums.inputs.device)
    if intercept:
        shrunk[-1] = 0.0
    mean = float(sums.inputs.diagonal()[: len(shrunk) - intercept].mean())
    factor, failed = torch.linalg.cholesky_ex(sums.inputs + torch.diag(shrunk * strength * mean))
    return None if int(failed) else torch.cholesky_solve(sums.cross, factor)
