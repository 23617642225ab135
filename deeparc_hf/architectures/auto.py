"""Most of transformers: stacks are lists of alike layers, and the setting that counts them is found by trying.

A candidate is an `nn.ModuleList` whose members are all `GradientCheckpointingLayer`s (every current transformers model) or
all of one class named ...Layer or ...Block (older ones, such as MPNet). It is a stack if lowering one setting by one
makes a stock build of the model lose exactly one of its blocks and change nothing else. So no table of families or of
config keys is needed, and a list that the config cannot shorten is never taken for a stack.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedModelError
from .base import CountKey, Family, Stack, register, set_count, signature_pins
from .hosts import Host, TransformersHost
from .skeleton import state_shapes

_COUNT_NAME = re.compile(r"layer|depth|block")
_LIST_NAME = re.compile(r"layer|block|types")


@register("auto")
class Auto(Family):
    summary = "any transformers model whose layers sit in a ModuleList and are counted by a config entry"
    priority = 0

    def matches(self, host: Host) -> bool:
        return isinstance(host, TransformersHost)

    def stacks(self, host: Host) -> list[Stack]:
        candidates = list(_candidates(host.root))
        if not candidates:
            raise UnsupportedModelError(_nothing_found(host, "no list of residual layers"))
        settings = host.settings()
        try:
            skeleton = state_shapes(host.build(settings))
        except Exception as error:
            raise UnsupportedModelError(
                f"{host.label} cannot be rebuilt from its own config, so a pruned one could not be "
                f"loaded either: {type(error).__name__}: {error}. Give the class an __init__(config) that needs nothing else."
            ) from error
        stacks = []
        for name, container in candidates:
            count = _find_count(host, settings, skeleton, name, len(container))
            if count is None:
                continue
            blocks = list(container)
            pinned = {} if _per_layer_lists(_holder(settings, count), len(blocks)) else signature_pins(blocks)
            stacks.append(Stack(name, container, pinned, _side(host.root, name), count))
        if not stacks:
            lists = ", ".join(f"{name} ({len(container)} x {type(container[0]).__name__})" for name, container in candidates)
            raise UnsupportedModelError(_nothing_found(host, f"{lists}, but no entry of its config counts these blocks"))
        return [
            dataclasses.replace(stack, next_stack=follower.name) if _same_list(stack.count, follower.count) else stack
            for stack, follower in itertools.pairwise(stacks)
        ] + stacks[-1:]

    def shrink(self, settings: dict[str, Any], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> None:
        for stack in stacks:
            indices = list(kept[stack.name])
            holder = _holder(settings, stack.count)
            for key in _per_layer_lists(holder, len(stack)):
                holder[key] = [holder[key][i] for i in indices]
            _shrink_stages(holder, len(stack), indices)
        super().shrink(settings, stacks, kept)


def _candidates(root: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    outer: list[str] = []
    for name, module in root.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or any(name.startswith(f"{o}.") for o in outer):
            continue
        classes = {type(member) for member in module}
        modern = all(issubclass(cls, GradientCheckpointingLayer) for cls in classes)
        classic = len(classes) == 1 and next(iter(classes)).__name__.endswith(("Layer", "Block"))
        if modern or classic:
            outer.append(name)
            yield name, module


def _find_count(host: Host, settings: dict[str, Any], shapes: dict[str, tuple[int, ...]], name: str, length: int) -> CountKey | None:
    """The setting whose change by one changes the length of this stack by one, and nothing else."""
    step = -1 if length > 1 else 1
    for count in _count_candidates(settings, length):
        trial = copy.deepcopy(settings)
        holder = _holder(trial, count)
        for key in _per_layer_lists(holder, length):
            holder[key] = holder[key][:-1] if step < 0 else [*holder[key], holder[key][-1]]
        _shrink_stages(holder, length, list(range(length + step)))
        set_count(holder, count, length + step)
        try:
            built = state_shapes(host.build(trial))
        except Exception:  # noqa: S112 - a setting that cannot be changed alone is not the one that counts
            continue
        fewer, more, last = (built, shapes, length - 1) if step < 0 else (shapes, built, length)
        rest = {key: shape for key, shape in more.items() if not key.startswith(f"{name}.{last}.")}
        if rest == fewer and len(rest) < len(more):
            return count
    return None


def _count_candidates(settings: dict[str, Any], length: int, path: tuple[str, ...] = ()) -> Iterator[CountKey]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _count_candidates(value, length, (*path, key))
        elif isinstance(key, str) and _COUNT_NAME.search(key):
            if type(value) is int and value == length:
                yield CountKey(path, key)
            elif isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
                yield from (CountKey(path, key, index) for index, item in enumerate(value) if item == length)


def _holder(settings: dict[str, Any], count: CountKey | None) -> dict[str, Any]:
    holder = settings
    for part in count.path if count else ():
        holder = holder[part]
    return holder


def _per_layer_lists(holder: dict[str, Any], length: int) -> list[str]:
    """Entries with one value per layer, such as `layer_types`; they lose the same indices as the stack."""
    return [k for k, v in holder.items() if isinstance(v, (list, tuple)) and len(v) == length and _LIST_NAME.search(k)]


def _shrink_stages(holder: dict[str, Any], length: int, kept: Sequence[int]) -> None:
    """Vision backbones name the stem and every layer a stage and give some of them out; drop the removed layers' stages."""
    names, out = holder.get("stage_names"), holder.get("out_indices")
    if not isinstance(names, (list, tuple)) or len(names) != length + 1:
        return
    holder.pop("stage_names")
    holder.pop("out_features", None)
    if out is not None:
        # stage i is the output of block i - 1: the nearest kept block before it takes over
        holder["out_indices"] = sorted({sum(k < stage % (length + 1) for k in kept) for stage in out})


def _same_list(count: CountKey | None, following: CountKey | None) -> bool:
    """Whether two stacks are stages counted by the same list, and so feed each other."""
    return bool(count and following and count.index is not None and (count.path, count.key) == (following.path, following.key))


def _side(root: nn.Module, name: str) -> str | None:
    if not root.config.is_encoder_decoder:
        return None
    return "decoder" if "decoder" in name.split(".") else "encoder"


def _nothing_found(host: Host, what: str) -> str:
    return (
        f"{host.label} cannot be pruned by layers: found {what}. If its blocks can be removed and its "
        "config can say so, add a family: one file, see 'add a family' in CONTRIBUTING.md."
    )
