"""Most of transformers: stacks are lists of alike layers, and the setting that counts them is found by trying.

A candidate is an `nn.ModuleList` of `GradientCheckpointingLayer`s, or of one class named ...Layer or ...Block (MPNet).
It is a stack if lowering one setting by one makes a stock build of the model lose exactly one of its blocks and change
nothing else, where the lists with a value per block lose one with it (`entries`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import UnsupportedModelError
from .base import BlockEntry, CountKey, Family, Stack, chained, nested, register, signature_pins
from .entries import asked_for, entries_of, follow, named, names_stages, trials, usual
from .hosts import Host, TransformersHost
from .layout import Layout
from .skeleton import differing, state_shapes

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
        stacks, near = [], []
        for name, container in candidates:
            search = _Search(host, settings, skeleton, name, len(container))
            found = search.count()
            if search.near:
                near.append(f"{name}: {search.near}")
            if found is None:
                continue
            count, entries = found
            pinned = {} if any(entry.proof == "build" for entry in entries) else signature_pins(list(container))
            stacks.append(Stack(name, container, pinned, _side(host.root, name), count, entries=entries))
        if not stacks:
            lists = ", ".join(
                f"{name} ({len(container)} x {type(container[0]).__name__})" for name, container in candidates
            )
            what = f"{lists}, but no entry of its config counts these blocks"
            what += f" alone ({'; '.join(near)})" if near else ""
            raise UnsupportedModelError(_nothing_found(host, what))
        return [stack for _, stages in itertools.groupby(stacks, _counter) for stack in chained(list(stages))]

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
    """The search for what counts a stack, and for what else names its blocks."""

    def __init__(self, host: Host, settings: dict[str, Any], skeleton: nn.Module, name: str, length: int) -> None:
        self.host, self.settings, self.skeleton, self.name, self.length = host, settings, skeleton, name, length
        self.near = ""  # why an entry that changes the number of the blocks does not count them
        self._shapes = state_shapes(skeleton)
        self._shapes_with = functools.cache(self._build)  # each choice of entries asks for some builds again

    def count(self) -> tuple[CountKey, tuple[BlockEntry, ...]] | None:
        """The setting that counts this stack's blocks and nothing else, and the stack's entries."""
        for count in _count_candidates(self.settings, self.length):
            entries = entries_of(self.settings, count, self.length)
            for following in _choices(entries, count):
                verdict = self._try(count, following)
                if verdict == "other":
                    break  # a list more or less would not make it count these blocks
                proven = self._proven(count, entries, following) if verdict == "counts" else None
                if proven is not None:
                    return count, tuple(proven)
        return None

    def _try(self, count: CountKey, following: Sequence[BlockEntry]) -> Literal["counts", "other", "unclear"]:
        """Whether the count changes this stack alone, where these entries follow; "other": it does not change it."""
        name, length = self.name, self.length
        if length == 1:
            removals: list[tuple[int, ...]] = [(0, 0)]  # one more
        else:
            # a list may not end as it likes (Gemma 4's last layer attends to everything)
            removals = [tuple(range(length - 1)), *([tuple(range(1, length))] if following else [])]
        for kept in removals:
            built = self._shapes_with(count, tuple(following), kept)
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
            self.near = self.near or f"{count} counts them, but {odd[0] if odd else 'nothing'} changes with it"
        return "unclear"

    def _build(
        self, count: CountKey, following: tuple[BlockEntry, ...], kept: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]] | None:
        """Shapes of a stock build with these blocks; None if there is none."""
        trial = copy.deepcopy(self.settings)
        for entry in following:
            follow(trial, entry, self.length, kept)
        _shrink_stages(nested(trial, count.path), self.length, kept)
        count.write(trial, len(kept))
        try:
            return state_shapes(self.host.build(trial))
        except Exception:
            return None  # a setting that cannot be changed so is not the one that counts

    def _proven(
        self, count: CountKey, entries: Sequence[BlockEntry], following: Sequence[BlockEntry]
    ) -> list[BlockEntry] | None:
        """The entries that name blocks of the stack, with proof; None if one that must follow is not read by block."""
        known = usual(entries, count)
        proven = []
        for entry in entries:
            if entry in known and entry in following and entry.form != "indices":
                proven.append(replace(entry, proof="build"))
                continue
            proof = self._proof(count, entry)
            rest = [other for other in following if other is not entry]
            if entry in following and proof in (None, "none"):
                if self._try(count, rest) != "counts":
                    # no shorter model without it, but neighbours read it too: a chain of sizes, no residual blocks
                    return None
            elif proof is not None:
                unfit = proof == "build" and self._try(count, [*rest, entry]) != "counts"
                proven.append(replace(entry, proof="none" if unfit else proof))
        return proven

    def _proof(self, count: CountKey, entry: BlockEntry) -> Literal["build", "run", "none"] | None:
        """What shows that the entry names blocks of this stack; None if it does not."""
        tried = (self._readers(entry, *trial) for trial in trials(self.settings, entry, self.length))
        readers = next((found for found in tried if found != "unknown"), "unknown")
        known = bool(usual([entry], count))
        if readers == "own" or (readers == "others" and known):
            # where blocks next to it read it too (a cache that is shared), the comparison of skeletons judges the
            # removal
            return "build"
        if readers in ("others", "outside"):
            return None
        asked = readers == "repeated" or asked_for(self.skeleton, entry.path[-1])
        if entry.form == "values":
            # all alike, it does not matter which of them go
            values = entry.read(self.settings)
            told = asked and entry.path[:-1] == count.path and any(v != values[0] for v in values)
            return "none" if told else None
        if known:
            return "run" if asked else "build"
        return "none" if asked and named(entry) else None

    def _readers(
        self, entry: BlockEntry, value: Any, blocks: set[int]
    ) -> Literal["own", "others", "outside", "repeated", "nobody", "unknown"]:
        """Where a stock build differs when the entry has another value.

        "own": in these blocks alone. "others": in other blocks too. "outside": outside of the stack. "repeated": only
        in attributes that hold the whole entry, which a forward pass may ask. "nobody": nowhere. "unknown": there is no
        such build.
        """
        trial = copy.deepcopy(self.settings)
        old = entry.read(trial)
        entry.write(trial, value)
        try:
            built = self.host.build(trial)
        except Exception:
            return "unknown"
        found = differing(self.skeleton, built, lambda a, b: _same(a, old) and _same(b, value))
        start = f"{self.name}."
        inside = [path.removeprefix(start).partition(".")[0] for path in found if path.startswith(start)]
        if inside:
            return "own" if all(index.isdigit() and int(index) in blocks for index in inside) else "others"
        if found:
            return "outside"
        return "repeated" if differing(self.skeleton, built) else "nobody"


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


def _counter(stack: Stack) -> tuple[Any, ...]:
    """The entry that counts a stack; stages that one list counts feed each other."""
    count = stack.count
    return (stack.name,) if count is None or count.index is None else (*count.path, count.key)


def _side(root: nn.Module, name: str) -> str | None:
    if not root.config.is_encoder_decoder:
        return None
    return "decoder" if "decoder" in name.split(".") else "encoder"


def _same(attribute: Any, value: Any) -> bool:
    """Whether an attribute holds a whole list or dict, be it as a tuple."""
    one, other = (list(held) if isinstance(held, tuple) else held for held in (attribute, value))
    return isinstance(one, (list, dict)) and one == other


def _nothing_found(host: Host, what: str) -> str:
    return (
        f"{host.label} cannot be pruned by layers: found {what}. If its blocks can be removed and its "
        "config can say so, add a family: one file, see 'add a family' in CONTRIBUTING.md."
    )
