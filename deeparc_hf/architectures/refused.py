"""Families that are known and refused, each with its reason. Support for one starts with deleting its class here."""

from __future__ import annotations

from typing import ClassVar

from ..errors import UnsupportedModelError
from .base import Family, Stack, register
from .hosts import Host


class Refused(Family):
    """Base of the refused families.

    Attributes:
        kinds: beginnings of the model types (transformers) or architecture names (timm) that are refused.
        found, reason: what the model is made of, and why no block can be taken out.
    """

    priority = 20
    kinds: ClassVar[tuple[str, ...]]
    found: ClassVar[str]
    reason: ClassVar[str]

    def matches(self, host: Host) -> bool:
        kind = host.kind
        if kind == "timm_wrapper":
            kind = host.root.config.architecture
        return kind.startswith(self.kinds)

    def stacks(self, host: Host) -> list[Stack]:
        raise UnsupportedModelError(f"{host.label} cannot be pruned by layers: found {self.found}, but {self.reason}.")


@register("albert")
class Albert(Refused):
    summary = "refused: layers shared by all depths"
    kinds = ("albert",)
    found = "layers that are run many times"
    reason = (
        "their parameters are shared by the depths, so that no block can be left out that others do not need. For "
        "fewer runs set num_hidden_layers in the config"
    )


@register("mobilenet_v1")
class MobileNetV1(Refused):
    summary = "refused: no shortcut past any block"
    kinds = ("mobilenet_v1",)
    found = "a chain of convolutions"
    reason = "none of them has a shortcut past it, so that without one the others are given something else altogether"
