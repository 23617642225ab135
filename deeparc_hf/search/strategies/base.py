"""What a strategy is: it goes from the whole model to smaller ones, and gives those that it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from ...core.registry import Registry
from ..playback import Block
from ..workbench import Node, Removed, Workbench

__all__ = ["Free", "Strategy", "best_additions", "nearest", "register", "strategies"]

Free = Callable[[Removed], list[Block]]  # the blocks that may go beside those that are removed


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


def best_additions(bench: Workbench, node: Node, free: Free, count: int) -> list[Node]:
    """The best models with one more block removed, judged in full, the best first."""
    scores = bench.complete(bench.screen(node, free(node.removed)))
    found = [bench.follow(node.removed | {block}, node) for block in list(scores)[:count]]
    return sorted(found, key=lambda each: each.score.value)


def nearest(bench: Workbench, removed: Removed, nodes: Sequence[Node]) -> Node:
    """Of known models the one from which another is computed at least cost: that which differs from it latest."""

    def differs(node: Node) -> int:
        apart = (number for number, block in enumerate(bench.order) if (block in removed) != (block in node.removed))
        return next(apart, len(bench.order))

    return max(nodes, key=differs)


strategies: Registry[Strategy] = Registry("search", "deeparc_hf.search.strategies", Strategy)
register = strategies.register
