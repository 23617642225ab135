"""The search for what counts a stack: an entry is lowered, and a build shows which blocks are gone.

A list of blocks is a stack if lowering one entry by one makes a stock build of the model lose exactly one of its blocks
and change nothing else, where the entries that name its blocks lose one with it (`entries`).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.block_paths import is_inside, lists_of, place_in
from .base import BlockEntry, Container, CountKey, Stack, block_shapes, nested, signature_pins
from .entries import asked_for, entries_of, follow, named, names_stages, trials, usual
from .hosts import Host
from .layout import Layout
from .per_block import PerBlockTensor, find_per_block
from .skeleton import differing, state_shapes

__all__ = ["CHAIN", "Search", "are_stages", "containers", "inside", "shrink_stages", "uncounted"]

_COUNT_NAME = re.compile(r"layer|depth|block")
CHAIN = "they are a chain in which each size leads to the next, so none can be left out"
_BLOCK_NAME = re.compile(r"(Layer|Block)$")
_NO_COUNT = re.compile(r"token|label|stage|^out_(indices|features)$")
_REMEMBERED = 64  # shapes of builds

Shapes = dict[str, tuple[int, ...]]


def containers(root: nn.Module, *, mixed: bool = False) -> Iterator[tuple[str, Container]]:
    """Lists of modules that may be blocks, with their paths; what stands in others comes after them.

    Args:
        mixed: whether others may stand among them (a convolution that leads into a stage), and one list of lists is
            enough.
    """
    for name, module in root.named_modules():
        if not name or not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        members = list(module.children())
        if len(members) != len(module):
            continue  # one is None
        made_of_parts = [member for member in members if any(True for _ in member.children())]
        if mixed:
            members = made_of_parts
        if _may_be_blocks(members, least=1 if mixed else 3):
            yield name, module


def _may_be_blocks(members: list[nn.Module], least: int) -> bool:
    """Whether modules may be the blocks of one stack: each made of parts and no list itself (or all of them lists that
    are alike, and not less than `least`), most of one class.
    """
    if not members or not all(any(True for _ in member.children()) for member in members):
        return False
    classes = [type(member) for member in members]
    if any(cls in (nn.ModuleList, nn.Sequential, nn.ModuleDict) for cls in classes):
        shapes = block_shapes(members)  # stages differ, ConvMixer's blocks do not
        return len(members) >= least and all(shape == shapes[0] for shape in shapes)
    alike = max(classes.count(cls) for cls in set(classes)) * 2 >= len(members)
    return alike or all(issubclass(cls, GradientCheckpointingLayer) for cls in classes)


def uncounted(
    lists: Sequence[tuple[str, Container]], counted: Mapping[str, Stack], names: re.Pattern[str] = _BLOCK_NAME
) -> Iterator[Stack]:
    """Lists of blocks that no entry counts, which stand beside those that are counted.

    Args:
        names: what the class of the blocks is called.
    """
    found: list[str] = []
    for name, blocks in lists:
        holds = any(stack.startswith(f"{name}.") for stack in counted)
        if not holds and not inside(name, [*counted, *found]) and _are_plainly_blocks(list(blocks), names):
            found.append(name)
            yield Stack(name, blocks, _pins(list(blocks)))


def _pins(members: list[nn.Module]) -> dict[int, str]:
    """Blocks that no entry counts which must stay: those that change the shape of what they are given."""
    if all(hasattr(member, "has_skip") for member in members):  # timm's inverted residual blocks
        why = "has no shortcut past it: it may change the shape of its input"
        return {index: why for index, member in enumerate(members) if not member.has_skip}
    return signature_pins(members, in_turn=False)  # no build shows which of them go together


def are_stages(name: str, lists: Sequence[tuple[str, Container]], is_counted: Callable[[str, Container], bool]) -> bool:
    """Whether members of a list hold lists of blocks that are counted by themselves."""
    inner = [(path, blocks) for path, blocks in lists if path.startswith((f"{name}.0.", f"{name}.1."))]
    return any(is_counted(path, blocks) for path, blocks in inner)


def inside(name: str, stacks: Iterable[str]) -> bool:
    """Whether a list is one of a stack's, or in its blocks."""
    return any(name in lists_of(stack) or is_inside(stack, name) for stack in stacks)


