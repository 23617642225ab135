"""Zeros that stay zero: masks of a live model's parameters, applied after every optimizer step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import SparsityError
from .masks import zero_others

__all__ = ["Zeros"]


class Zeros:
    """Which weights of which parameters are to be zero.

    Masks belong to parameters and not to names: a later pruning may renumber blocks, and a removed parameter is
    forgotten as soon as nothing else holds it. A mask takes one byte for each weight.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[weakref.ref[nn.Parameter], Tensor]] = []  # True: not zeroed

    def __len__(self) -> int:
        return len(self._alive())

    def add(self, parameter: nn.Parameter, mask: Tensor) -> None:
        """Keep the weights zero where the mask is True, beside those that are kept zero already."""
        for index, (reference, kept) in enumerate(self._kept):
            if reference() is parameter:
                self._kept[index] = (reference, kept & ~mask)
                return
        self._kept.append((weakref.ref(parameter), ~mask))

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether zeros of this parameter are kept."""
        return any(reference() is parameter for reference, _ in self._kept)

    def apply(self) -> None:
        """Zero the weights."""
        with torch.no_grad():
            for parameter, kept in self._alive():
                zero_others(parameter, kept)

    def check(self, model: nn.Module) -> None:
        """Check that all of the weights are zero.

        Raises:
            SparsityError: naming the matrices in which they are not.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        # those of blocks that were removed, but may come back, are not the model's now
        broken = {names[id(p)]: int((p.detach()[~kept] != 0).sum()) for p, kept in self._alive() if id(p) in names}
        broken = {name: count for name, count in broken.items() if count}
        if broken:
            raise SparsityError(_complaint(broken))

    def _alive(self) -> list[tuple[nn.Parameter, Tensor]]:
        living = []
        for reference, kept in self._kept:
            parameter = reference()
            if parameter is not None:
                living.append((parameter, kept if kept.device == parameter.device else kept.to(parameter.device)))
        self._kept = [(weakref.ref(parameter), kept) for parameter, kept in living]
        return living


def _complaint(broken: Mapping[str, int]) -> str:
    first = next(iter(broken))
    more = f" and {len(broken) - 1} more matrices" if len(broken) > 1 else ""
    return (
        f"{sum(broken.values()):,} weights of {first}{more} that were zeroed are not zero any more: something other "
        "than the optimizer's steps has changed them (another callback, weights that were loaded or averaged). Put "
        "WandaCallback last in the list of callbacks, or set keep_zeros=False if the zeros are not to stay."
    )
