"""timm models, bare or inside transformers' TimmWrapper: what counts the blocks is found by trying (`search`).

The arguments of the model's class are read from a build (`timm_arguments`), for most of them are the entry point's own.
One that holds a number, or a list of numbers, may count the blocks of a list, if `timm.create_model` builds the same
model where it is given.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .base import BlockEntry, Container, CountKey, Family, Stack, block_shapes, chained, register, signature_pins
from .entries import follow
from .hosts import Host, TransformersHost
from .resnet import stage_pins
from .search import Search, are_stages, containers, inside, uncounted
from .skeleton import state_shapes
from .timm_arguments import arguments_of, refusal, stays

_COUNT_NAME = re.compile(r"layer|depth|block|stage")
_BLOCK_NAME = re.compile("")  # timm's blocks may be called anything
_MOST_BESIDE = 2  # blocks of a list that no argument counts: one that leads into a stage, or out of it


@register("timm")
class Timm(Family):
    summary = "any timm model whose blocks an argument of timm.create_model counts; one stack a stage"
    priority = 5

    def matches(self, host: Host) -> bool:
        return _timm_model(host) is not None

    def stacks(self, host: Host) -> list[Stack]:
        model = _timm_model(host)
        assert model is not None
        prefix = "timm_model." if isinstance(host, TransformersHost) else ""
        lists = [(prefix + name, blocks) for name, blocks in _lists(model)]
        arguments = _Arguments(host, model)
        found: dict[str, Stack] = {}
        for name, blocks in lists:
            stack = None if inside(name, found) else arguments.counted(name, blocks)
            if stack is not None and not are_stages(
                name, lists, lambda path, inner: arguments.counted(path, inner) is not None
            ):
                found[name] = stack
        if host.can_drop:
            found |= {stack.name: dataclasses.replace(stack, uncounted=arguments.why) for stack in _plain(lists, found)}
        if not found:
            raise UnsupportedModelError(_nothing_found(host, lists, arguments.why))
        return chained([found[name] for name, _ in host.root.named_modules() if name in found])

    def shrink(self, settings: dict[str, Any], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> None:
        for stack in stacks:
            if len(kept[stack.name]) < len(stack):
                for entry in (entry for entry in stack.entries if entry.proof != "none"):
                    follow(settings, entry, len(stack), kept[stack.name])
        super().shrink(settings, stacks, kept)


def _timm_model(host: Host) -> nn.Module | None:
    if host.library == "timm":
        return host.root
    model = host.root.timm_model if host.kind == "timm_wrapper" else None
    return model if isinstance(model, nn.Module) else None


def _lists(model: nn.Module) -> Iterator[tuple[str, Container]]:
    """Lists that may be stacks: of what may be blocks, and other stages, whose paths differ in a number alone."""
    kinds = {re.sub(r"\d+", "*", name) for name, _ in containers(model, mixed=True)}
    for name, module in model.named_modules():
        if isinstance(module, Container) and re.sub(r"\d+", "*", name) in kinds and len(list(module.children())):
            yield name, module


def _plain(lists: Sequence[tuple[str, Container]], counted: Mapping[str, Stack]) -> Iterator[Stack]:
    """Lists of blocks that no argument counts: some are alike, so that they are no chain of sizes, nor stages."""
    return uncounted([(name, blocks) for name, blocks in lists if _some_alike(blocks)], counted, _BLOCK_NAME)


def _some_alike(blocks: Container) -> bool:
    shapes = block_shapes(list(blocks))
    return any(shapes.count(shape) > 1 for shape in shapes)


def _nothing_found(host: Host, lists: Sequence[tuple[str, Container]], why: str) -> str:
    plain = list(_plain(lists, {}))
    if not plain:
        return f"{host.label} cannot be pruned by layers: found no list in it of blocks that are alike."
    named = "; ".join(f"{stack.name} ({len(stack)} x {type(stack.blocks[0]).__name__})" for stack in plain[:3])
    text = (
        f"{host.label} cannot be pruned by layers: found {named}, but timm's own entry point takes no argument that "
        f"counts these blocks, so a pruned checkpoint could not be rebuilt by stock timm{f' ({why})' if why else ''}. "
        "A newer timm may allow it: pip install -U timm."
    )
    if host.library == "timm":
        text += (
            " Or load it with transformers, AutoModelForImageClassification.from_pretrained('timm/...'): there blocks "
            "can be dropped, and the result needs deeparc_hf to be loaded."
        )
    return text


class _Arguments:
    """The arguments that may count blocks of one model.

    Attributes:
        why: the first reason why one of them cannot be given, if there is any.
    """

    def __init__(self, host: Host, model: nn.Module) -> None:
        self.host, self.settings, self.why = host, host.settings(), ""
        wrapped = isinstance(host, TransformersHost)
        self.architecture = str(host.root.config.architecture) if wrapped else host.kind
        self.path = ("model_args",) if wrapped else ()
        given = (self.settings.get("model_args") or {}) if wrapped else self.settings
        values = arguments_of(model, self.architecture, given)
        self.values: dict[str, Any] = {}
        for name in filter(_COUNT_NAME.search, values):
            plain = _plain_data(values[name])
            if any(True for _ in _leaves(plain)):
                self.values[name] = plain
            elif plain is None and _holds_values(values[name]):
                self.why = self.why or f"{name} is no JSON, so that no config.json can hold it"
        self._shapes = state_shapes(host.build(self.settings))
        self._searches: dict[str, Search | None] = {}
        self._given: dict[str, Search | None] = {}  # by the names of what is given

    def counted(self, name: str, blocks: Container) -> Stack | None:
        """The stack that a list of blocks is, if an argument counts them."""
        for argument, key in self._keys(len(blocks)):
            search = self._search(argument)
            if search is None:
                continue
            found = search.count(name, len(blocks), [key])
            count = found.count
            if count is not None:
                pins = (signature_pins if count.index is None else stage_pins)(list(blocks))
                entries = tuple(self._with_value(entry) for entry in found.entries)
                # where entries tell kinds of blocks, those of any kind may go
                told = count.index is None and not count.stages and any(entry.proof == "build" for entry in entries)
                return Stack(
                    name, blocks, {} if told else pins, count=count, entries=entries, per_block=found.per_block
                )
        return None

    def _keys(self, length: int) -> Iterator[tuple[str, CountKey]]:
        for name, value in self.values.items():
            for places, leaf in _leaves(value):
                index = None if not places else places[0] if len(places) == 1 else places
                key = CountKey(self.path, name, index, whole=value)
                if isinstance(leaf, list):
                    if len(leaf) == length:
                        yield name, dataclasses.replace(key, values=True)
                elif 0 <= length - leaf <= _MOST_BESIDE:
                    yield name, dataclasses.replace(key, fixed=length - leaf)
            if _are_numbers(value) and sum(value) == length > len(value):
                yield name, CountKey(self.path, name, whole=value, stages=True)

    def _with_value(self, entry: BlockEntry) -> BlockEntry:
        return dataclasses.replace(entry, whole=self.values[entry.path[len(self.path)]])

    def _search(self, name: str) -> Search | None:
        """The search where an argument is given, and others that may name blocks; None if it cannot be given, or makes
        another model.
        """
        if name not in self._searches:
            alone = self._with([name])
            others = [other for other in self._flat() if other == name or self._with([other]) is not None]
            together = self._with(sorted({name, *others})) if alone is not None and others else None
            self._searches[name] = together or alone
        return self._searches[name]

    def _flat(self) -> list[str]:
        """Arguments that may name blocks by their number."""
        return [name for name, value in self.values.items() if isinstance(value, int) or _are_numbers(value)]

    def _with(self, names: Sequence[str]) -> Search | None:
        """The search where arguments are given; None if a build with them is another model, or there is none."""
        known = ",".join(names)
        if known not in self._given:
            settings = copy.deepcopy(self.settings)
            for name in names:
                CountKey(self.path, name, whole=self.values[name]).write_whole(settings)
            self._given[known] = None
            try:
                skeleton = self.host.build(settings)
            except Exception as error:
                self.why = self.why or refusal(self.architecture, names[0], error)
            else:
                given = settings["model_args"] if self.path else settings
                if state_shapes(skeleton) == self._shapes and stays(self.architecture, given):
                    self._given[known] = Search(self.host, settings, skeleton)
        return self._given[known]


def _plain_data(value: Any) -> Any:
    """A value as JSON keeps it, for that is what a checkpoint does; None if it cannot."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def _holds_values(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict)) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _leaves(value: Any, places: tuple[int | str, ...] = ()) -> Iterator[tuple[tuple[int | str, ...], Any]]:
    """What may count blocks in an argument, with the way to it: numbers, and lists of something else than numbers."""
    if type(value) is int:
        yield places, value
    elif isinstance(value, list):
        if value and not any(type(inner) in (int, float, bool) for inner in value):
            yield places, value
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*places, index))
    elif isinstance(value, dict):
        for name, inner in value.items():
            if _COUNT_NAME.search(name):
                yield from _leaves(inner, (*places, name))
