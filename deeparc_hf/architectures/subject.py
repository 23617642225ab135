"""A described model: made once where a model comes in, handed on, and made anew when its structure has changed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..core.block_paths import lists_of
from ..errors import UnsupportedModelError
from .adapters import beneath, places_of
from .base import Family, Stack, family_of
from .hosts import Host, find_host
from .layout import Layout
from .per_block import PerBlockTensor

__all__ = ["Subject", "describe"]

_Blocks = Mapping[str, tuple[tuple["weakref.ref[nn.Module]", ...], ...]]  # by stack, of each of its lists


@dataclass(frozen=True, eq=False)
class Subject:
    """One model, as `describe` has found it.

    Attributes:
        host: the model with its library.
        family: what says which stacks it has.
        stacks: by name, in forward order.
    """

    host: Host
    family: Family
    stacks: Mapping[str, Stack]
    _blocks: _Blocks

    @property
    def root(self) -> nn.Module:
        """The model of the library, which may stand in a wrapper."""
        return self.host.root

    @property
    def name(self) -> str:
        """The model's class, for messages."""
        return type(self.root).__name__

    @property
    def lengths(self) -> dict[str, int]:
        """By stack name, the number of blocks when the model was described."""
        return {name: len(lists[0]) for name, lists in self._blocks.items()}

    @property
    def per_block(self) -> dict[str, tuple[PerBlockTensor, ...]]:
        """By stack name, the tensors outside of it that have a part for each of its blocks."""
        return {name: stack.per_block for name, stack in self.stacks.items()}

    def without(self, removed: Mapping[str, Sequence[int]]) -> Layout:
        """The layout of the model without some blocks: by stack name, their indices."""
        beside = {
            name: tuple(heads.path for heads in stack.heads) for name, stack in self.stacks.items() if stack.heads
        }
        return Layout.without(self.lengths, removed, beside)

    def is_current(self) -> bool:
        """Whether the model still has the blocks that were described. It costs next to nothing to ask."""
        for name, known in self._blocks.items():
            for path, container, references in zip(lists_of(name), self.stacks[name].containers, known, strict=True):
                try:
                    found = self.root.get_submodule(path)
                except AttributeError:
                    return False
                # weak references: a description does not hold on to removed blocks
                blocks = [reference() for reference in references]
                if found is not container or blocks != list(container.children()):
                    return False
        return True

    def shrunk_settings(self, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model's settings, and those of the model with only the blocks that a layout keeps."""
        before = self.host.settings()
        after = copy.deepcopy(before)
        self.family.shrink(after, list(self.stacks.values()), layout.kept)
        return before, after


def describe(model: nn.Module | Subject) -> Subject:
    """Describe a model: find its library, its family and its stacks.

    Args:
        model: as in `find_stacks`; or a description of it, which is handed back where the model has not changed since.

    Raises:
        UnsupportedModelError: as `find_stacks`.
    """
    if isinstance(model, Subject):
        return model if model.is_current() else describe(model.host.outer or model.root)
    host = find_host(model)
    seen = host.as_described()
    family = family_of(seen)
    stacks = {stack.name: stack if seen is host else _live(stack, host) for stack in family.stacks(seen)}
    known = {
        name: tuple(tuple(map(weakref.ref, container.children())) for container in stack.containers)
        for name, stack in stacks.items()
    }
    return Subject(host, family, stacks, known)


def _live(stack: Stack, host: Host) -> Stack:
    """A stack that was found in the model as its settings describe it, as it stands in the model."""
    lists, beside_it = lists_of(stack.name), [heads.path for heads in stack.heads]
    places = [places_of(host.root, path) for path in (*lists, *beside_it)]
    if any(len(found) > 1 or any(beneath(block) is not None for block in found[0].children()) for found in places):
        raise UnsupportedModelError(
            f"PEFT keeps copies of whole blocks of {stack.name}, or of their heads, in {type(host.root).__name__} "
            "(modules_to_save), which cannot follow a removal. Call model.merge_and_unload() and prune the merged "
            "model, or prune first and add the adapters afterwards."
        )
    container, *others = (found[0] for found in places)
    beside, live = others[: len(lists) - 1], others[len(lists) - 1 :]
    pairs = zip(stack.heads, live, strict=True)
    heads = tuple(replace(own, container=found) for own, found in pairs)  # type: ignore[arg-type]
    return replace(stack, container=container, beside=tuple(beside), heads=heads)  # type: ignore[arg-type]
