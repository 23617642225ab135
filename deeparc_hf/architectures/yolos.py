"""YOLOS (Fang et al. 2021, arXiv 2106.00666) adds position embeddings anew between each two of its layers. They stand
in one tensor that has a part less than there are layers.
"""

from __future__ import annotations

from dataclasses import replace

from .auto import Auto
from .base import CountKey, Stack, register
from .hosts import Host
from .per_block import AddedBetween

__all__ = ["Yolos"]

_LAYERS, _EMBEDDINGS = "encoder.layer", "encoder.interpolation.mid_position_embeddings"


@register("yolos")
class Yolos(Auto):
    summary = "transformers YOLOS; its position embeddings between the layers follow"
    priority = 10

    def matches(self, host: Host) -> bool:
        return host.kind == "yolos"

    def stacks(self, host: Host) -> list[Stack]:
        return [_counted(stack) for stack in super().stacks(host)]


def _counted(stack: Stack) -> Stack:
    """The stack with its count, where it has such embeddings: the search takes them for what depends on the depth."""
    root, found, rest = stack.name.rpartition(_LAYERS)
    if not found or rest or stack.count is not None:
        return stack
    tensor = AddedBetween(root + _EMBEDDINGS, dim=0, known=True)
    pinned = {
        0: "position embeddings are added after it, and before it there are none that could take them up",
        len(stack) - 1: "position embeddings are added before it, and after it there are none that could take them up",
    }
    return replace(stack, pinned=pinned, count=CountKey((), "num_hidden_layers"), per_block=(tensor,), uncounted="")
