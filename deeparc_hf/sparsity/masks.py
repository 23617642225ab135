"""From scores to masks, exactly as a stable sort would choose but faster on a CPU; and weights that stay zero."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import SparsityError

__all__ = ["Zeros", "choose_lowest", "choose_pattern", "zero_chosen"]

CHUNK = 1 << 16  # scores at a time: with what is made of them they stay in a core's cache
_DEVICE_CHUNK = 1 << 24  # on an accelerator, which needs many at a time; bounds what a sort takes beside the scores
_COMPARED = 16  # groups up to this length are ranked by comparing all pairs
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight


def choose_lowest(score: Tensor, sparsity: float) -> Tensor:
    """The weights to zero: in each output row the int(d_in * sparsity) with the lowest scores; of equals the earlier
    ones.

    Args:
        score: shape (d_out, d_in); at least 0, infinity included, but not NaN.
        sparsity: share of each row that is zeroed, in [0, 1).

    Returns:
        Bool, shape (d_out, d_in); True is zeroed.
    """
    return _mark_lowest(score, int(score.shape[1] * sparsity), score.shape[1])


def choose_pattern(score: Tensor, keep: int, group: int) -> Tensor:
    """The weights to zero for an N:M pattern: of each `group` consecutive inputs of a row, `keep` stay (2:4 is keep=2,
    group=4).

    Args:
        score: shape (d_out, d_in), d_in a multiple of `group`; at least 0, infinity included, but not NaN.

    Returns:
        Bool, shape (d_out, d_in); True is zeroed.
    """
    return _mark_lowest(score, group - keep, group)


def zero_chosen(weight: Tensor, mask: Tensor) -> None:
    """Zero the weights that `mask` marks, in place, to +0: faster on a CPU than `masked_fill_`, which branches."""
    _zero_others(weight, ~mask)


def _zero_others(weight: Tensor, kept: Tensor) -> None:
    # the bits as an integer, times 0 or 1: so weights that are negative or not finite become +0 too
    weight.detach().view(_INTEGERS[weight.element_size()]).mul_(kept)


class Zeros:
    """Which weights of which parameters are to be zero. Masks belong to parameters and not to names, which a later
    pruning may change; a removed parameter is forgotten as soon as nothing else holds it.
    """

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()  # parameter: True where it is not zeroed

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Keep the weights zero where the mask is True, beside those that are kept zero already."""
        self._kept[parameter] = self._kept[parameter] & ~mask if self.holds(parameter) else ~mask

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether zeros of this parameter are kept."""
        return parameter in self._kept

    def apply(self) -> None:
        for parameter, kept in self._items():
            _zero_others(parameter, kept)

    def check(self, model: nn.Module, advice: str) -> None:
        """Check that all of the weights are zero; the advice is what to do where they are not."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # those of blocks that were removed, but may come back, are not the model's now
        counts = {names[id(p)]: int((p.detach()[~kept] != 0).sum()) for p, kept in self._items() if id(p) in names}
        broken = {name: count for name, count in counts.items() if count}
        if broken:
            more = f" and {len(broken) - 1} more matrices" if len(broken) > 1 else ""
            raise SparsityError(
                f"{sum(broken.values()):,} weights of {next(iter(broken))}{more} that were zeroed are not zero any "
                "more: something other than the optimizer's steps has changed them (another callback, weights that "
                f"were loaded or averaged). {advice}"
            )

    def _items(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for parameter, kept in self._kept.items():
            if kept.device != parameter.device:
                kept = self._kept[parameter] = kept.to(parameter.device)
            yield parameter, kept


def _mark_lowest(score: Tensor, count: int, group: int) -> Tensor:
    """The `count` lowest of each `group` consecutive scores, the earlier ones of equals."""
    mask = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
    if count == 0 or score.numel() == 0:
        return mask
    on_cpu = score.device.type == "cpu"
    choose = by_sorting if not on_cpu else by_comparing if group <= _COMPARED else by_selecting
    rows = max(1, (CHUNK if on_cpu else _DEVICE_CHUNK) // score.shape[1])
    for scores, chosen in zip(score.detach().split(rows), mask.split(rows), strict=True):
        choose(scores.reshape(-1, group), count, chosen.view(-1, group))
    return mask


def by_sorting(score: Tensor, count: int, chosen: Tensor) -> None:
    chosen.scatter_(1, score.argsort(dim=1, stable=True)[:, :count], True)


def by_selecting(score: Tensor, count: int, chosen: Tensor) -> None:
    """By the lowest score that stays: NumPy's partition finds it several times faster than PyTorch's kthvalue."""
    values, marked = _array(score), chosen.numpy()
    parted = np.partition(values, count, axis=1)
    stays = parted[:, count, None]
    np.less(values, stays, out=marked)
    tied = np.flatnonzero(parted[:, :count].max(axis=1) == parted[:, count])
    if len(tied):  # equals on both sides of the border: the earlier ones go, as many as are missing
        equal = values[tied] == stays[tied]
        missing = count - np.count_nonzero(marked[tied], axis=1)
        marked[tied] |= equal & (equal.cumsum(axis=1, dtype=np.int32) <= missing[:, None])


def by_comparing(score: Tensor, count: int, chosen: Tensor) -> None:
    """By rank, from comparing all pairs within short groups: as these lie end to end, one comparison of the flat scores
    with themselves, shifted, serves all of them.
    """
    group = score.shape[1]
    values = _array(score).reshape(-1)
    place = np.tile(np.arange(group, dtype=np.int8), len(score))
    rank = (group - 1) - place  # as if all the later ones were lower, and none of the earlier
    for shift in range(1, group):
        first = values[:-shift] <= values[shift:]
        first &= place[:-shift] < group - shift  # both are of one group
        first = first.view(np.int8)
        rank[shift:] += first
        rank[:-shift] -= first
    np.less(rank, count, out=chosen.view(-1).numpy())


def _array(score: Tensor) -> np.ndarray:
    """NumPy has no bfloat16; 32 bits hold its values, and so their order, exactly."""
    return (score.float() if score.dtype == torch.bfloat16 else score).numpy()
