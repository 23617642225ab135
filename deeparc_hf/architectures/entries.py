"""Entries of a model's settings that name blocks: by their place in a list, by their index, or by their index as a key.

`layer_types` has one value a layer, `mlp_only_layers` lists indices, `per_layer_config` has indices for keys, GPT-Neo's
`attention_types` repeats a pattern. They are found by value and length, and tried (`auto`).
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .base import BlockEntry, CountKey, nested

__all__ = ["asked_for", "entries_of", "follow", "named", "names_others", "names_stages", "trials", "usual"]

_VALUES_NAME = re.compile(r"layer|block|types")
_INDICES_NAME = re.compile(r"layer|block|ind(ex|ic)|idx")
# counts, and lists of tokens, labels and stages, whatever their length
_OTHER_NAME = re.compile(r"^(num|n)_|token|label|^(stage_names|out_features|architectures)$|suppress")
_ENDS_NAME = re.compile(r"layer|block|dense|first|last|shared|hash")


def entries_of(settings: dict[str, Any], count: CountKey, length: int) -> list[BlockEntry]:
    """All entries that may name blocks of a stack by their form; nothing is proven of them.

    They stand where the stack is counted, or in the settings of which those are a part; other parts have stacks of
    their own.
    """
    own = () if count.by_length else (*count.path, count.key)
    stages = count.index is not None or names_stages(nested(settings, count.path), length)
    skipped = {(*count.path, "out_indices")} if stages else set()
    levels = [count.path[:depth] for depth in range(len(count.path) + 1)]
    found = [entry for path in levels for entry in _walk(nested(settings, path), length, path)]
    found += list(_ends(nested(settings, count.path), length, count))
    return [entry for entry in found if entry.path != own and entry.path not in skipped]


def usual(entries: Sequence[BlockEntry], count: CountKey) -> list[BlockEntry]:
    """Those that tell by their name and place that they follow the stack."""
    return [
        entry
        for entry in entries
        if entry.path[:-1] == count.path and entry.form not in ("first", "last") and named(entry)
    ]


def follow(settings: dict[str, Any], entry: BlockEntry, length: int, kept: Sequence[int]) -> None:
    """Have an entry name the kept blocks only, under their new numbers; one that no longer has the form is left alone.

    A block that is kept twice stands for one more like it; indices stay the same then.
    """
    value = entry.read(settings)
    if entry.form in ("first", "last"):
        if type(value) is int:
            special = range(value) if entry.form == "first" else range(length - value, length)
            entry.write(settings, sum(i in special for i in kept))
        return
    if not _form(value, length, entry.form):
        return
    new = {old: place for place, old in enumerate(kept)}
    if entry.form == "values":
        entry.write(settings, [value[i] for i in kept])
    elif entry.form == "runs":
        kinds = _repeated(value) or []
        entry.write(settings, [[[kinds[i] for i in kept], 1]])
    elif len(kept) > length:
        return  # a block more, alike to the last
    elif entry.form == "indices":
        entry.write(settings, [new.get(i, i) for i in value if i in new or i >= length])
    else:
        entry.write(settings, {type(k)(new[int(k)]): v for k, v in value.items() if int(k) in new})


def asked_for(whole: nn.Module, key: str) -> bool:
    """Whether code of the model's classes or their modules names the entry anywhere but where modules are built."""
    classes = {cls for module in whole.modules() for cls in type(module).__mro__}
    classes = {cls for cls in classes if not cls.__module__.startswith(("torch.", "builtins"))}
    functions = [f for cls in classes for n, f in vars(cls).items() if n != "__init__"]
    sources = {cls.__module__ for cls in classes} & sys.modules.keys()
    functions += [
        f for source in sources for f in vars(sys.modules[source]).values() if isinstance(f, types.FunctionType)
    ]
    return any(_names(code, key) for function in functions for code in _codes(function))


def _codes(function: Any) -> Iterator[types.CodeType]:
    function = getattr(function, "fget", None) or getattr(function, "__func__", None) or function
    while function is not None:
        if isinstance(function, types.FunctionType):
            yield function.__code__
        function = getattr(function, "__wrapped__", None)


def _names(code: types.CodeType, key: str) -> bool:
    return key in code.co_names or any(
        c == key or (isinstance(c, types.CodeType) and _names(c, key)) for c in code.co_consts
    )


