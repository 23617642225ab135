"""What a family of models says about itself: its stacks, its pinned blocks, and how its settings count blocks."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import nn

from ..core.block_paths import lists_of
from ..core.registry import Registry
from ..core.shards import shape_of
from ..core.tables import html_table, spans
from ..errors import SurgeryError, UnsupportedModelError
from .hosts import Host
from .joined import JoinedBlock
from .per_block import AddedBetween, PerBlockTensor

__all__ = [
    "BlockEntry",
    "Container",
    "CountKey",
    "Family",
    "Heads",
    "Stack",
    "block_shapes",
    "chained",
    "families",
    "family_of",
    "nested",
    "register",
    "signature_pins",
]


Container = nn.ModuleList | nn.Sequential


@dataclass(frozen=True)
class CountKey:
    """Where the settings of a model say how many blocks a stack has.

    Attributes:
        path: keys of the nested settings that lead there, outermost first; () for the settings themselves.
        key: the entry, for example "num_hidden_layers" or "depths".
        index: the position within the entry where it is a list with one count per stack, else None; several of them
            where lists or dicts stand in it.
        by_length: whether it is a list with a value per block, whose length counts them. Such a list follows a removal
            as an entry that names blocks does (`BlockEntry`), and is not written to.
        whole: what the entry is where the settings leave it out, as those of timm do.
        fixed: how many blocks there are beside those that it counts (one that leads into a stage).
        each: how many blocks it counts as one (LeViT's attention and feed-forward network, each a residual block).
        stages: whether it is a list with one count per stage, of stages that stand in one list of blocks (Hiera's).
        values: whether there is a list with a value per block instead of a number.
    """

    path: tuple[str, ...]
    key: str
    index: int | tuple[int | str, ...] | None = None
    by_length: bool = False
    whole: Any = None
    fixed: int = 0
    each: int = 1
    stages: bool = False
    values: bool = False

    def __str__(self) -> str:
        where = ".".join((*self.path, self.key))
        return where + "".join(f"[{part}]" for part in self._places)

    @property
    def _places(self) -> tuple[int | str, ...]:
        if self.index is None:
            return ()
        return (self.index,) if isinstance(self.index, int) else self.index

    def write(self, settings: dict[str, Any], kept: Sequence[int]) -> None:
        """Write how many blocks are kept where the settings count them.

        Raises:
            SurgeryError: if they are no number of those that are counted as one.
        """
        if self.by_length:
            return
        if self.whole is not None:
            self.write_whole(settings)
        holder: Any = nested(settings, self.path)
        # a copy, for settings may hand out what they hold
        holder[self.key] = copy.deepcopy(holder[self.key])
        *way, last = (self.key, *self._places)
        for place in way:
            holder[place] = list(holder[place]) if isinstance(holder[place], tuple) else holder[place]
            holder = holder[place]
        holder[last] = self._kept(holder[last], kept)

    def _kept(self, value: Any, kept: Sequence[int]) -> Any:
        """What stands for the kept blocks in place of what stands for all of them."""
        if self.values:
            return [value[index] for index in kept]
        if self.stages:
            ends = itertools.accumulate(value)
            return [sum(end - count <= i < end for i in kept) for count, end in zip(value, ends, strict=True)]
        counted, rest = divmod(len(kept) - self.fixed, self.each)
        if rest:
            raise SurgeryError(f"{self} counts {self.each} blocks as one")
        return counted

    def write_whole(self, settings: dict[str, Any]) -> None:
        """Write out what the settings leave out."""
        for part in self.path:
            settings[part] = settings = dict(settings.get(part) or {})
        settings.setdefault(self.key, copy.deepcopy(self.whole))


@dataclass(frozen=True)
class BlockEntry:
    """An entry of the settings that names blocks of a stack other than by their number.

    Attributes:
        path: keys that lead to it, its own last.
        form: "values": a list with one value per block. "indices": a list of block indices. "keys": a dict with block
            indices for keys. "runs": patterns with the number of their repetitions, such as GPT-Neo's [[["global",
            "local"], 12]]. "first": a number of blocks at the start that are of another kind (DeepSeek's
            first_k_dense_replace). "last": one at the end.
        proof: "build": stock builds show that it is read block by block, and it follows a removal. "run": only a
            forward pass can show it; it follows, and the pass has to tell the difference. "none": it may name blocks,
            nothing shows it, and it stays.
        whole: what it is where the settings leave it out, as those of timm do.
    """

    path: tuple[str, ...]
    form: Literal["values", "indices", "keys", "runs", "first", "last"]
    proof: Literal["build", "run", "none"] = "none"
    whole: Any = None

    def read(self, settings: dict[str, Any]) -> Any:
        """Its value; None where it is missing."""
        if self.whole is not None:
            self._write_whole(settings)
        return nested(settings, self.path[:-1]).get(self.path[-1])

    def _write_whole(self, settings: dict[str, Any]) -> None:
        CountKey(self.path[:-1], self.path[-1], whole=self.whole).write_whole(settings)

    def write(self, settings: dict[str, Any], value: Any) -> None:
        if self.whole is not None:
            self._write_whole(settings)
        nested(settings, self.path[:-1])[self.path[-1]] = value

    def __str__(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True, eq=False)
class Heads:
    """A list outside of a stack with a module for each of its blocks, which reads what the block puts out and goes with
    it: the heads of a detector's decoder layers.

    Attributes:
        path: of the list, which may have more entries after those.
        container: the list.
        adds: whether what a head puts out is added to what those before it did (a correction of boxes). Where a block
            is skipped nothing is added; otherwise the head before stands for its own.
    """

    path: str
    container: nn.ModuleList
    adds: bool = False


@dataclass(frozen=True, eq=False)
class Stack:
    """A run of residual blocks of one model in which a block can be removed and shapes still fit.

    Attributes:
        name: module path of the container of the blocks, seen from the model that was searched. Where the parts of
            blocks stand in several lists side by side it names all of these: "transformer.{attentions,ffns}".
        container: the list that holds the blocks, or the first parts of them.
        pinned: blocks that must stay, with the reason for each.
        side: "encoder" or "decoder" in an encoder-decoder model, else None; decides which padding mask counts.
        count: where the settings count this stack's blocks; None if nowhere, so that they can only be dropped (the
            model type "deeparc_pruned").
        next_stack: name of the stack that takes this one's output directly (the next stage of a CNN), else None.
        entries: what else in the settings names its blocks.
        uncounted: where nothing counts it, why not, if that is known.
        per_block: tensors outside of the blocks that have a part for each of them.
        beside: the lists that hold the other parts of the blocks, in the order in which they run.
        heads: lists outside of it with a head for each of its blocks.
    """

    name: str
    container: Container
    pinned: Mapping[int, str] = field(default_factory=dict)
    side: str | None = None
    count: CountKey | None = None
    next_stack: str | None = None
    entries: tuple[BlockEntry, ...] = ()
    uncounted: str = ""
    per_block: tuple[PerBlockTensor, ...] = ()
    beside: tuple[Container, ...] = ()
    heads: tuple[Heads, ...] = ()

    @property
    def containers(self) -> tuple[Container, ...]:
        """The lists that hold the blocks, or their parts: those that the name names."""
        return (self.container, *self.beside)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in forward order. Those that have parts in several lists are made up anew at each call."""
        if not self.beside:
            return list(self.container.children())
        names = [path.rpartition(".")[2] for path in lists_of(self.name)]
        parts = zip(*(container.children() for container in self.containers), strict=True)
        return [JoinedBlock(dict(zip(names, block, strict=True))) for block in parts]

    @property
    def can_drop(self) -> bool:
        """Whether blocks can be dropped from a whole model (`pruned_type`): nothing outside goes by their places."""
        between = any(isinstance(tensor, AddedBetween) for tensor in self.per_block)
        return not (self.beside or self.heads or between)

    def __len__(self) -> int:
        return len(self.container)

    def _repr_html_(self) -> str:
        """A table of the blocks; runs of blocks that are alike stand in one row."""
        cells = [
            (type(block).__name__, f"{sum(p.numel() for p in block.parameters()):,}", self.pinned.get(index, ""))
            for index, block in enumerate(self.blocks)
        ]
        runs = itertools.groupby(range(len(cells)), cells.__getitem__)
        rows = [[spans(indices), *shared] for shared, indices in runs]
        return html_table(f"{self.name}: {len(self)} blocks", ["block", "class", "parameters of each", "pinned"], rows)

    def __repr__(self) -> str:
        return f"Stack({self.name!r}, {len(self)} blocks, pinned={dict(self.pinned)})"


