"""Rank correlations of distances with damage, with bootstrap intervals; over many resamples at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["correlations", "kendall", "ranks", "spearman"]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties averaged."""
    less = (values[..., None, :] < values[..., :, None]).sum(-1)
    same = (values[..., None, :] == values[..., :, None]).sum(-1)
    return less + (same + 1) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Along the last axis; the others broadcast."""
    a, b = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def kendall(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b along the last axis; the others broadcast."""
    a, b = (np.sign(v[..., None, :] - v[..., :, None]) for v in (a, b))
    return (a * b).sum((-1, -2)) / np.sqrt((a**2).sum((-1, -2)) * (b**2).sum((-1, -2)))


def correlations(
    distances: Mapping[Any, np.ndarray], loss: np.ndarray, accuracy: np.ndarray, reference: Any, draws: int, seed: int
) -> list[dict[str, Any]]:
    """Rank correlations of each choice.

    Args:
        distances: 1 - similarity, shape (seeds, blocks).
        loss, accuracy: per block and example, the rise of loss and the drop of accuracy, shape (blocks, examples).
        reference: the choice to which the others are compared.
        draws, seed: of the bootstrap over examples.
    """
    rng = np.random.default_rng(seed)
    number = loss.shape[1]
    weights = rng.multinomial(number, np.full(number, 1 / number), size=draws) / number
    resampled = weights @ loss.T  # (draws, blocks)
    boot = {c: spearman(d[:, None], resampled[None]).mean(0) for c, d in distances.items()}
    rows = []
    for choice, distance in distances.items():
        per_seed = spearman(distance, loss.mean(1))
        gap = boot[choice] - boot[reference]
        rows.append(
            {
                "choice": str(choice),
                "spearman": float(per_seed.mean()),
                "interval": np.quantile(boot[choice], [0.025, 0.975]).tolist(),
                "over_seeds": [float(per_seed.min()), float(per_seed.max())],
                "kendall": float(kendall(distance, loss.mean(1)).mean()),
                "spearman_accuracy": float(spearman(distance, accuracy.mean(1)).mean()),
                "minus_reference": [float(gap.mean()), *np.quantile(gap, [0.025, 0.975]).tolist()],
            }
        )
    return rows