def trials(settings: dict[str, Any], entry: BlockEntry, length: int) -> Iterator[tuple[Any, set[int]]]:
    """Other values for an entry, of the same form, with the blocks that they concern."""
    value = entry.read(settings)
    if entry.form == "values":
        yield from _changed_values(list(value))
    elif entry.form == "indices":
        inside, outside = [i for i in value if i < length], [i for i in value if i >= length]
        free = [i for i in range(length) if i not in inside]
        for index in free[-1:]:
            yield sorted([*inside[:-1], index]) + outside, {inside[-1], index}
        yield inside[:-1] + outside, {inside[-1]}
    elif entry.form == "keys":
        last = list(value)[-1]
        yield {k: v for k, v in value.items() if k != last}, {int(last)}
    elif entry.form == "first":
        yield value - 1, {value - 1}
    elif entry.form == "last":
        yield value - 1, {length - value}


def _changed_values(values: list[Any]) -> Iterator[tuple[list[Any], set[int]]]:
    for i, other in enumerate(values):
        if other != values[0]:
            swapped = list(values)
            swapped[0], swapped[i] = values[i], values[0]
            yield swapped, {0, i}
            return
    # all alike: which of them goes makes no difference, but whether the blocks read them tells whether they follow
    first = values[0]
    if isinstance(first, bool):
        yield [not first, *values[1:]], {0}
    elif isinstance(first, (int, float)):
        yield [first * 2 if first else first + 1, *values[1:]], {0}


def _walk(settings: Mapping[str, Any], length: int, path: tuple[str, ...]) -> Iterator[BlockEntry]:
    for key, value in settings.items():
        if not isinstance(key, str) or _OTHER_NAME.search(key):
            continue
        forms = [form for form in ("values", "keys", "runs", "indices") if _form(value, length, form)]
        for form in forms:
            # all of 0, 1, 2, ... in a list that is named so are indices, not values
            if form != "values" or not ("indices" in forms and _INDICES_NAME.search(key)):
                yield BlockEntry((*path, key), form)
        if isinstance(value, Mapping) and "keys" not in forms and "model_type" not in value:
            yield from _walk(value, length, (*path, key))


def _ends(settings: Mapping[str, Any], length: int, count: CountKey) -> Iterator[BlockEntry]:
    """Numbers that may say how many blocks at an end of the stack are of another kind."""
    for key, value in settings.items():
        if key != count.key and type(value) is int and 0 < value <= length and _ENDS_NAME.search(key):
            yield from (BlockEntry((*count.path, key), form) for form in ("first", "last"))


def _form(value: Any, length: int, form: str) -> bool:
    if form == "keys":
        whole = isinstance(value, Mapping) and value and all(str(k).isdigit() and int(k) < length for k in value)
        return bool(whole) and all(isinstance(v, Mapping) for v in value.values())
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if form == "values":
        return len(value) == length
    if form == "indices":
        # some may lie behind the last block: a list that was made for more of them
        whole = all(type(v) is int and v >= 0 for v in value) and list(value) == sorted(set(value))
        return whole and value[0] < length and (value[-1] < length or value[-1] < 4 * length)
    return len(_repeated(value) or ()) == length


def _repeated(value: Sequence[Any]) -> list[Any] | None:
    """[[["global", "local"], 2]] written out; None if it has another form."""
    kinds: list[Any] = []
    for item in value:
        pair = isinstance(item, (list, tuple)) and len(item) == 2
        if not (pair and isinstance(item[0], (list, tuple)) and type(item[1]) is int):
            return None
        kinds += list(item[0]) * item[1]
    return kinds


def named(entry: BlockEntry) -> bool:
    if entry.form in ("keys", "runs"):
        return True
    return bool((_INDICES_NAME if entry.form == "indices" else _VALUES_NAME).search(entry.path[-1]))


def names_others(key: str) -> bool:
    """Whether an entry tells by its name that it is of something else than blocks, whatever its length."""
    return bool(_OTHER_NAME.search(key.lstrip("_")))


def names_stages(holder: Mapping[str, Any], length: int) -> bool:
    """Whether settings name the stem and every block as a stage, as those of vision backbones do."""
    names = holder.get("stage_names")
    return isinstance(names, (list, tuple)) and len(names) == length + 1
