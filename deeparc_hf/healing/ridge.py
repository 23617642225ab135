"""Ridge least squares from streamed sums: the change D of a linear map, so that inputs x D + d come close to errors e
(target minus what the map gives now).

Only sums over positions are kept, in float64: x'x, x'e and e'e, with x extended by 1 where there is an intercept. The
error on held-out positions follows from their sums too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

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
    """Changes of one strength: for each part of the positions that which is fitted on the others, and that which is
    fitted on all; None: no strength lowers the errors of the parts together.
    """

    changes: tuple[Tensor, ...] | None
    whole: Tensor | None
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
    parts: Sequence[RidgeSums], intercept: bool, strengths: Sequence[float] = STRENGTHS
) -> CrossSolution:
    """Fit for each part on the others, with the strength at which the errors of the parts are the least together
    (cross-validation); and on all with that strength. Of the strengths, which must be in order, those are tried that
    lie on the way down from the middle.
    """
    none = CrossSolution(None, None, None)
    least = sum(part.errors for part in parts)
    others = [reduce(operator.add, [*parts[:number], *parts[number + 1 :]]) for number in range(len(parts))]
    if least <= 0 or any(other.errors <= 0 for other in others):
        return none
    tried: dict[int, tuple[float, list[Tensor]]] = {}

    def error(number: int) -> float:
        if not 0 <= number < len(strengths):
            return math.inf
        if number not in tried:
            found = [fitted(other, intercept, strengths[number]) for other in others]
            known = [change for change in found if change is not None]
            errors = [part.squared_error(change) for part, change in zip(parts, known, strict=False)]
            tried[number] = (sum(errors) if len(known) == len(parts) else math.inf), known
        return tried[number][0]

    best, following = -1, len(strengths) // 2
    while best != following:
        best = following
        following = min((best, best - 1, best + 1), key=error)
    if not error(best) < least:
        return none
    whole = fitted(reduce(operator.add, parts), intercept, strengths[best])
    return CrossSolution(tuple(tried[best][1]), whole, strengths[best])


def fitted(sums: RidgeSums, intercept: bool, strength: float) -> Tensor | None:
    """The change of one strength; None where it is too small for these sums."""
    shrunk = torch.ones(len(sums.inputs), dtype=torch.float64, device=sums.inputs.device)
    if intercept:
        shrunk[-1] = 0.0
    mean = float(sums.inputs.diagonal()[: len(shrunk) - intercept].mean())
    factor, failed = torch.linalg.cholesky_ex(sums.inputs + torch.diag(shrunk * strength * mean))
    return None if int(failed) else torch.cholesky_solve(sums.cross, factor)
