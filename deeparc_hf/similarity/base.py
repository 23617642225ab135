"""What a similarity metric is: additive sums over rows of activations or outputs, and a matrix made from the sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.registry import Registry
from .divergence import Head

__all__ = [
    "ROW_KINDS",
    "BlockMetric",
    "GroupMetric",
    "SimilarityMetric",
    "SkippingMetric",
    "add_to",
    "centered_gram",
    "centered_grams",
    "metrics",
    "register",
]

ROW_KINDS = ("tokens", "mean", "first", "flat")


class BlockMetric(ABC):
    """Compares the blocks of one stack on calibration data. There are two kinds, by what they look at: see the
    subclasses.

    An instance holds one stack's sums. All of them are sums over rows (or groups of rows), so those of several
    processes add up: `matrix` is a pure function of the sums.

    Attributes:
        name: set by `register`.
        summary: one line for the README's and the CLI's tables.
        rows: what a row is, in a word.
        min_rows: fewest rows that give a value.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    rows: ClassVar[str]
    min_rows: ClassVar[int] = 2

    @abstractmethod
    def finish(self) -> dict[str, Tensor]:
        """Take in what is still buffered and return the sums, float64. No `update` may follow."""

    @staticmethod
    @abstractmethod
    def matrix(sums: Mapping[str, Tensor]) -> Tensor:
        """The similarity matrix, shape (L, L), float64; 1 on the diagonal, NaN in the rows of a constant block.

        Entry (i, j) is for block i staying and block j going, where that makes a difference.
        """


class SimilarityMetric(BlockMetric):
    """Compares the outputs of the blocks, given rows of them in portions; one forward pass of the model feeds it.

    Attributes:
        rows: which rows are compared unless the user says otherwise: "tokens" (every unpadded position), "mean" (the
            mean over a sample's unpadded positions), "first" (a sample's first unpadded position) or "flat" (a sample's
            whole output).
        row_kinds: the rows that the metric can compare; those with "flat" override `update_grams`.
        tokens_per_sample: at most this many evenly spaced positions of a sample where rows are tokens; None: all.
    """

    rows: ClassVar[str] = "mean"
    row_kinds: ClassVar[tuple[str, ...]] = ("tokens", "mean", "first")
    tokens_per_sample: ClassVar[int | None] = None

    @abstractmethod
    def update(self, rows: Sequence[Tensor], samples: Tensor) -> None:
        """Take the next rows.

        Args:
            rows: one tensor of shape (N, D) a block, in float32 or float64; row i of all of them is the same place of
                the same sample.
            samples: shape (N,); rows of one sample share a number, and stand together.
        """

    def update_grams(self, grams: Tensor) -> None:
        """Take the Gram matrices of a batch of whole outputs, which are too large to be kept as rows.

        The metric's matrix must be symmetric: of blocks of different stacks one of two entries is kept.

        Args:
            grams: shape (L, N, N), float64; inner products of the rows of each block, their mean taken off
                (`centered_gram`).
        """
        raise NotImplementedError(f"{self.name} does not compare whole outputs.")


class GroupMetric(SimilarityMetric):
    """Compares rows in groups of a fixed number, so that results do not depend on the batch size.

    Attributes:
        group_size: rows of a full group. The last may be smaller, or up to twice as large to avoid a small remainder.
    """

    group_size: ClassVar[int]

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._parts: list[Tensor] = []  # each (L, n, D)
        self._count = 0

    def update(self, rows: Sequence[Tensor], samples: Tensor) -> None:
        if not len(rows[0]):
            return
        self._parts.append(torch.stack(list(rows)))
        self._count += len(rows[0])
        if self._count < 2 * self.group_size:
            return
        joined = torch.cat(self._parts, dim=1)
        # one group's worth always stays back for the remainder to join
        full = self._count // self.group_size - 1
        self._parts = [joined[:, full * self.group_size :]]
        self._count -= full * self.group_size
        for rows_of_group in torch.split(joined[:, : full * self.group_size], self.group_size, dim=1):
            add_to(self._sums, self.sums_of(rows_of_group))

    def finish(self) -> dict[str, Tensor]:
        if self._count >= self.min_rows:
            add_to(self._sums, self.sums_of(torch.cat(self._parts, dim=1)))
        return self._sums

    @abstractmethod
    def sums_of(self, group: Tensor) -> dict[str, Tensor | float]:
        """What a group adds to the sums; its shape is (L, n, D)."""


class SkippingMetric(BlockMetric):
    """Compares what the model puts out with what it puts out while one block is skipped; each block costs a forward
    pass.

    Args:
        blocks: number of blocks of the stack, L.
    """

    rows: ClassVar[str] = "outputs"
    min_rows: ClassVar[int] = 1

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    @abstractmethod
    def update(self, block: int, full: Sequence[Head], skipped: Sequence[Head]) -> None:
        """Take the next rows of the model's outputs. Pinned blocks are never skipped.

        Args:
            block: index of the block that was skipped.
            full, skipped: the outputs of the whole model and of the model without that block; the same heads in the
                same order, row i of both is the same place of the same sample.
        """


metrics: Registry[BlockMetric] = Registry("similarity metric", "deeparc_hf.similarity", BlockMetric)
register = metrics.register


def add_to(sums: dict[str, Tensor], more: Mapping[str, Tensor | float]) -> None:
    """Add to the sums of these names; numbers become float64."""
    for name, value in more.items():
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        sums[name] = sums[name] + value if name in sums else value


def centered_grams(group: Tensor) -> Tensor:
    """`centered_gram` of each block's rows: shape (L, n, D) -> (L, n, n)."""
    return torch.stack([centered_gram(rows) for rows in group])


def centered_gram(rows: Tensor, columns: int = 2**16) -> Tensor:
    """Gram matrix of one block's rows, their mean taken off first: shape (n, D) -> (n, n), float64.

    So many columns at a time: rows of whole images (256 x 56 x 56 values) are never held in float64 all at once.
    """
    device = "cpu" if rows.device.type == "mps" else rows.device  # mps has no float64
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
    for part in torch.split(rows, columns, dim=1):
        part = part.to(device, torch.float64)
        # the first row comes off before the mean, so that a constant block is zero to the bit, not to rounding
        part = part - part[0]
        part = part - part.mean(dim=0)
        gram.addmm_(part, part.T)
    return gram
