"""ESM (Lin et al. 2023, doi 10.1126/science.ade2574): the contact head is a regression over the attention maps of all
layers, one layer's heads after another's, so that its weights have a part for each layer. No output of a forward pass
shows it (`predict_contacts` does).
"""

from __future__ import annotations

from dataclasses import replace

from .auto import Auto
from .base import Stack, register
from .hosts import Host

__all__ = ["Esm"]


@register("esm")
class Esm(Auto):
    summary = "transformers ESM; its contact head follows"
    priority = 10

    def matches(self, host: Host) -> bool:
        return host.kind == "esm"

    def stacks(self, host: Host) -> list[Stack]:
        return [
            replace(
                stack,
                per_block=tuple(
                    replace(tensor, known=tensor.path.endswith("contact_head.regression.weight"))
                    for tensor in stack.per_block
                ),
            )
            for stack in super().stacks(host)
        ]
