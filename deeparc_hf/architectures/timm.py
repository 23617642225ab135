"""timm models, bare or inside transformers' TimmWrapper: what counts the blocks is found by trying (`search`).

An argument of the model's class is given the numbers of blocks that there are: of one list of blocks, or of lists whose
paths differ in a number (the stages). If `timm.create_model` builds the same model then, it may count them.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from .base import Container, CountKey, Family, Stack, chained, nested, register, signature_pins
from .hosts import Host, TransformersHost
from .resnet import stage_pins
from .search import Search, containers, inside, uncounted
from .skeleton import state_shapes

_COUNT_NAME = re.compile(r"layer|depth|block|stage")
_BLOCK_NAME = re.compile("")  # timm's blocks may be called anything


@register("timm")
class Timm(Family):
    summary = "any timm model whose blocks an argument of timm.create_model counts; one stack a stage"
    priority = 5

    def matches(self, host: Host) -> bool:
        return _timm_model(host) is not None

    def stacks(self, host: Host) -> list[Stack]:
        model = _timm_model(host)
        assert model is not None
        wrapped = isinstance(host, TransformersHost)
        prefix, path = ("timm_model.", ("model_args",)) if wrapped else ("", ())
        shapes = state_shapes(host.build(host.settings()))
        found: dict[str, Stack] = {}
        for group in _groups(model, prefix):
            if any(inside(name, found) for name, _ in group):
                continue  # parts of blocks
            for key in _keys(model, group, path):
                stacks = {stack.name: stack for stack in _counted(host, shapes, group, key)}
                found |= stacks
                if stacks:
                    break
        if host.can_drop:
            lists = [(prefix + name, blocks) for name, blocks in containers(model)]
            found |= {stack.name: stack for stack in uncounted(lists, found, _BLOCK_NAME)}
        if not found:
            raise UnsupportedModelError(_nothing_found(host, model))
        return chained([found[name] for name, _ in host.root.named_modules() if name in found])


def _timm_model(host: Host) -> nn.Module | None:
    if host.library == "timm":
        return host.root
    model = host.root.timm_model if host.kind == "timm_wrapper" else None
    return model if isinstance(model, nn.Module) else None


def _nothing_found(host: Host, model: nn.Module) -> str:
    lists = [(name, blocks) for name, blocks in containers(model) if len(blocks) > 1]
    named = "; ".join(f"{name} ({len(blocks)} x {type(blocks[0]).__name__})" for name, blocks in lists[:3])
    if not named:
        return f"{host.label} cannot be pruned by layers: found no list of blocks in it."
    text = (
        f"{host.label} cannot be pruned by layers: found {named}, but timm's own entry point takes no argument that "
        "counts these blocks, so a pruned checkpoint could not be rebuilt by stock timm. A newer timm may allow it: "
        "pip install -U timm."
    )
    if host.library == "timm" and any(True for _ in uncounted(lists, {}, _BLOCK_NAME)):
        text += (
            " Or load it with transformers, AutoModelForImageClassification.from_pretrained('timm/...'): there blocks "
            "can be dropped, and the result needs deeparc_hf to be loaded."
        )
    return text


Group = list[tuple[str, Container]]


def _groups(model: nn.Module, prefix: str) -> Iterator[Group]:
    """Lists of blocks that one argument may count: those whose paths differ in a number alone, and each by itself."""
    kinds = dict.fromkeys(_kind(name) for name, _ in containers(model))
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, Container)]
    for kind in kinds:
        group = [(prefix + name, module) for name, module in lists if _kind(name) == kind and len(module)]
        yield group
        if len(group) > 1:
            yield from ([member] for member in group)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _keys(model: nn.Module, group: Group, path: tuple[str, ...]) -> Iterator[CountKey]:
    """Arguments that may count the blocks of some lists."""
    for fixed, name in itertools.product((0, 1), _arguments(type(model))):
        lengths = tuple(len(container) - fixed for _, container in group)
        yield CountKey(path, name, whole=lengths, fixed=fixed)
        if len(lengths) == 1:
            yield CountKey(path, name, whole=lengths[0], fixed=fixed)


def _arguments(cls: type[nn.Module]) -> Iterator[str]:
    """Arguments of a model's class, and of the settings that it takes as one of them, that may count blocks."""
    names: list[str] = []
    for base in (base for base in cls.__mro__ if "__init__" in vars(base)):
        for parameter in inspect.signature(vars(base)["__init__"]).parameters.values():
            names.append(parameter.name)
            settings = _annotation(base, parameter)
            if dataclasses.is_dataclass(settings):
                names += [field.name for field in dataclasses.fields(settings)]
    yield from (name for name in dict.fromkeys(names) if _COUNT_NAME.search(name))


def _annotation(cls: type[nn.Module], parameter: inspect.Parameter) -> Any:
    try:
        return typing.get_type_hints(cls.__init__).get(parameter.name)
    except Exception:  # names that exist for type checkers alone
        return None


def _counted(host: Host, shapes: Mapping[str, Any], group: Group, key: CountKey) -> Iterator[Stack]:
    """The lists of a group whose blocks an argument counts."""
    settings = copy.deepcopy(host.settings())
    key.write_whole(settings)
    given = nested(settings, key.path)[key.key]
    if (tuple(given) if isinstance(given, (list, tuple)) else given) != key.whole:
        return  # it was given, and is something else
    try:
        skeleton = host.build(settings)
    except Exception:
        return  # the entry point takes no such argument, or gives its own
    if state_shapes(skeleton) != shapes:
        return
    search = Search(host, settings, skeleton)
    for index, (name, container) in enumerate(group):
        own = dataclasses.replace(key, index=index if isinstance(key.whole, tuple) else None)
        found = search.count(name, len(container), [own])
        if found.count is not None:
            pins = stage_pins if found.count.index is not None else signature_pins
            pinned = pins(list(container))
            yield Stack(name, container, pinned, count=found.count, entries=found.entries, per_block=found.per_block)
