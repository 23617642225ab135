"""transformers XLM and FlauBERT: no module is a block, its parts stand in lists side by side."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..core.block_paths import stack_name
from ..errors import UnsupportedModelError
from .base import CountKey, Family, Stack, register
from .hosts import Host

_PARTS = ("attentions", "layer_norm1", "ffns", "layer_norm2")  # in the order in which they run


@register("xlm")
class Xlm(Family):
    summary = "transformers XLM and FlauBERT: blocks with parts in lists side by side"

    def matches(self, host: Host) -> bool:
        return host.kind in ("xlm", "flaubert") and isinstance(host.root, PreTrainedModel)

    def stacks(self, host: Host) -> list[Stack]:
        base = host.root.base_model
        if getattr(base, "pre_norm", False):
            raise UnsupportedModelError(
                f"{host.label} cannot be pruned by layers: with pre_norm=True no module of it puts out what a block "
                "does (the norms stand in the branches), so that blocks can neither be compared nor skipped. Models "
                "with pre_norm=False can be pruned."
            )
        prefix = f"{host.root.base_model_prefix}." if base is not host.root else ""
        container, *beside = (getattr(base, part) for part in _PARTS)
        name = stack_name([prefix + part for part in _PARTS])
        return [Stack(name, container, count=CountKey((), "n_layers"), beside=tuple(beside))]
