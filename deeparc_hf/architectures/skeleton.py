"""Skeletons: what a stock loader would build from given settings, on the meta device. Those before and after a removal
show what a reload would do differently.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..core.block_paths import is_inside, lists_of
from ..core.compat import unsaved_buffers
from ..core.shards import shape_of
from .layout import Layout
from .per_block import PerBlockTensor, left_by_path

__all__ = ["Differences", "Memory", "Part", "compare", "differing", "parts", "state_shapes"]

# Attributes that hold a block's own index: they follow the skeleton.
_INDEX_NAMES = frozenset(
    {"block_id", "block_idx", "block_index", "layer_id", "layer_idx", "layer_index", "layer_num", "layer_number"}
)
# Stochastic depth grows along a stack and acts in training only: a kept block keeps the rate that it was trained with.
_TRAINING_ONLY = frozenset({"drop_path", "drop_path_rate", "drop_prob"})


@dataclass
class Differences:
    """Reasons for which a removal cannot be expressed by the settings, and what a reload has otherwise: (module path
    before the removal, attribute, new value).
    """

    problems: list[str] = field(default_factory=list)
    updates: list[tuple[str, str, Any]] = field(default_factory=list)


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter and persistent buffer."""
    return {name: shape_of(value) for name, value in module.state_dict(keep_vars=True).items()}


@dataclass(frozen=True)
class Part:
    """One module of a skeleton, as far as skeletons are compared.

    Attributes:
        kind: name of its class.
        origin: module and name of its class. (By name: torch's parametrizations make a class of their own for each
            module.)
        neutral: whether it does nothing at inference: an identity, or stochastic depth.
        shapes: of its own parameters and buffers.
        attributes: those that are plain data.
        spare: names of its buffers that are never saved. (They may be missing from a reload: nothing that is left asks
            for them.)
    """

    kind: str
    origin: str
    neutral: bool
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Any]
    spare: frozenset[str]


def parts(root: nn.Module, stacks: Iterable[str] = ()) -> dict[str, Part]:
    """The modules of a skeleton by path. One that all blocks share stands under each of them, and not where else it may
    be known.
    """
    modules = dict(root.named_modules(remove_duplicate=False))  # a build of other settings may lack a list
    containers = {path: modules[path] for name in stacks for path in lists_of(name) if path in modules}
    inside = {id(module) for container in containers.values() for module in container.modules()}
    prefixes = tuple(f"{name}." for name in containers)
    return {
        path: _part(module)
        for path, module in modules.items()
        if path in containers or path.startswith(prefixes) or id(module) not in inside
    }


class Memory:
    """What was read from the last few modules, which stay as they are: for many comparisons of the same ones."""

    def __init__(self) -> None:
        self.parts = functools.lru_cache(maxsize=4)(parts)
        self.state_shapes = functools.lru_cache(maxsize=4)(state_shapes)


def compare(
    before: nn.Module,
    after: nn.Module,
    layout: Layout,
    memory: Memory | None = None,
    per_block: Mapping[str, Sequence[PerBlockTensor]] = types.MappingProxyType({}),
) -> Differences:
    """Compare the skeletons of the settings before and after a removal.

    Args:
        per_block: by stack, the tensors that have a part for each block, and are shorter after it.
    """
    found = Differences()
    stacks = tuple(layout.kept)
    read = parts if memory is None else memory.parts
    own, new = read(before, stacks), read(after, stacks)
    names = {name: layout.renamed(name) for name in own}
    shortened = left_by_path(per_block, layout)
    new_names = {name for name in names.values() if name is not None}
    extra = sorted(name for name, part in new.items() if name not in new_names and not part.neutral)
    if extra:
        some = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        found.problems.append(f"a reload would build modules that the pruned model does not have: {some}")
    for old_name, new_name in names.items():
        part = own[old_name]
        if new_name is None:
            continue
        counterpart = new.get(new_name)
        if part.neutral:
            if counterpart is not None and not counterpart.neutral:
                found.problems.append(f"{old_name} does nothing, but a reload would build a {counterpart.kind} there")
        elif counterpart is None or counterpart.neutral:
            found.problems.append(f"a reload would lack {new_name}, which is {old_name} of this model")
        elif counterpart.origin != part.origin:
            found.problems.append(
                f"{old_name} is a {part.kind}, but a reload would build a {counterpart.kind} in its place"
            )
        elif counterpart != part:
            found.problems += _misshapen(old_name, _shortened(old_name, part, shortened), counterpart)
            _compare_attributes(old_name, part, counterpart, layout, found)
    return found


