"""What a state dict holds of a model's blocks, and which blocks of the model have the same shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..architectures import Stack
from ..errors import SurgeryError

__all__ = ["blocks_in", "is_shard", "places_for", "refuse_incomplete"]


def refuse_incomplete(stacks: Mapping[str, Stack], held: Mapping[str, Mapping[int, Mapping[str, Tensor]]]) -> None:
    """Refuse a checkpoint that lacks tensors of its blocks: the Trainer would leave the model's own there, with a
    warning.
    """
    for name, blocks in held.items():
        whole = [set(block.state_dict()) for block in stacks[name].blocks]
        for index, tensors in blocks.items():
            if blocks and not any(keys <= tensors.keys() for keys in whole):
                lacking = min(min(keys - tensors.keys()) for keys in whole)
                raise SurgeryError(
                    f"The checkpoint that is loaded holds the tensors of its blocks otherwise than the model does: "
                    f"block {index} of {name} has no {lacking}, and the Trainer would leave what the model has there. "
                    f"Training of this kind of model cannot be resumed: load the checkpoint with from_pretrained and "
                    f"start a new training."
                )


def blocks_in(state_dict: Mapping[str, Any], start: str) -> dict[int, dict[str, Tensor]]:
    """Tensors of a stack in a state dict, by the index of their block."""
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        if key.startswith(start):
            index, _, rest = key[len(start) :].partition(".")
            if index.isdigit():
                found.setdefault(int(index), {})[rest] = value
    return found


def is_shard(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    stacks: Mapping[str, Stack],
    held: Mapping[str, Mapping[int, Any]],
) -> bool:
    """Whether the state dict is one of several. Such a one cannot tell how many blocks a checkpoint has; `settle`
    compares them later.
    """
    if any(sorted(blocks) != list(range(len(blocks))) for blocks in held.values()):
        return True
    own: dict[int, set[str]] = {id(tensor): set() for tensor in module.state_dict(keep_vars=True).values()}
    for key, tensor in module.state_dict(keep_vars=True).items():
        own[id(tensor)].add(f"{prefix}{key}")
    inside = tuple(f"{prefix}{name}." for name in stacks)
    # tied tensors are saved once
    return any(
        not keys & state_dict.keys() and not any(key.startswith(inside) for key in keys) for keys in own.values()
    )


def places_for(
    stack: Stack, blocks: Mapping[int, Mapping[str, Tensor]], likely: Sequence[Sequence[int]] = ()
) -> list[int] | None:
    """Blocks of the stack, in order, that have the shapes of those in the checkpoint; None if there are not enough.

    Those that a record names, if they fit; else the first ones that do.
    """
    shapes = [{key: tuple(value.shape) for key, value in block.state_dict().items()} for block in stack.blocks]
    wanted = [{key: tuple(value.shape) for key, value in blocks[index].items()} for index in range(len(blocks))]
    for places in likely:
        if [shapes[place] for place in places] == wanted:
            return list(places)
    places = []
    for shape in wanted:
        start = places[-1] + 1 if places else 0
        place = next((i for i in range(start, len(stack)) if shapes[i] == shape), None)
        if place is None:
            return None
        places.append(place)
    return places
