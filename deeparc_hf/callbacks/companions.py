"""What the callbacks on one model must know of each other, whichever of them comes first in the Trainer's list."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import nn

__all__ = ["Companions", "companions_on"]


@dataclass
class Companions:
    """Facts about one model in training.

    Attributes:
        may_be_taken_back: a pruning has not been judged yet; taking it back would bring back the weights from before it.
        sparsity_to_come: weights are still to be zeroed in this training.
        sparsified_at: optimizer step at which weights were zeroed last; -1: never.
    """

    may_be_taken_back: bool = False
    sparsity_to_come: bool = False
    sparsified_at: int = -1


_known: weakref.WeakKeyDictionary[nn.Module, Companions] = weakref.WeakKeyDictionary()


def companions_on(model: nn.Module) -> Companions:
    """The facts about a model, shared by all callbacks on it."""
    return _known.setdefault(model, Companions())