def _are_plainly_blocks(members: list[nn.Module], names: re.Pattern[str]) -> bool:
    """Whether modules that no setting counts are blocks all the same, and at least two of them alike."""
    modern = all(isinstance(member, GradientCheckpointingLayer) or hasattr(member, "has_skip") for member in members)
    named = {type(member) for member in members} == {type(members[0])} and names.search(type(members[0]).__name__)
    free = len(members) - len(_pins(members))
    return len(members) > 1 and free > 1 and bool(modern or named)


class Counted(NamedTuple):
    """What counts a stack.

    Attributes:
        count: the entry; None if there is none.
        entries: those that name its blocks.
        per_block: tensors outside of it that have a part for each block.
        reason: where an entry nearly counts it, why not.
    """

    count: CountKey | None = None
    entries: tuple[BlockEntry, ...] = ()
    per_block: tuple[PerBlockTensor, ...] = ()
    reason: str = ""


class Search:
    """Looks for the entry that counts a stack, and for those that name its blocks, in the settings of one model.

    Args:
        host: the model.
        settings: those to start from. A build of them must be what the model is.
        skeleton: that build.
    """

    def __init__(self, host: Host, settings: dict[str, Any], skeleton: nn.Module) -> None:
        self.host, self.settings, self.skeleton = host, settings, skeleton
        self._shapes = state_shapes(skeleton)
        self._built: dict[str, Shapes | None] = {}

    def count(self, name: str, length: int, keys: Sequence[CountKey] | None = None) -> Counted:
        """The entry that counts a stack's blocks and nothing else, and the entries that name its blocks.

        Args:
            name: path of the list of blocks.
            length: how many there are.
            keys: entries that may count them; default: all whose value is this number, the likely ones first.
        """
        attempt = _Attempt(self, name, length)
        for count in self._candidates(name, length) if keys is None else keys:
            entries = self._entries(name, length, count) if keys is not None or not count.fixed else []
            for following in _choices(entries, count):
                verdict = attempt.judge(count, following)
                if verdict == "other":
                    break  # a list more or less would not make it count these blocks
                proven = attempt.proven(count, entries, following) if verdict == "counts" else None
                if proven is not None:
                    return Counted(count, tuple(proven), attempt.per_block)
                if verdict == "counts":
                    return Counted(reason=CHAIN)
        return Counted(reason=attempt.near)

    def _entries(self, name: str, length: int, count: CountKey) -> list[BlockEntry]:
        """Entries that may name these blocks."""
        return [entry for entry in entries_of(self.settings, count, length) if not _of_other_side(entry, name)]

    def _candidates(self, name: str, length: int) -> list[CountKey]:
        """Entries that may count these blocks, the likely ones first."""
        kinds = block_shapes(list(self.skeleton.get_submodule(name).children()))
        more = [] if all(kind == kinds[0] for kind in kinds) else _with_others(self.settings, length)
        return _count_candidates(self.settings, length) + more

    def shapes(self, settings: dict[str, Any]) -> Shapes | None:
        """Shapes of a build of other settings; None if there is none."""
        key = json.dumps(settings, sort_keys=True, default=repr)
        if key not in self._built:
            try:
                found = state_shapes(self.host.build(settings))
            except Exception:
                found = None  # a setting that cannot be changed so is not the one that counts
            if len(self._built) >= _REMEMBERED:
                self._built.pop(next(iter(self._built)))
            self._built[key] = found
        return self._built[key]


