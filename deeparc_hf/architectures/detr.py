"""Detectors of transformers with heads for each decoder layer: RT-DETR (Zhao et al. 2023, arXiv 2304.08069), D-FINE,
Deformable DETR, Grounding DINO. After each layer a head says of which class an object is, and mostly another corrects
the boxes from which the next layer starts. The heads go with their layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from .auto import Auto
from .base import CountKey, Heads, Stack, register
from .hosts import Host, TransformersHost

__all__ = ["Detr"]

_COUNTS = ("decoder_layers", "decoder_num_layers")
_BOXES = ("bbox_embed", "decoder_bbox_head")
_OTHERS = ("class_embed", "decoder_class_head", "lqe_layers")


@register("detr")
class Detr(Auto):
    summary = (
        "transformers' detectors with heads for each decoder layer (RT-DETR, D-FINE, Grounding DINO); these follow"
    )
    priority = 10

    def matches(self, host: Host) -> bool:
        return isinstance(host, TransformersHost) and any(True for _ in _lists(host.root))

    def stacks(self, host: Host) -> list[Stack]:
        settings = host.settings()
        return [_with_heads(stack, host.root, settings) for stack in super().stacks(host)]


def _with_heads(stack: Stack, root: nn.Module, settings: dict[str, Any]) -> Stack:
    """A decoder with its count, which also counts its heads."""
    length, key = len(stack), next((key for key in _COUNTS if key in settings), None)
    if stack.count is not None or not stack.name.endswith("decoder.layers") or key is None or settings[key] != length:
        return stack
    name = stack.name.removesuffix(".layers")
    decoder, found = root.get_submodule(name), []
    # a decoder that has no heads for boxes corrects none: each says where the boxes are by itself
    corrects = any(isinstance(getattr(decoder, boxes, None), nn.ModuleList) for boxes in _BOXES)
    for path, heads in _lists(root):
        if len(heads) in (length, length + 1):  # one more proposes boxes before the first layer
            found.append(Heads(path, heads, adds=corrects and _name(path) in _BOXES))
    pinned = dict(stack.pinned)
    if hasattr(decoder, "pre_bbox_head"):  # D-FINE
        pinned[0] = "the boxes that the others correct are made of its output"
    return replace(stack, pinned=pinned, count=CountKey((), key), heads=tuple(found), uncounted="")


def _lists(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of heads; one that is known by two names under each of them."""
    for path, module in root.named_modules(remove_duplicate=False):
        if _name(path) in (*_BOXES, *_OTHERS) and isinstance(module, nn.ModuleList) and len(module) > 1:
            yield path, module


def _name(path: str) -> str:
    return path.rpartition(".")[2]
