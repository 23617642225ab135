"""ResNet of transformers (He et al. 2016, arXiv 1512.03385): one stack a stage, counted by `depths`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from .base import CountKey, Family, Stack, chained, register, signature_pins
from .hosts import Host


@register("resnet")
class ResNet(Family):
    summary = "transformers ResNet, basic and bottleneck; one stack a stage"

    def matches(self, host: Host) -> bool:
        return host.kind == "resnet" and isinstance(host.root, PreTrainedModel)

    def stacks(self, host: Host) -> list[Stack]:
        base = host.root.base_model
        prefix = f"{host.root.base_model_prefix}." if base is not host.root else ""
        return chained(
            [
                Stack(
                    name=f"{prefix}encoder.stages.{i}.layers",
                    container=stage.layers,
                    pinned=stage_pins(list(stage.layers)),
                    count=CountKey((), "depths", i),
                )
                for i, stage in enumerate(base.encoder.stages)
            ]
        )


def stage_pins(blocks: Sequence[nn.Module]) -> dict[int, str]:
    """Pins of one stage of a CNN: a first block with a projection on its shortcut changes the shape."""
    pins = signature_pins(blocks)
    return {index: "first block of the stage: changes shape" if index == 0 else why for index, why in pins.items()}
