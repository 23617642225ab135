"""From scores to masks: which weights of a linear map are zeroed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["choose_lowest", "choose_pattern"]


def choose_lowest(score: Tensor, sparsity: float) -> Tensor:
    """The weights to zero: in each output row the int(d_in * sparsity) with the lowest scores; of equals the earlier ones.

    Args:
        score: shape (d_out, d_in).
        sparsity: share of each row that is zeroed, in [0, 1).

    Returns:
        Bool, shape (d_out, d_in); True is zeroed.

    Raises:
        ConfigError: if the sparsity is not such a share.
    """
    if not 0 <= sparsity < 1:
        hint = f" Did you mean {sparsity / 100:g}?" if 1 < sparsity < 100 else ""
        raise ConfigError(f"sparsity must be in [0, 1), found {sparsity}.{hint}")
    return _mark_lowest(score, int(score.shape[1] * sparsity))


def choose_pattern(score: Tensor, keep: int, group: int) -> Tensor:
    """The weights to zero for an N:M pattern: of each `group` consecutive inputs of a row, `keep` stay (2:4 is keep=2, group=4).

    Args:
        score: shape (d_out, d_in), d_in a multiple of `group`.

    Returns:
        Bool, shape (d_out, d_in); True is zeroed.

    Raises:
        ConfigError: if the pattern is not one, or does not fit the number of inputs.
    """
    if not 0 < keep < group:
        raise ConfigError(f"A pattern N:M keeps N of M weights with 0 < N < M, found {keep}:{group}.")
    if score.shape[1] % group:
        raise ConfigError(f"The pattern {keep}:{group} needs a number of inputs divisible by {group}, found {score.shape[1]}.")
    return _mark_lowest(score.reshape(-1, group), group - keep).reshape(score.shape)


def _mark_lowest(score: Tensor, count: int) -> Tensor:
    order = score.argsort(dim=1, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :count], True)
