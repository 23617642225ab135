"""What the callbacks on one model must know of each other, whichever of them comes first in the Trainer's list."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn
from transformers import TrainerState

__all__ = ["Companions", "companions_on", "meet_companions"]


@dataclass
class Companions:
    """Facts about one training of a model.

    Attributes:
        training: the Trainer's state object of that training.
        may_be_taken_back: a pruning has not been judged yet; taking it back would bring back the weights from before
            it.
        pruning_starts, judged_after: epochs before the first pruning, and after the last verdict at the earliest; None:
            nothing is judged.
        prunes: blocks are removed in this training, and its end is told by the callback that removes them.
        taken_back: number of prunings that were taken back: blocks came back, with the zeros that they had.
        sparsity_to_come: weights are still to be zeroed in this training.
        keeps_zeros: somebody keeps zeroed weights zero.
        sparsified_at: optimizer step at which weights were zeroed last; -1: never.
        card_told: whether it was told how the card is kept when the model is pushed.
    """

    training: weakref.ref[TrainerState]
    may_be_taken_back: bool = False
    pruning_starts: int | None = None
    judged_after: int | None = None
    prunes: bool = False
    taken_back: int = 0
    sparsity_to_come: bool = False
    keeps_zeros: bool = False
    sparsified_at: int = -1
    card_told: bool = False


_known: weakref.WeakKeyDictionary[nn.Module, Companions] = weakref.WeakKeyDictionary()


def meet_companions(model: nn.Module, state: TrainerState) -> Companions:
    """The facts about a training that begins, shared by all callbacks in it; those of an earlier one, however it ended,
    are gone.
    """
    known = _known.get(model)
    if known is None or known.training() is not state:
        known = _known[model] = Companions(weakref.ref(state))
    return known


def companions_on(model: nn.Module) -> Companions:
    """The facts about the training that began last."""
    return _known[model]
