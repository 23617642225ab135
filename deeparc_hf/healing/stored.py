"""Repairs as files: what became of each site as JSON, and the tensors of the changes as safetensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.checks import MalformedError, read_json
from ..errors import RecordError
from .block_ends import Ending
from .sites import Healing, Site

__all__ = ["load_healings", "save_healings"]

_SITES, _CHANGES = "sites.json", "changes.safetensors"
_TENSORS = ("change", "intercept", "mean", "variance", "scale")


def save_healings(folder: Path, healings: Sequence[Healing]) -> None:
    """Write repairs into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    sites: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, healing in enumerate(healings):
        ending, (mean, variance) = healing.ending, healing.statistics or (None, None)
        known = {"change": healing.change, "intercept": healing.intercept, "mean": mean, "variance": variance}
        known |= {"scale": None if ending is None else ending.scale}
        known |= {f"final.{name}": value for name, value in healing.final.items()}
        tensors |= {f"{number}.{name}": t.detach().cpu().contiguous() for name, t in known.items() if t is not None}
        paths = None if ending is None else {name: getattr(ending, name) for name in ("map", "batch_norm", "final")}
        sites.append({**healing.to_dict(), "positions": healing.positions, "ending": paths})
    save_file(tensors, folder / _CHANGES)
    (folder / _SITES).write_text(json.dumps(sites, indent=1) + "\n", "utf-8")


def load_healings(folder: Path) -> list[Healing]:
    """The repairs in a folder.

    Raises:
        RecordError: if there are none, or they cannot be read.
    """
    try:
        tensors = load_file(folder / _CHANGES)
        return [_healing(noted, number, tensors) for number, noted in enumerate(read_json(folder / _SITES))]
    except (OSError, MalformedError, SafetensorError, KeyError, TypeError) as error:
        raise RecordError(f"The repairs in {folder} cannot be read: {type(error).__name__}: {error}.") from error


def _healing(noted: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> Healing:
    own = {key.removeprefix(f"{number}."): t for key, t in tensors.items() if key.startswith(f"{number}.")}
    change, intercept, mean, variance, scale = (own.get(name) for name in _TENSORS)
    paths = noted["ending"]
    return Healing(
        Site(noted["stack"], noted["kept"], tuple(noted["removed"])),
        noted["reason"],
        noted["held_out"],
        noted["strength"],
        noted["positions"],
        change=change,
        intercept=intercept,
        final={key.removeprefix("final."): value for key, value in own.items() if key.startswith("final.")},
        statistics=None if mean is None or variance is None else (mean, variance),
        ending=None if paths is None or scale is None else Ending(scale=scale, **paths),
    )
