"""Intervals of figures that were counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from ..errors import ConfigError

__all__ = ["median_interval", "wilson_interval"]

_CONFIDENCE = 0.95


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval of the median of what the values are drawn from, by their order (binomial): of at least 95 % for six
    values or more; the lowest and the highest of fewer.
    """
    ordered, n = sorted(values), len(values)
    outside, below = 0, 0.0
    while 2 * (below + math.comb(n, outside) / 2**n) <= 1 - _CONFIDENCE:
        below += math.comb(n, outside) / 2**n
        outside += 1
    cut = max(outside - 1, 0)
    return ordered[cut], ordered[n - 1 - cut]


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (E. B. Wilson, Probable inference, the law of succession, and statistical
    inference, 1927).

    Unlike the textbook interval it stays within [0, 1] and is right near 0 and 1 and for small n.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ConfigError(f"An interval needs 0 <= correct <= n and n >= 1, found correct={correct}, n={n}.")
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    share, weight = correct / n, z * z / n
    center = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # at the ends the bound is 0 or 1 exactly; rounding must not say otherwise
    return (0.0 if correct == 0 else center - half), (1.0 if correct == n else center + half)
