"""Skeletons: what a stock loader would build from given settings, on the meta device. Those before and after a removal
show what a reload would do differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core.compat import unsaved_buffers
from ..core.shards import shape_of
from .layout import Layout

__all__ = ["Differences", "compare", "differing", "state_shapes"]

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


def compare(before: nn.Module, after: nn.Module, layout: Layout) -> Differences:
    """Compare the skeletons of the settings before and after a removal."""
    found = Differences()
    names = {name: layout.renamed(name) for name in _modules(before, layout.kept)}
    new_names = {new for new in names.values() if new is not None}
    after_modules = _modules(after, layout.kept)
    extra = sorted(name for name in after_modules if name not in new_names and not _neutral(after_modules[name]))
    if extra:
        some = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
        found.problems.append(f"a reload would build modules that the pruned model does not have: {some}")
    for old, new in names.items():
        module = before.get_submodule(old)
        if new is None or _neutral(module):
            continue
        counterpart = after_modules.get(new)
        if counterpart is None or _neutral(counterpart):
            found.problems.append(f"a reload would lack {new}, which is {old} of this model")
        elif _class(counterpart) != _class(module):
            found.problems.append(
                f"{old} is a {type(module).__name__}, but a reload would build a {type(counterpart).__name__} in its "
                "place"
            )
        else:
            found.problems += _misshapen(old, module, counterpart)
            _compare_attributes(old, module, counterpart, layout, found)
    return found


def differing(
    one: nn.Module, other: nn.Module, ignored: Callable[[Any, Any], bool] = lambda one, other: False
) -> set[str]:
    """Paths of the modules that only one of two skeletons has, or that differ in class, shapes or attributes (but for
    values that are `ignored`).
    """
    first, second = _modules(one), _modules(other)
    paths = set(first.keys() ^ second.keys())
    for path in first.keys() & second.keys():
        own, new = _plain_attributes(first[path]), _plain_attributes(second[path])
        values = [(own.get(key), new.get(key)) for key in own.keys() | new.keys()]
        changed = any(old != now and not ignored(old, now) for old, now in values)
        if changed or _class(first[path]) != _class(second[path]) or _misshapen(path, first[path], second[path]):
            paths.add(path)
    return paths


def _modules(root: nn.Module, stacks: Iterable[str] = ()) -> dict[str, nn.Module]:
    """Modules by path. One that all blocks share stands under each of them, and not where else it may be known."""
    containers = {name: root.get_submodule(name) for name in stacks}
    inside = {id(module) for container in containers.values() for module in container.modules()}
    prefixes = tuple(f"{name}." for name in containers)
    return {
        path: module
        for path, module in root.named_modules(remove_duplicate=False)
        if path in containers or path.startswith(prefixes) or id(module) not in inside
    }


def _misshapen(name: str, module: nn.Module, counterpart: nn.Module) -> list[str]:
    own, new = _own_shapes(module), _own_shapes(counterpart)
    # a buffer that is never saved may be missing from a reload: nothing that is left asks for it
    spare = unsaved_buffers(module) - new.keys()
    return [
        f"{f'{name}.{key}' if name else key} has shape {own.get(key)}, but a reload would give it {new.get(key)}"
        for key in sorted((own.keys() | new.keys()) - spare)
        if own.get(key) != new.get(key)
    ]


def _own_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: shape_of(tensor) for name, tensor in tensors}


def _compare_attributes(
    name: str, module: nn.Module, counterpart: nn.Module, layout: Layout, found: Differences
) -> None:
    stack = next((stack for stack in layout.kept if name.startswith(f"{stack}.")), None)
    own, new = _plain_attributes(module), _plain_attributes(counterpart)
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


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and _plain(v)}


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(item) for item in value.values())
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _class(module: nn.Module) -> str:
    # by name: torch's parametrizations make a class of their own for each module
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _neutral(module: nn.Module) -> bool:
    """Whether the module does nothing at inference: an identity, or stochastic depth."""
    return isinstance(module, nn.Identity) or "DropPath" in type(module).__name__
