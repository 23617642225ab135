"""Tensors outside of the blocks that have a part for each block: Gemma 3n's embeddings for each layer, the weights of
ESM's contact head. Where a stock build with a block less has a shorter one, a removal takes the block's part out of it;
or joins two parts, where they act between blocks (YOLOS).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Layout

__all__ = ["AddedBetween", "PerBlockTensor", "find_per_block", "left_by_path"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PerBlockTensor:
    """A parameter or buffer outside of the blocks, with a part for each of them, in their order.

    Attributes:
        path: its name in the model.
        dim: the dimension along which the parts lie.
        known: whether the family answers for it. Otherwise the outputs have to show which part is which block's.
    """

    path: str
    dim: int
    known: bool = False

    def left(self, tensor: Tensor, length: int, kept: Sequence[int]) -> Tensor:
        """The parts of these blocks, in this order: (..., length * n, ...) becomes (..., len(kept) * n, ...)."""
        by_block = tensor.detach().unflatten(self.dim, (length, -1))
        index = torch.tensor(list(kept), device=tensor.device)
        return by_block.index_select(self.dim, index).flatten(self.dim, self.dim + 1)

    def shape_left(self, shape: Shape, length: int, left: int) -> Shape:
        """The shape of the parts of so many blocks."""
        return (*shape[: self.dim], shape[self.dim] // length * left, *shape[self.dim + 1 :])


@dataclass(frozen=True)
class AddedBetween(PerBlockTensor):
    """One with a part for each two neighbours instead, which is added to what the first of them passes to the second.

    Where blocks between two others are gone, what was added on the way is added at once. The first block and the last
    have to stay: before and after them nothing is added.
    """

    def left(self, tensor: Tensor, length: int, kept: Sequence[int]) -> Tensor:
        """The sums of the parts between these blocks: (..., length - 1, ...) becomes (..., len(kept) - 1, ...)."""
        ways = itertools.pairwise(kept)
        sums = [tensor.detach().narrow(self.dim, one, other - one).sum(self.dim, keepdim=True) for one, other in ways]
        return torch.cat(sums, self.dim)

    def shape_left(self, shape: Shape, length: int, left: int) -> Shape:
        """The shape of the parts between so many blocks."""
        return (*shape[: self.dim], shape[self.dim] - (length - left), *shape[self.dim + 1 :])


def find_per_block(
    before: Mapping[str, Shape], after: Mapping[str, Shape], length: int, left: int
) -> list[PerBlockTensor]:
    """The tensors that a build with fewer blocks has shorter by the blocks' parts.

    Args:
        before, after: shapes by name; a name that is only in one of them is passed over.
        length, left: how many blocks there are in each.
    """
    found = []
    for path in before.keys() & after.keys():
        own, new = before[path], after[path]
        dims = [dim for dim, (one, other) in enumerate(zip(own, new, strict=False)) if one != other]
        if len(own) == len(new) and len(dims) == 1 and own[dims[0]] % length == 0:
            tensor = PerBlockTensor(path, dims[0])
            found += [tensor] if tensor.shape_left(own, length, left) == new else []
    return sorted(found, key=lambda tensor: tensor.path)


def left_by_path(
    per_block: Mapping[str, Sequence[PerBlockTensor]], layout: Layout
) -> dict[str, tuple[PerBlockTensor, int, tuple[int, ...]]]:
    """By name of a tensor that a removal shortens: how, how many blocks it has parts of, and which of them stay.

    Args:
        per_block: by stack.
    """
    return {
        tensor.path: (tensor, layout.lengths[name], layout.kept[name])
        for name in layout.removed
        for tensor in per_block.get(name, ())
    }
