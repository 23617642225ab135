"""Most of transformers: stacks are lists of blocks, and the setting that counts them is found by trying (`search`).

Blocks that no setting counts are a stack too, if they are plainly such: they can be dropped (model type
"deeparc_pruned").
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .base import Container, Family, Stack, chained, nested, register, signature_pins
from .entries import follow
from .hosts import Host, TransformersHost
from .search import CHAIN, Search, are_stages, containers, inside, shrink_stages, uncounted


@register("auto")
class Auto(Family):
    summary = "any transformers model whose layers sit in lists, counted by a config entry or not"
    priority = 0

    def matches(self, host: Host) -> bool:
        return isinstance(host, TransformersHost)

    def stacks(self, host: Host) -> list[Stack]:
        settings = host.settings()
        try:
            skeleton = host.build(settings)
        except Exception as error:
            raise UnsupportedModelError(
                f"{host.label} cannot be rebuilt from its own config, so a pruned one could not be "
                f"loaded either: {type(error).__name__}: {error}. Give the class an __init__(config) that needs "
                "nothing else."
            ) from error
        lists = list(containers(host.root))
        found, reasons = _counted(Search(host, settings, skeleton), lists)
        others = [(name, blocks) for name, blocks in lists if reasons.get(name) != CHAIN]
        if host.can_drop:
            plain = uncounted(others, found)
            found |= {stack.name: replace(stack, uncounted=reasons.get(stack.name, "")) for stack in plain}
        if not found:
            what = "no list of residual layers"
            if reasons:
                near = [_shown(name, blocks, reasons.get(name, "")) for name, blocks in lists[:3]]
                what = f"{'; '.join(near)}, but no entry of its config counts these blocks alone"
            raise UnsupportedModelError(_nothing_found(host, what))
        stacks = [replace(found[name], side=_side(host.root, name)) for name, _ in lists if name in found]
        return [stack for _, stages in itertools.groupby(stacks, _counter) for stack in chained(list(stages))]

    def shrink(self, settings: dict[str, Any], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> None:
        for stack in stacks:
            indices = list(kept[stack.name])
            if len(indices) == len(stack):
                continue
            for entry in stack.entries:
                if entry.proof != "none":
                    follow(settings, entry, len(stack), indices)
            if stack.count is not None and stack.count.index is None:
                shrink_stages(nested(settings, stack.count.path), len(stack), indices)
        super().shrink(settings, stacks, kept)


def _shown(name: str, blocks: Container, reason: str) -> str:
    return f"{name} ({len(blocks)} x {type(blocks[0]).__name__})" + (f": {reason}" if reason else "")


def _counted(search: Search, lists: Sequence[tuple[str, Container]]) -> tuple[dict[str, Stack], dict[str, str]]:
    """The stacks that an entry of the config counts, and of each other list why none counts it, if that is known."""
    found: dict[str, Stack] = {}
    reasons: dict[str, str] = {}
    for name, blocks in lists:
        if inside(name, found):
            continue  # part of a block
        count, entries, per_block, reason = search.count(name, len(blocks))
        if count is not None and are_stages(
            name, lists, lambda path, blocks: search.count(path, len(blocks)).count is not None
        ):
            count, reason = None, "they hold lists of blocks themselves"
        if count is None:
            reasons[name] = reason
            continue
        pinned = {} if any(entry.proof == "build" for entry in entries) else signature_pins(list(blocks))
        found[name] = Stack(name, blocks, pinned, count=count, entries=entries, per_block=per_block)
    return found, reasons


def _counter(stack: Stack) -> tuple[Any, ...]:
    """The entry that counts a stack; stages that one list counts feed each other."""
    count = stack.count
    return (stack.name,) if count is None or count.index is None else (*count.path, count.key)


def _side(root: nn.Module, name: str) -> str | None:
    if not root.config.is_encoder_decoder:
        return None
    return "decoder" if "decoder" in name.split(".") else "encoder"


def _nothing_found(host: Host, what: str) -> str:
    return (
        f"{host.label} cannot be pruned by layers: found {what}. If its blocks can be removed and its "
        "config can say so, add a family: one file, see 'add a family' in CONTRIBUTING.md."
    )
