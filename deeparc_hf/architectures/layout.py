"""The layout of a model's blocks: of every stack, how many blocks there were, and which of them sit where now."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from ..core.block_paths import block_path, place_in

__all__ = ["Layout"]

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Which blocks are left, and where they sit. Numbers before a removal are called indices here, those after it
    places. A stack that is not named is whole.

    Attributes:
        lengths: by stack name, the number of blocks before.
        kept: by stack name, the indices of the blocks that are left, rising: block `kept[name][place]` sits at `place`.
        beside: by stack name, the paths of lists outside of it that have an entry for each of its blocks, which goes
            with the block. Entries after those stay.

    Raises:
        ValueError: if the two name other stacks, or indices do not rise or are none of the stack's.
    """

    lengths: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.lengths.keys() != self.kept.keys():
            raise ValueError(f"Lengths are of {list(self.lengths)}, kept blocks of {list(self.kept)}.")
        for name, kept in self.kept.items():
            if list(kept) != sorted(set(kept) & set(range(self.lengths[name]))):
                raise ValueError(f"{kept} are no rising indices of the {self.lengths[name]} blocks of {name}.")

    @classmethod
    def whole(cls, lengths: Mapping[str, int]) -> Layout:
        """Nothing is removed."""
        return cls.without(lengths, {})

    @classmethod
    def without(
        cls,
        lengths: Mapping[str, int],
        removed: Mapping[str, Sequence[int]],
        beside: Mapping[str, tuple[str, ...]] = types.MappingProxyType({}),
    ) -> Layout:
        """Blocks are removed: by stack name, their indices."""
        gone = {name: set(removed.get(name, ())) for name in lengths}
        kept = {name: tuple(i for i in range(length) if i not in gone[name]) for name, length in lengths.items()}
        return cls(dict(lengths), kept, dict(beside))

    @property
    def removed(self) -> dict[str, tuple[int, ...]]:
        """Indices of the blocks that are gone, for the stacks that have lost any."""
        gone = {name: tuple(sorted(set(range(n)) - set(self.kept[name]))) for name, n in self.lengths.items()}
        return {name: indices for name, indices in gone.items() if indices}

    @property
    def counts(self) -> dict[str, int]:
        """By stack name, the number of blocks that are left."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def then(self, step: Layout) -> Layout:
        """This removal and one after it, as one; the later one's indices are this one's places.

        Raises:
            ValueError: if the later one is of another number of blocks.
        """
        for name in self.counts.keys() & step.lengths.keys():
            if self.counts[name] != step.lengths[name]:
                raise ValueError(f"{self.counts[name]} blocks of {name} are left, not {step.lengths[name]}.")
        later = {name: self.kept[name] if name in self.kept else range(step.lengths[name]) for name in step.kept}
        return Layout(
            {**step.lengths, **self.lengths},
            {**self.kept, **{name: tuple(later[name][i] for i in step.kept[name]) for name in step.kept}},
            {**self.beside, **step.beside},
        )

    def since(self, earlier: Layout) -> Layout:
        """What was removed after an earlier layout of the same blocks, in its places: `earlier.then(step)` is this one.

        Raises:
            ValueError: naming the first stack that is no part of the earlier one.
        """
        step = {}
        whole = {**self.lengths, **earlier.lengths}
        for name in {**earlier.kept, **self.kept}:
            before = earlier.kept[name] if name in earlier.kept else tuple(range(whole[name]))
            now = self.kept.get(name, before)
            if not set(now) <= set(before) or self.lengths.get(name, whole[name]) != whole[name]:
                raise ValueError(name)
            step[name] = tuple(before.index(i) for i in now)
        return Layout({name: earlier.counts.get(name, whole[name]) for name in step}, step)

    def places(self, indices: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """Where blocks sit now, by stack; those that are gone are left out."""
        found = {name: self.kept.get(name, range(max(blocks, default=0) + 1)) for name, blocks in indices.items()}
        return {n: tuple(found[n].index(i) for i in blocks if i in found[n]) for n, blocks in indices.items()}

    def indices(self, places: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """What the blocks at these places were called before, by stack."""
        return {name: tuple(self.kept[name][i] if name in self.kept else i for i in at) for name, at in places.items()}

    def renamed(self, path: str) -> str | None:
        """The path that a module, or the key of a tensor, has now; None if it is gone with its block.

        A pattern (fnmatch) that gives the number of a block follows it; one that has a wildcard there means whichever
        blocks there are, and stays.
        """
        for name, kept in self.kept.items():
            place = place_in(name, path)
            if place is not None:
                index, inner = place
                return block_path(name, kept.index(index), inner) if index in kept else None
            for entries in self.beside.get(name, ()):
                place = place_in(entries, path)
                if place is not None:
                    index, inner = place
                    left = self.entries_left(name, index + 1)
                    return block_path(entries, left.index(index), inner) if index in left else None
        return path

    def entries_left(self, name: str, length: int) -> list[int]:
        """Which entries stay of a list beside a stack that has so many."""
        gone = self.removed.get(name, ())
        return [index for index in range(length) if index not in gone]

    def renamed_keys(self, entries: Mapping[str, T]) -> dict[str, T]:
        """What is noted under paths, under those of now; what is gone is left out."""
        return {new: entry for path, entry in entries.items() if (new := self.renamed(path)) is not None}
