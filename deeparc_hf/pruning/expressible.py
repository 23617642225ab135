"""Which blocks a model's settings allow to remove at all: known from the settings, before any data is looked at."""

from __future__ import annotations

from ..architectures import Layout, Subject
from ..errors import DeepArcError
from .rebuild import skeletons

__all__ = ["inexpressible"]


def inexpressible(subject: Subject) -> dict[str, dict[int, str]]:
    """Blocks that cannot be removed, each with the reason: a stock loader would build something else than the model
    without the block.

    Each unpinned block is rehearsed on its own, on skeletons (see `architectures.skeleton`). Of those after a removal
    one serves for all blocks that lead to the same settings, so that a model of equal blocks takes two.

    Args:
        subject: the model; it may be on the meta device.

    Returns:
        By stack, the reasons by block.
    """
    found: dict[str, dict[int, str]] = {}
    for name, stack in subject.stacks.items():
        for index in range(len(stack)):
            if index in stack.pinned or len(stack) == 1:
                continue
            try:
                skeletons(subject, Layout.without(subject.lengths, {name: [index]}))
            except DeepArcError as error:
                problem = str(error).partition(" Nothing was changed.")[0].rpartition("cannot express the removal: ")[2]
                found.setdefault(name, {})[index] = f"the model's settings cannot express its removal: {problem}"
    return found
