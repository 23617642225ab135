"""CNNs of transformers with inverted residual blocks, whose number follows from a fixed table and a multiplier: blocks
with a shortcut can be dropped (the model type "deeparc_pruned").
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import nn
from transformers import PreTrainedModel

from .base import Family, Stack, register
from .hosts import Host


class InvertedResidual(Family):
    """Base of these families.

    Attributes:
        kind: the model type.
        path: of the list of blocks in the headless model.
    """

    kind: ClassVar[str]
    path: ClassVar[str]

    def matches(self, host: Host) -> bool:
        return host.kind == self.kind and isinstance(host.root, PreTrainedModel)

    def stacks(self, host: Host) -> list[Stack]:
        base = host.root.base_model
        prefix = f"{host.root.base_model_prefix}." if base is not host.root else ""
        blocks = base.get_submodule(self.path)
        why = "has no shortcut past it: it may change the shape of its input"
        pinned = {index: why for index, block in enumerate(blocks) if not self.has_shortcut(block)}
        return [Stack(prefix + self.path, blocks, pinned)]

    @abstractmethod
    def has_shortcut(self, block: nn.Module) -> bool:
        """Whether a block adds its input to what it computes."""


@register("efficientnet")
class EfficientNet(InvertedResidual):
    summary = "transformers EfficientNet: blocks with a shortcut, dropped by deeparc_hf (deeparc_pruned)"
    kind, path = "efficientnet", "encoder.blocks"

    def has_shortcut(self, block: nn.Module) -> bool:
        return bool(block.projection.apply_dropout)


@register("mobilenet_v2")
class MobileNetV2(InvertedResidual):
    summary = "transformers MobileNetV2: blocks with a shortcut, dropped by deeparc_hf (deeparc_pruned)"
    kind, path = "mobilenet_v2", "layer"

    def has_shortcut(self, block: nn.Module) -> bool:
        return bool(block.use_residual)
