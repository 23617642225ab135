"""Beam search: of each number of removed blocks the best few sets are kept, and each of them grows.

The usual beam search of Lowerre 1976 and since; greedy goes beside, so that the beam is never worse.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..workbench import Node, Workbench
from .base import Additions, Free, Strategy, register, tried
from .greedy import Greedy

__all__ = ["Beam"]

_WIDTH = 3


@register("beam")
class Beam(Strategy):
    summary = "the best three sets of each number of blocks are kept, and grow; never worse than greedy"

    def run(self, bench: Workbench, free: Free, most: int) -> Iterator[Node]:
        additions, members = Additions(bench, free), [bench.root]
        for greedy in Greedy().run(bench, free, most):
            found, judged = [greedy], {greedy.removed}
            while members:
                parent = members.pop()  # and forgotten: a node holds what all its blocks put out
                for removed in additions.judged(parent)[:_WIDTH]:
                    if removed not in judged:
                        judged.add(removed)
                        found.append(bench.follow(removed, parent))
                        found = sorted(found, key=lambda each: each.score.value)[:_WIDTH]
            members = found
            yield members[0]

    @staticmethod
    def passes(blocks: int, most: int, repaired: bool) -> float:
        candidates = sum(tried(blocks, gone) for gone in range(most))
        return Greedy.passes(blocks, most, repaired) + _WIDTH * candidates * 0.2 + most * (2.0 if repaired else 1.2)
