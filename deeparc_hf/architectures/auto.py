"""Most of transformers: stacks are lists of alike layers, and the setting that counts them is found by trying.

A candidate is an `nn.ModuleList` whose members are all `GradientCheckpointingLayer`s (every current transformers model)
or all of one class named ...Layer or ...Block (older ones, such as MPNet). It is a stack if lowering one setting by one
makes a stock build of the model lose exactly one of its blocks and change nothing else, where the lists with a value
per block lose one with it (`entries`). So no table of families or of config keys is needed, and a list that the config
cannot shorten is never taken for a stack.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedModelError
from .base import BlockEntry, CountKey, Family, Stack, nested, register, signature_pins
from .entries import StockBuilds, entries_of, follow, names_stages, usual
from .hosts import Host, TransformersHost
from .layout import Layout
from .skeleton import state_shapes

_COUNT_NAME = re.compile(r"layer|depth|block")


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
            skeleton = host.build(settings)
        except Exception as error:
            raise UnsupportedModelError(
                f"{host.label} cannot be rebuilt from its own config, so a pruned one could not be "
                f"loaded either: {type(error).__name__}: {error}. Give the class an __init__(config) that needs "
                "nothing else."
            ) from error
        search = _Search(host, settings, skeleton)
        stacks = []
        for name, container in candidates:
            found = search.count(name, len(container))
            if found is None:
                continue
            count, entries = found
            pinned = {} if any(entry.proof == "build" for entry in entries) else signature_pins(list(container))
            stacks.append(Stack(name, container, pinned, _side(host.root, name), count, entries=entries))
        if not stacks:
            lists = ", ".join(
                f"{name} ({len(container)} x {type(container[0]).__name__})" for name, container in candidates
            )
            why = "; ".join(f"{name}: {reason}" for name, reason in search.near.items())
            what = f"{lists}, but no entry of its config counts these blocks" + (f" alone ({why})" if why else "")
            raise UnsupportedModelError(_nothing_found(host, what))
        return [
            dataclasses.replace(stack, next_stack=follower.name) if _same_list(stack.count, follower.count) else stack
            for stack, follower in itertools.pairwise(stacks)
        ] + stacks[-1:]

    def shrink(self, settings: dict[str, Any], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> None:
        for stack in stacks:
            indices = list(kept[stack.name])
            for entry in stack.entries:
                if entry.proof != "none":
                    follow(settings, entry, len(stack), indices)
            _shrink_stages(nested(settings, stack.count.path if stack.count else ()), len(stack), indices)
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


class _Search:
    """The search for what counts the stacks of a model, and for what else names their blocks.

    Args:
        host: the model.
        settings, skeleton: its settings, and what a stock loader builds of them.

    Attributes:
        near: by stack, why an entry that changes the number of its blocks does not count them.
    """

    def __init__(self, host: Host, settings: dict[str, Any], skeleton: nn.Module) -> None:
        self.host, self.settings, self.skeleton = host, settings, skeleton
        self.near: dict[str, str] = {}
        self._shapes = state_shapes(skeleton)
        self._shapes_with = functools.cache(self._build)  # each choice of entries asks for some builds again

    def count(self, name: str, length: int) -> tuple[CountKey, tuple[BlockEntry, ...]] | None:
        """The setting that counts this stack's blocks and nothing else, and the stack's entries."""
        for count in _count_candidates(self.settings, length):
            entries = entries_of(self.settings, count, length)
            for following in _choices(entries, count):
                verdict = self._try(name, length, count, following)
                if verdict == "other":
                    break  # a list more or less would not make it count these blocks
                proven = self._proven(name, length, count, entries, following) if verdict == "counts" else None
                if proven is not None:
                    return count, tuple(proven)
        return None

    def _try(
        self, name: str, length: int, count: CountKey, following: Sequence[BlockEntry]
    ) -> Literal["counts", "other", "unclear"]:
        """Whether the count changes this stack alone, where these entries follow; "other": it does not change it."""
        if length == 1:
            removals: list[tuple[int, ...]] = [(0, 0)]  # one more
        else:
            # a list may not end as it likes (Gemma 4's last layer attends to everything)
            removals = [tuple(range(length - 1)), *([tuple(range(1, length))] if following else [])]
        for kept in removals:
            built = self._shapes_with(count, tuple(following), length, kept)
            if built is None:
                continue
            expected, found = (self._shapes, built) if length > 1 else (built, self._shapes)
            layout = Layout({name: max(length, 2)}, {name: kept if length > 1 else (0,)})
            renamed = layout.renamed_keys(expected)
            if renamed == found and len(found) < len(expected):
                return "counts"
            blocks = {key[len(name) + 1 :].partition(".")[0] for key in built if key.startswith(f"{name}.")}
            if len(blocks) != len(kept):
                return "other"
            odd = sorted(key for key in renamed.keys() | found.keys() if renamed.get(key) != found.get(key))
            self.near.setdefault(name, f"{count} counts them, but {odd[0] if odd else 'nothing'} changes with it")
        return "unclear"

    def _build(
        self, count: CountKey, following: tuple[BlockEntry, ...], length: int, kept: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]] | None:
        """Shapes of a stock build with these blocks; None if there is none."""
        trial = copy.deepcopy(self.settings)
        for entry in following:
            follow(trial, entry, length, kept)
        _shrink_stages(nested(trial, count.path), length, kept)
        count.write(trial, len(kept))
        try:
            return state_shapes(self.host.build(trial))
        except Exception:
            return None  # a setting that cannot be changed so is not the one that counts

    def _proven(
        self, name: str, length: int, count: CountKey, entries: Sequence[BlockEntry], following: Sequence[BlockEntry]
    ) -> list[BlockEntry] | None:
        """The entries that name blocks of the stack, with proof; None if one that must follow is not read by block."""
        known = usual(entries, count)
        stock = StockBuilds(self.host.build, self.settings, self.skeleton, name, length, count)
        proven = []
        for entry in entries:
            if entry in known and entry in following and entry.form != "indices":
                proven.append(entry.proven("build"))
                continue
            found = stock.classified(entry)
            rest = [other for other in following if other is not entry]
            if entry in following and (found is None or found.proof == "none"):
                if self._try(name, length, count, rest) != "counts":
                    # no shorter model without it, but neighbours read it too: a chain of sizes, no residual blocks
                    return None
            elif found is not None:
                built = found.proof == "build"
                unfit = built and self._try(name, length, count, [*rest, entry]) != "counts"
                proven.append(entry.proven("none") if unfit else found)
        return proven


def _choices(entries: Sequence[BlockEntry], count: CountKey) -> Iterator[list[BlockEntry]]:
    """Which entries to have follow: the usual ones; all lists of values too; the usual ones and one more, or less."""
    known = usual(entries, count)
    others = [entry for entry in entries if entry.form == "values" and entry not in known]
    yield known
    if len(others) > 1:
        yield known + others
    for other in others:
        yield [*known, other]
    for entry in known:
        yield [other for other in known if other is not entry]


def _count_candidates(settings: dict[str, Any], length: int, path: tuple[str, ...] = ()) -> Iterator[CountKey]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _count_candidates(value, length, (*path, key))
        elif isinstance(key, str) and _COUNT_NAME.search(key):
            if type(value) is int and value == length:
                yield CountKey(path, key)
            elif isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
                yield from (CountKey(path, key, index) for index, item in enumerate(value) if item == length)


def _shrink_stages(holder: dict[str, Any], length: int, kept: Sequence[int]) -> None:
    """Drop removed layers' stages: vision backbones name the stem and every layer one, and give out some of them."""
    if not names_stages(holder, length):
        return
    out = holder.get("out_indices")
    holder.pop("stage_names")
    holder.pop("out_features", None)
    if out is not None:
        # stage i is the output of block i - 1: the nearest kept block before it takes over
        holder["out_indices"] = sorted({sum(k < stage % (length + 1) for k in kept) for stage in out})


def _same_list(count: CountKey | None, following: CountKey | None) -> bool:
    """Whether two stacks are stages counted by the same list, and so feed each other."""
    return bool(
        count and following and count.index is not None and (count.path, count.key) == (following.path, following.key)
    )


def _side(root: nn.Module, name: str) -> str | None:
    if not root.config.is_encoder_decoder:
        return None
    return "decoder" if "decoder" in name.split(".") else "encoder"


def _nothing_found(host: Host, what: str) -> str:
    return (
        f"{host.label} cannot be pruned by layers: found {what}. If its blocks can be removed and its "
        "config can say so, add a family: one file, see 'add a family' in CONTRIBUTING.md."
    )
