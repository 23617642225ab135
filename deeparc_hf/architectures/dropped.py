"""Models of the type "deeparc_pruned": the stacks of the whole model, with the blocks that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import SurgeryError
from .base import Family, Stack, family_of, register
from .hosts import Host


@register("deeparc_pruned")
class Dropped(Family):
    summary = "checkpoints of the model type deeparc_pruned: the stacks of the whole model"
    priority = 30

    def matches(self, host: Host) -> bool:
        return bool(host.layout)

    def stacks(self, host: Host) -> list[Stack]:
        whole = host.whole()
        return [_left(stack, host) for stack in family_of(whole).stacks(whole)]

    def shrink(self, settings: dict[str, Any], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> None:
        raise SurgeryError("blocks that no setting can leave out were dropped from the model before")


def _left(stack: Stack, host: Host) -> Stack:
    """A stack of the whole model as the live one has it."""
    kept = host.layout.get(stack.name, {}).get("kept", range(len(stack)))
    pinned = {place: stack.pinned[index] for place, index in enumerate(kept) if index in stack.pinned}
    return replace(stack, container=host.root.get_submodule(stack.name), pinned=pinned, count=None, entries=())
