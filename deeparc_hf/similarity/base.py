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

_STRIP = 128  # rows of a Gram matrix that are computed at once
_AT_ONCE = 4  # blocks whose rows are held in float64 at once

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
        # (L, up to two groups, D), of which the first `_count` rows of each block are filled
        self._waiting = torch.empty(0)
        self._count = 0

    def update(self, rows: Sequence[Tensor], samples: Tensor) -> None:
        size, taken, given = self.group_size, 0, len(rows[0])
        form = (rows[0].shape, rows[0].dtype)
        if any((block.shape, block.dtype) != form for block in rows):
            raise ValueError(f"Rows must have one shape and dtype, found {[(*b.shape, b.dtype) for b in rows]}.")
        while taken < given:
            more = min(given - taken, 2 * size - self._count)
            self._make_room(rows, self._count + more)
            for waiting, block in zip(self._waiting, rows, strict=True):
                waiting[self._count : self._count + more] = block[taken : taken + more]
            taken, self._count = taken + more, self._count + more
            if self._count == 2 * size:
                add_to(self._sums, self.sums_of(self._waiting[:, :size]))
                # one group always stays back for the remainder to join
                self._waiting[:, :size] = self._waiting[:, size:]
                self._count = size

    def _make_room(self, rows: Sequence[Tensor], needed: int) -> None:
        have = self._waiting.shape[1] if self._count else 0
        if have >= needed:
            return
        grown = rows[0].new_empty(len(rows), min(max(needed, 2 * have), 2 * self.group_size), rows[0].shape[1])
        if self._count:
            grown[:, : self._count] = self._waiting[:, : self._count]
        self._waiting = grown

    def finish(self) -> dict[str, Tensor]:
        if self._count >= self.min_rows:
            add_to(self._sums, self.sums_of(self._waiting[:, : self._count]))
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
    blocks, count, _ = group.shape
    grams = torch.empty(blocks, count, count, dtype=torch.float64, device=_home(group))
    for some, rows in zip(torch.split(grams, _AT_ONCE), torch.split(group, _AT_ONCE), strict=True):
        some.copy_(centered_gram(rows))
    return grams


def centered_gram(rows: Tensor, columns: int = 2**16) -> Tensor:
    """Gram matrix of one block's rows, their mean taken off first: shape (n, D) -> (n, n), float64; or of several
    blocks, whose dimension comes first.

    So many columns at a time: rows of whole images (256 x 56 x 56 values) are never held in float64 all at once.
    """
    device, count = _home(rows), rows.shape[-2]
    gram = torch.zeros(*rows.shape[:-1], count, dtype=torch.float64, device=device)
    strips = [slice(start, start + _STRIP) for start in range(0, count, _STRIP)]
    for part in torch.split(rows, columns, dim=-1):
        part = part.to(device, torch.float64)
        # the first row comes off before the mean, so that a constant block is zero to the bit, not to rounding
        part = part - part[..., :1, :]
        part -= part.mean(dim=-2, keepdim=True)
        for strip in strips:  # what lies below the diagonal is the same once more
            gram[..., strip, strip.start :] += part[..., strip, :] @ part[..., strip.start :, :].mT
    for strip in strips:
        gram[..., strip.stop :, strip] = gram[..., strip, strip.stop :].mT
    return gram


def _home(rows: Tensor) -> str | torch.device:
    """Where their Gram matrices are computed: mps has no float64."""
    return "cpu" if rows.device.type == "mps" else rows.device