class Family(ABC):
    """One kind of model. Subclasses are stateless; they register themselves with `@register("name")`.

    Attributes:
        name: set by `register`.
        summary: one line for the README's and the CLI's tables.
        priority: families are asked in falling order of priority; `auto` comes last.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    priority: ClassVar[int] = 10

    @abstractmethod
    def matches(self, host: Host) -> bool:
        """Whether this family describes the model."""

    @abstractmethod
    def stacks(self, host: Host) -> list[Stack]:
        """The stacks in forward order, their names relative to `host.root`.

        Raises:
            UnsupportedModelError: if the model cannot be pruned; the message says what was found and why.
        """

    def shrink(self, settings: dict[str, Any], stacks: Sequence[Stack], kept: Mapping[str, Sequence[int]]) -> None:
        """Edit a copy of the model's settings in place so that they describe the kept blocks only."""
        for stack in stacks:
            if stack.count is not None:
                stack.count.write(settings, kept[stack.name])
            elif len(kept[stack.name]) < len(stack):
                why = f" ({stack.uncounted})" if stack.uncounted else ""
                raise SurgeryError(f"no setting counts the blocks of {stack.name} alone{why}")


def nested(settings: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The settings at a path of keys."""
    for part in path:
        settings = settings[part]
    return settings


def chained(stacks: Sequence[Stack]) -> list[Stack]:
    """Stacks of which each takes the output of the one before, as the stages of a CNN do."""
    return [replace(stack, next_stack=after.name) for stack, after in itertools.pairwise(stacks)] + list(stacks[-1:])


families: Registry[Family] = Registry("model family", "deeparc_hf.architectures", Family)
register = families.register


def signature_pins(blocks: Sequence[nn.Module], *, in_turn: bool = True) -> dict[int, str]:
    """Pin the blocks whose parameters differ in name or shape from those of all others.

    Such a block cannot stand for another: it changes the shape of its input, or owns something that the others use
    (T5's relative attention bias). Of two blocks that differ, the first is pinned. Where there are more and no two are
    alike, nothing is pinned by this rule. Kinds that come in turn (Jamba's, Twins' two attentions) may go where a build
    without them has the rest as it was, which is asked later.

    Args:
        in_turn: whether they may; else all are pinned but those of the most frequent kind.
    """
    shapes = block_shapes(blocks)
    common = max(shapes, key=shapes.count, default={})
    if len(shapes) == 2:
        common = shapes[1]
    elif shapes.count(common) < 2:
        return {}
    pins = {}
    for index, shape in enumerate(shapes):
        if in_turn and shapes.count(shape) > 1:
            continue
        own = sorted(set(shape) - set(common))
        lacks = sorted(set(common) - set(shape))
        changed = sorted(name for name in set(shape) & set(common) if shape[name] != common[name])
        if own:
            pins[index] = f"owns {_first(own)}, which the other blocks do not have"
        elif lacks:
            pins[index] = f"lacks {_first(lacks)}, which the other blocks have"
        elif changed:
            pins[index] = f"changes shape: its {_first(changed)} differs from that of the other blocks"
    return pins


def block_shapes(blocks: Sequence[nn.Module]) -> list[dict[str, tuple[int, ...]]]:
    """Of each block, the shapes of its parameters by name. Blocks that have the same are of one kind."""
    return [{name: shape_of(p) for name, p in block.named_parameters()} for block in blocks]


def family_of(host: Host) -> Family:
    """The family that describes a model.

    Raises:
        UnsupportedModelError: if there is none.
    """
    for family in sorted((cls() for cls in families), key=lambda f: (-f.priority, f.name)):
        if family.matches(host):
            return family
    raise UnsupportedModelError(
        f"No family of deeparc_hf describes {host.label}, of {host.library}. Known families: "
        f"{', '.join(families.names())}. To support it, add a family: one file, see 'add a family' in CONTRIBUTING.md."
    )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
