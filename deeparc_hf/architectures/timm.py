"""timm models whose own arguments say how many blocks they have, bare or inside transformers' TimmWrapper."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from ..errors import UnsupportedModelError
from .base import Container, Family, Stack, chained, register, signature_pins
from .hosts import Host, TransformersHost
from .resnet import stage_pins


class TimmFamily(Family):
    """Base of the timm families.

    Attributes:
        module, cls: where timm defines the model's class.
        argument: the argument of `timm.create_model` that counts the blocks.
        per_stage: whether it is a list with one count a stage.
        pins: the blocks of one stack that must stay.
    """

    module: ClassVar[str]
    cls: ClassVar[str]
    argument: ClassVar[str]
    per_stage: ClassVar[bool] = False
    pins = staticmethod(signature_pins)

    def matches(self, host: Host) -> bool:
        model = _timm_model(host)
        if model is None:
            return False
        return isinstance(model, getattr(importlib.import_module(self.module), self.cls))

    def stacks(self, host: Host) -> list[Stack]:
        prefix = "timm_model." if isinstance(host, TransformersHost) else ""
        containers = self.containers(_timm_model(host))
        settings, counts = host.settings(), [len(container) for _, container in containers]
        self._write(settings, counts)
        try:  # some of timm's entry points fix the number of blocks
            host.build(settings)
        except TypeError as error:
            raise UnsupportedModelError(
                f"{host.label} cannot be pruned by layers: found {sum(counts)} blocks, but timm's own entry point does "
                f"not let {self.argument!r} be given ({error}), so a pruned checkpoint could not be rebuilt by stock "
                "timm. A newer timm may allow it: pip install -U timm."
            ) from error
        stacks = [Stack(prefix + name, blocks, type(self).pins(list(blocks))) for name, blocks in containers]
        return chained(stacks)

    @abstractmethod
    def containers(self, model: nn.Module) -> list[tuple[str, Container]]:
        """Module path and container of every stack, in forward order."""

    def shrink(self, settings: dict[str, Any], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> None:
        self._write(settings, [len(kept[stack.name]) for stack in stacks])

    def _write(self, settings: dict[str, Any], counts: list[int]) -> None:
        arguments = settings
        if "architecture" in settings:  # the config of TimmWrapper
            arguments = settings["model_args"] = dict(settings.get("model_args") or {})
        arguments[self.argument] = counts if self.per_stage else counts[0]


def _timm_model(host: Host) -> nn.Module | None:
    if host.library == "timm":
        return host.root
    return host.root.timm_model if host.kind == "timm_wrapper" else None


@register("timm_resnet")
class TimmResNet(TimmFamily):
    summary = "timm resnet*, resnext*, wide_resnet*, seresnet* and their like; one stack a stage"
    module, cls, argument, per_stage = "timm.models.resnet", "ResNet", "layers", True
    pins = staticmethod(stage_pins)

    def containers(self, model: nn.Module) -> list[tuple[str, Container]]:
        return [(f"layer{i}", getattr(model, f"layer{i}")) for i in range(1, 5)]


@register("timm_vit")
class TimmViT(TimmFamily):
    summary = "timm vit*, deit*"
    module, cls, argument = "timm.models.vision_transformer", "VisionTransformer", "depth"

    def containers(self, model: nn.Module) -> list[tuple[str, Container]]:
        return [("blocks", model.blocks)]


@register("timm_convnext")
class TimmConvNeXt(TimmFamily):
    summary = "timm convnext*; one stack a stage"
    module, cls, argument, per_stage = "timm.models.convnext", "ConvNeXt", "depths", True

    def containers(self, model: nn.Module) -> list[tuple[str, Container]]:
        return [(f"stages.{i}.blocks", stage.blocks) for i, stage in enumerate(model.stages)]


@register("timm_mixer")
class TimmMixer(TimmFamily):
    summary = "timm mixer*, resmlp*, gmlp*, where timm lets the number of blocks be given (1.0.31 does not)"
    module, cls, argument = "timm.models.mlp_mixer", "MlpMixer", "num_blocks"

    def containers(self, model: nn.Module) -> list[tuple[str, Container]]:
        return [("blocks", model.blocks)]
