"""Which blocks a model's settings allow to remove at all: known from the settings, before any data is looked at."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..architectures import Host, describe
from ..errors import DeepArcError
from .rebuild import skeletons

__all__ = ["inexpressible"]


def inexpressible(model: nn.Module) -> dict[str, dict[int, str]]:
    """Blocks that cannot be removed, each with the reason: a stock loader would build something else than the model
    without the block.

    Each unpinned block is rehearsed on its own, on skeletons (see `architectures.skeleton`). Of those after a removal
    one serves for all blocks that lead to the same settings, so that a model of equal blocks takes two.

    Args:
        model: a model that `find_stacks` knows; it may be on the meta device.

    Returns:
        By stack, the reasons by block.
    """
    host, family, stacks = describe(model)
    builder = _Builder(host)
    found: dict[str, dict[int, str]] = {}
    for name, stack in stacks.items():
        for index in range(len(stack)):
            if index in stack.pinned or len(stack) == 1:
                continue
            kept = {other: [i for i in range(len(s)) if (other, i) != (name, index)] for other, s in stacks.items()}
            try:
                skeletons(builder, family, stacks, kept)
            except DeepArcError as error:
                problem = str(error).partition(" Nothing was changed.")[0].rpartition("cannot express the removal: ")[2]
                found.setdefault(name, {})[index] = f"the model's settings cannot express its removal: {problem}"
    return found


class _Builder:
    """A host that builds each skeleton once."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._built: list[tuple[dict[str, Any], nn.Module]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def build(self, settings: dict[str, Any]) -> nn.Module:
        for known, skeleton in self._built:
            if known == settings:
                return skeleton
        self._built.append((settings, self._host.build(settings)))
        return self._built[-1][1]
