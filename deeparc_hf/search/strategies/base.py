"""What a strategy is: it goes from the whole model to smaller ones, and gives those that it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import ClassVar

from ...core.registry import Registry
from ..playback import Block
from ..workbench import Node, Removed, Workbench

__all__ = ["MOST_TRIED", "Additions", "Free", "Strategy", "nearest", "register", "strategies", "tried"]

Free = Callable[[Removed], list[Block]]  # the blocks that may go beside those that are removed

MOST_TRIED = 32  # blocks beside a set, once all have been tried beside an earlier one


class Strategy(ABC):
    """Searches for the best blocks to remove. Subclasses are stateless.

    Attributes:
        name: set by `register`.
        summary: one line for the tables of the documents and the command line.
        refines: whether a better model may come after the first of its number of blocks.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    refines: ClassVar[bool] = False

    @abstractmethod
    def run(self, bench: Workbench, free: Free, most: int) -> Iterator[Node]:
        """Give models with 1, 2, ..., `most` blocks removed, as they are found; of a number several times where a
        better one is found later.
        """

    @staticmethod
    @abstractmethod
    def passes(blocks: int, most: int, repaired: bool) -> float:
        """About how many forward passes over the calibration data it takes, of a model of so many free blocks, with
        their repairs or without.
        """


class Additions:
    """Tries which blocks may go beside others.

    Where they are many, those come again that were missed least when they were last tried, as in lazy greedy search
    (Minoux 1978, doi 10.1007/BFb0006528): the more is gone the more each is missed, so what came last stays behind
    until those before it have fallen back. Those that would make another gap than they did then, for a block beside
    them has gone, are tried in any case.

    Args:
        most: so many are tried at most.
    """

    def __init__(self, bench: Workbench, free: Free, most: int = MOST_TRIED) -> None:
        self._bench, self._free, self._most = bench, free, most
        self._last: dict[Block, tuple[tuple[int, int], float]] = {}  # the gap it made, and how much it was missed

    def judged(self, node: Node, but: Collection[Removed] = ()) -> list[Removed]:
        """The sets with one more block that were judged in full, the best first.

        Args:
            node: the model to which one is added.
            but: sets that are not to be tried.
        """
        blocks = [block for block in self._free(node.removed) if node.removed | {block} not in but]
        if not blocks:
            return []
        scores = self._bench.screen(node, self._promising(node.removed, blocks))
        for block, score in scores.items():
            self._last[block] = _gap(node.removed, block), score.value - node.score.first(score.samples).value
        return [node.removed | {block} for block in self._bench.complete(scores)]

    def best(self, node: Node, count: int) -> list[Node]:
        """The best models of those, computed in full, the best first."""
        found = [self._bench.follow(removed, node) for removed in self.judged(node)[:count]]
        return sorted(found, key=lambda each: each.score.value)

    def _promising(self, removed: Removed, blocks: list[Block]) -> list[Block]:
        if len(blocks) <= self._most:
            return blocks
        known = {block: self._last[block] for block in blocks if block in self._last}
        new = [block for block in blocks if block not in known or known[block][0] != _gap(removed, block)]
        old = sorted((block for block in blocks if block not in new), key=lambda block: known[block][1])
        taken = {*new, *old[: max(self._most - len(new), 0)]}
        return [block for block in blocks if block in taken]


def _gap(removed: Removed, block: Block) -> tuple[int, int]:
    """Where in its stack there is a gap once a block is gone too: the first and the last that are missing."""
    stack, first = block
    last = first
    while (stack, first - 1) in removed:
        first -= 1
    while (stack, last + 1) in removed:
        last += 1
    return first, last


def tried(blocks: int, gone: int, most: int = MOST_TRIED) -> int:
    """About how many blocks are tried beside so many that are gone, of so many free ones."""
    return min(blocks - gone, most) if gone else blocks


def nearest(bench: Workbench, removed: Removed, nodes: Sequence[Node]) -> Node:
    """Of known models the one from which another is computed at least cost: that which differs from it latest."""

    def differs(node: Node) -> int:
        apart = (number for number, block in enumerate(bench.order) if (block in removed) != (block in node.removed))
        return next(apart, len(bench.order))

    return max(nodes, key=differs)


strategies: Registry[Strategy] = Registry("search", "deeparc_hf.search.strategies", Strategy)
register = strategies.register