class _Attempt:
    """The search for one list of blocks."""

    def __init__(self, search: Search, name: str, length: int) -> None:
        self.search, self.name, self.length = search, name, length
        self.settings, self.skeleton = search.settings, search.skeleton
        self.near = ""  # why an entry that changes the number of the blocks does not count them
        self.per_block: tuple[PerBlockTensor, ...] = ()

    def judge(self, count: CountKey, following: Sequence[BlockEntry]) -> Literal["counts", "other", "unclear"]:
        """Whether the count changes this stack alone, where these entries follow; "other": it does not change it."""
        name, length, shapes = self.name, self.length, self.search._shapes
        # the last block, or the first, may be of another kind (Gemma 4's last layer attends to everything): then one
        # between them shows it
        first = [range(start, start + count.each) for start in (length - count.each, 0, count.each)]
        removals = [tuple(i for i in range(length) if i not in gone) for gone in first[: length // count.each]]
        for kept in [(0, 0)] if length == 1 else removals:  # of one block: one more
            built = self.search.shapes(self._without(count, following, kept))
            if built is None:
                continue
            expected, found = (shapes, built) if length > 1 else (built, shapes)
            layout = Layout({name: max(length, 2)}, {name: kept if length > 1 else (0,)})
            renamed = layout.renamed_keys(expected)
            self.per_block = self._shortened(renamed, found, len(kept))
            renamed |= {tensor.path: found[tensor.path] for tensor in self.per_block}
            if renamed == found and len(found) < len(expected):
                return "counts"
            blocks = {place[0] for key in built if (place := place_in(name, key)) is not None}
            if len(blocks) != len(kept):
                return "other"
            odd = sorted(key for key in renamed.keys() | found.keys() if renamed.get(key) != found.get(key))
            self.near = self.near or f"{count} counts them, but {odd[0] if odd else 'nothing'} changes with it"
        return "unclear"

    def _shortened(self, whole: Shapes, found: Shapes, left: int) -> tuple[PerBlockTensor, ...]:
        """Tensors outside of the stack that have a part for each of its blocks."""
        if self.length == 1:
            return ()
        outside = {path: shape for path, shape in whole.items() if not is_inside(self.name, path)}
        return tuple(find_per_block(outside, found, self.length, left))

    def _without(self, count: CountKey, following: Sequence[BlockEntry], kept: Sequence[int]) -> dict[str, Any]:
        """The settings with these blocks only."""
        trial = copy.deepcopy(self.settings)
        for entry in following:
            follow(trial, entry, self.length, kept)
        if count.index is None:
            shrink_stages(nested(trial, count.path), self.length, kept)
        count.write(trial, kept)
        return trial

    def proven(
        self, count: CountKey, entries: Sequence[BlockEntry], following: Sequence[BlockEntry]
    ) -> list[BlockEntry] | None:
        """The entries that name blocks of the stack, with proof; None if one that must follow is not read by block."""
        known = usual(entries, count)
        proven = []
        for entry in entries:
            if entry.path == (*count.path, count.key):
                proven.append(replace(entry, proof="build"))  # its length is the number of blocks
                continue
            if entry in known and entry in following and entry.form not in ("indices", "first", "last"):
                proven.append(replace(entry, proof="build"))
                continue
            proof = self._proof(count, entry)
            rest = [other for other in following if other is not entry]
            if entry in following and proof in (None, "none"):
                if self.judge(count, rest) != "counts":
                    # no shorter model without it, but neighbours read it too: a chain of sizes, no residual blocks
                    return None
            elif proof is not None:
                unfit = proof == "build" and self.judge(count, [*rest, entry]) != "counts"
                proven.append(replace(entry, proof="none" if unfit else proof))
        return proven

    def _proof(self, count: CountKey, entry: BlockEntry) -> Literal["build", "run", "none"] | None:
        """What shows that the entry names blocks of this stack; None if it does not."""
        tried = (self._readers(entry, *trial) for trial in trials(self.settings, entry, self.length))
        readers = next((found for found in tried if found != "unknown"), "unknown")
        if entry.form in ("first", "last"):
            return "build" if readers == "own" else None
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
            built = self.search.host.build(trial)
        except Exception:
            return "unknown"
        found = differing(self.skeleton, built, lambda a, b: _same(a, old) and _same(b, value))
        inside = [place_in(self.name, path) for path in found if is_inside(self.name, path)]
        if inside:
            return "own" if all(place is not None and place[0] in blocks for place in inside) else "others"
        if found:
            return "outside"
        return "repeated" if differing(self.skeleton, built) else "nobody"


def _of_other_side(entry: BlockEntry, stack: str) -> bool:
    """Whether an entry says that it is of the encoder and the stack is the decoder's, or the other way round (RT-DETR's
    encode_proj_layers).
    """
    sides = [{side for side in ("encode", "decode") if side in told} for told in (entry.path[-1], stack)]
    return all(len(side) == 1 for side in sides) and sides[0] != sides[1]


def _choices(entries: Sequence[BlockEntry], count: CountKey) -> Iterator[list[BlockEntry]]:
    """Which entries to have follow: the usual ones; all lists of values too; the usual ones and one more, or less."""
    own = [entry for entry in entries if entry.path == (*count.path, count.key)]
    known = [entry for entry in usual(entries, count) if entry not in own]
    others = [entry for entry in entries if entry.form == "values" and entry not in known and entry not in own]
    yield own + known
    if len(others) > 1:
        yield own + known + others
    for other in others:
        yield [*own, *known, other]
    for entry in known:
        yield own + [other for other in known if other is not entry]


def _count_candidates(settings: dict[str, Any], length: int) -> list[CountKey]:
    """Entries that may count so many blocks: those whose name says so, then lists of that length, then all others."""
    found = list(_numbers(settings, length, ()))
    likely = [key for key in found if _COUNT_NAME.search(key.key)]
    lists = list(_lists(settings, length, ())) if length > 1 else []
    others = [key for key in found if key not in likely] if length > 2 else []
    halves = _numbers(settings, length // 2, ()) if length % 2 == 0 and length > 2 else ()
    pairs = [replace(key, each=2) for key in halves if key.index is not None and _COUNT_NAME.search(key.key)]
    return likely + lists + others + pairs


def _with_others(settings: Mapping[str, Any], length: int) -> list[CountKey]:
    """Entries for the stages of a network that may count blocks, or pairs of them, beside one or two that lead out of
    the stage or into it (LeViT's subsampling, and the feed-forward network after it). No other entry follows them:
    lists with a value per stage would have stages taken for blocks (HGNetV2).
    """
    ways = [(fixed, each) for fixed in (1, 2) for each in (1, 2) if length > fixed and (length - fixed) % each == 0]
    return [
        replace(key, each=each, fixed=fixed)
        for fixed, each in ways
        for key in _numbers(settings, (length - fixed) // each, ())
        if key.index is not None and _COUNT_NAME.search(key.key)
    ]


def _numbers(settings: Mapping[str, Any], length: int, path: tuple[str, ...]) -> Iterator[CountKey]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value, length, (*path, key))
        elif isinstance(key, str) and not _NO_COUNT.search(key):
            if type(value) is int and value == length:
                yield CountKey(path, key)
            elif isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
                yield from (CountKey(path, key, index) for index, item in enumerate(value) if item == length)


def _lists(settings: Mapping[str, Any], length: int, path: tuple[str, ...]) -> Iterator[CountKey]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _lists(value, length, (*path, key))
        elif _COUNT_NAME.search(str(key)) and isinstance(value, (list, tuple)) and len(value) == length:
            yield from [CountKey(path, key, by_length=True)] if all(isinstance(item, str) for item in value) else []


def shrink_stages(holder: dict[str, Any], length: int, kept: Sequence[int]) -> None:
    """Drop removed layers' stages: vision backbones name the stem and every layer one, and give out some of them."""
    if not names_stages(holder, length):
        return
    out = holder.get("out_indices")
    holder.pop("stage_names")
    holder.pop("out_features", None)
    if out is not None:
        # stage i is the output of block i - 1: the nearest kept block before it takes over
        holder["out_indices"] = sorted({sum(k < stage % (length + 1) for k in kept) for stage in out})


def _same(attribute: Any, value: Any) -> bool:
    """Whether an attribute holds a whole list or dict, be it as a tuple."""
    one, other = (list(held) if isinstance(held, tuple) else held for held in (attribute, value))
    return isinstance(one, (list, dict)) and one == other