def _shortened(name: str, part: Part, shortened: Mapping[str, tuple[PerBlockTensor, int, tuple[int, ...]]]) -> Part:
    """A part with the shapes that its tensors have after the removal."""
    shapes = dict(part.shapes)
    for key, shape in part.shapes.items():
        tensor, length, kept = shortened.get(f"{name}.{key}" if name else key, (None, 0, ()))
        if tensor is not None:
            shapes[key] = tensor.shape_left(shape, length, len(kept))
    return replace(part, shapes=shapes)


def differing(
    one: nn.Module, other: nn.Module, ignored: Callable[[Any, Any], bool] = lambda one, other: False
) -> set[str]:
    """Paths of the modules that only one of two skeletons has, or that differ in class, shapes or attributes (but for
    values that are `ignored`).
    """
    first, second = parts(one), parts(other)
    paths = set(first.keys() ^ second.keys())
    for path in first.keys() & second.keys():
        part, counterpart = first[path], second[path]
        if part == counterpart:
            continue
        own, new = part.attributes, counterpart.attributes
        values = [(own.get(key), new.get(key)) for key in own.keys() | new.keys()]
        changed = any(old != now and not ignored(old, now) for old, now in values)
        if changed or part.origin != counterpart.origin or _misshapen(path, part, counterpart):
            paths.add(path)
    return paths


def _part(module: nn.Module) -> Part:
    kind = type(module)
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return Part(
        kind=kind.__name__,
        origin=f"{kind.__module__}.{kind.__qualname__}",
        neutral=isinstance(module, nn.Identity) or "DropPath" in kind.__name__,
        shapes={name: shape_of(tensor) for name, tensor in tensors},
        attributes={
            k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and _is_plain(v)
        },
        spare=frozenset(unsaved_buffers(module)),
    )


def _misshapen(name: str, part: Part, counterpart: Part) -> list[str]:
    own, new = part.shapes, counterpart.shapes
    return [
        f"{f'{name}.{key}' if name else key} has shape {own.get(key)}, but a reload would give it {new.get(key)}"
        for key in sorted((own.keys() | new.keys()) - (part.spare - new.keys()))
        if own.get(key) != new.get(key)
    ]


def _compare_attributes(name: str, part: Part, counterpart: Part, layout: Layout, found: Differences) -> None:
    stack = next((stack for stack in layout.kept if is_inside(stack, name)), None)
    own, new = part.attributes, counterpart.attributes
    for key in sorted(own.keys() | new.keys()):
        old_value, new_value = own.get(key), new.get(key)
        if old_value == new_value or key in _TRAINING_ONLY:
            continue
        if (
            stack is None
            or key in _INDEX_NAMES
            or _follows(old_value, new_value, layout.lengths[stack], layout.kept[stack])
        ):
            found.updates.append((name, key, new_value))
        else:
            found.problems.append(
                f"{name}.{key} depends on the block's place: it is {old_value!r}, but a reload would make it "
                f"{new_value!r}"
            )


def _follows(old: Any, new: Any, length: int, kept: Sequence[int]) -> bool:
    """Whether a block holds the whole stack's values (GPT-Neo's attention_layers), less those of removed blocks."""
    whole = isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and len(old) == length
    return whole and list(new) == [old[i] for i in kept]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
