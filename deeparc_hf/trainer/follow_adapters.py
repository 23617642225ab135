"""A checkpoint of adapters alone (PEFT), as a Trainer makes it of a model with adapters: it holds nothing of the model
beneath, which must have lost the same blocks before the adapters are put in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..architectures import Stack, Subject
from ..architectures.adapters import is_adapted
from ..core.shards import shape_of
from ..errors import SurgeryError

__all__ = ["Held", "holds_adapters_alone", "joined", "note_structure", "places_of_adapters"]

Held = dict[str, dict[int, dict[str, Tensor]]]  # of each stack the tensors of its blocks, by their index

_ADVICE = (
    "Give the Trainer the model as it was when the run began, with an adapter of the same settings, and resume from a "
    "checkpoint of that run."
)


def holds_adapters_alone(module: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has nothing of the weights beneath the adapters of a model."""
    return is_adapted(module) and not any(key.endswith("base_layer.weight") for key in state_dict)


def joined(one: Held | None, other: Held) -> Held:
    """What two loads have put into a model: a checkpoint of several adapters is loaded one after another."""
    both = {name: dict(blocks) for name, blocks in other.items()}
    for name, blocks in (one or {}).items():
        for index, tensors in blocks.items():
            both[name][index] = {**tensors, **both[name].get(index, {})}
    return both


def places_of_adapters(
    stack: Stack, blocks: Mapping[int, Mapping[str, Tensor]], likely: Iterable[Sequence[int]]
) -> Sequence[int]:
    """The blocks of the stack that a checkpoint of adapters is of: all of them, likely ones, or the first that fit.

    Raises:
        SurgeryError: if none fit, or it cannot be told.
    """
    known = {key for tensors in blocks.values() for key in tensors}
    own = [
        {key: shape_of(value) for key, value in block.state_dict(keep_vars=True).items() if key in known}
        for block in stack.blocks
    ]
    wanted = {index: {key: shape_of(value) for key, value in tensors.items()} for index, tensors in blocks.items()}
    every = range(len(stack))
    for places in (every, *likely):
        if {index: own[place] for index, place in enumerate(places) if own[place]} == wanted:
            return places
    found: list[int] = []
    if all(own) and sorted(wanted) == list(range(len(wanted))):
        for index in range(len(wanted)):
            after = found[-1] + 1 if found else 0
            found += [place for place in every[after:] if own[place] == wanted[index]][:1]
    if not found or len(found) != len(wanted):
        raise SurgeryError(
            f"The adapters in the checkpoint that is loaded are not those of {stack.name}'s {len(stack)} blocks, nor "
            f"can it be told of which of them they are. {_ADVICE}"
        )
    return found


def note_structure(subject: Subject, checkpoint: Path) -> None:
    """Write the config of the model beneath its adapters, with its record, into a checkpoint of the adapters."""
    config, noted = getattr(subject.root, "config", None), (checkpoint / "config.json").exists()
    if noted or not checkpoint.is_dir() or not is_adapted(subject.root) or subject.host.record() is None:
        return
    if hasattr(config, "save_pretrained"):  # a model of timm has none
        config.save_pretrained(checkpoint)
