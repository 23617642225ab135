"""Removal sites, and what healing made of each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..architectures import Host
from ..architectures.adapters import is_adapted
from ..architectures.packed import is_quantized
from ..core.tables import html_table, runs, spans
from ..errors import UnsupportedModelError
from .block_ends import Ending

__all__ = ["Healing", "Site", "healing_text", "refuse_healing", "sites_of"]


def refuse_healing(host: Host) -> None:
    """Refuse to heal a model that cannot keep what healing changes.

    Raises:
        UnsupportedModelError: if it has adapters, beneath which the weights are to stay, or packed weights.
    """
    if is_quantized(host.root):
        raise UnsupportedModelError(
            f"{type(host.root).__name__} is quantized, and healing cannot change packed weights. Leave it out "
            "(heal=None), or prune and heal the model before it is quantized."
        )
    if is_adapted(host.root):
        raise UnsupportedModelError(
            f"Healing would change the weights beneath the PEFT adapters of {type(host.root).__name__}, which no "
            "checkpoint of the adapters holds. Leave it out (heal=None), or merge the adapters first: "
            "model.merge_and_unload()."
        )


@dataclass(frozen=True)
class Site:
    """A run of removed blocks and the kept block before it; indices of the unpruned model."""

    stack: str
    kept: int
    removed: tuple[int, ...]

    def __str__(self) -> str:
        return _name(self.stack, self.removed)


@dataclass
class Healing:
    """The outcome at one site.

    Attributes:
        site: where.
        reason: why the site is left alone; None if there is a change to apply.
        held_out: squared distance of the kept block's output from the last removed block's, on held-out positions, with
            a change that was fitted on the others, relative to that without; None where nothing was fitted.
        strength: of the ridge, relative to the mean square of the inputs.
        positions: number of positions that the change was fitted on.
    """

    site: Site
    reason: str | None = None
    held_out: float | None = None
    strength: float | None = None
    positions: int = 0
    change: Tensor | None = field(default=None, repr=False)  # (d_out, d_in)
    intercept: Tensor | None = field(default=None, repr=False)  # (d_out,)
    final: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # what the final module takes over
    # mean and variance of the changed map's output
    statistics: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    ending: Ending | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return healing_text(self.to_dict())

    def _repr_html_(self) -> str:
        left = "-" if self.held_out is None else f"{100 * self.held_out:.1f}"
        strength = "-" if self.strength is None else f"{self.strength:g}"
        row = [self.site.stack, spans(self.site.removed), self.site.kept, self.reason or "healed", left, strength]
        return html_table(
            "Healing", ["stack", "removed", "kept block before", "outcome", "squared error left (%)", "ridge"], [row]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without tensors."""
        return {
            "stack": self.site.stack,
            "kept": self.site.kept,
            "removed": list(self.site.removed),
            "healed": self.reason is None,
            "reason": self.reason,
            "held_out": self.held_out,
            "strength": self.strength,
        }


def healing_text(site: Mapping[str, Any]) -> str:
    """What became of a site (`Healing.to_dict`), in a sentence."""
    name = _name(site["stack"], site["removed"])
    if not site["healed"]:
        return f"{name} is left as the removal leaves it: {site['reason']}."
    share = 100 * (site["held_out"] or 0.0)
    return (
        f"{name} is healed: {share:.1f} % of its output's squared error remain on held-out samples (ridge "
        f"{site['strength']:g})."
    )


def sites_of(removed: Mapping[str, Sequence[int]]) -> list[Site]:
    """The runs of removed blocks that have a kept block before them."""
    return [
        Site(stack, run[0] - 1, tuple(run))
        for stack, indices in removed.items()
        for run in runs(sorted(indices))
        if run[0] > 0
    ]


def _name(stack: str, removed: Sequence[int]) -> str:
    return f"{stack}: {removed[0]}" if len(removed) == 1 else f"{stack}: {removed[0]}-{removed[-1]}"
