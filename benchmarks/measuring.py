"""What the benchmarks share: the number of threads, and an interval for a median."""

from __future__ import annotations

import numpy as np

__all__ = ["THREADS", "interval"]

THREADS = 2


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    chosen = np.random.default_rng(0).choice(values, (draws, len(values)))
    low, high = np.percentile(np.median(chosen, axis=1), [2.5, 97.5])
    return float(low), float(high)
