"""Exchange: greedy, and after each step single removed blocks are exchanged for kept ones while that lowers the score.

Floating selection (Pudil et al. 1994, doi 10.1016/0167-8655(94)90127-9) goes back so, with features in place of blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

from ..workbench import Node, Removed, Workbench
from .base import Additions, Free, Strategy, nearest, register, tried
from .greedy import Greedy

__all__ = ["Exchange"]

_FINALISTS = 2
_ROUNDS = 4  # at most so many times each removed block is tried, for each number of them


@register("exchange")
class Exchange(Strategy):
    summary = "greedy, and removed blocks are exchanged for kept ones while that helps; never worse than greedy"
    refines = True

    def run(self, bench: Workbench, free: Free, most: int) -> Iterator[Node]:
        additions, node, earlier = Additions(bench, free), bench.root, bench.root
        values = {0: node.score.value}  # the best so far, by the number of removed blocks
        for greedy in Greedy().run(bench, free, most):
            start, grown = greedy, {earlier.removed, node.removed}
            if node.removed != earlier.removed:
                start = min([greedy, *additions.best(node, _FINALISTS)], key=lambda each: each.score.value)
            earlier = greedy
            node = yield from _exchanged(bench, additions, start, grown, values)

    @staticmethod
    def passes(blocks: int, most: int, repaired: bool) -> float:
        total = Greedy.passes(blocks, most, repaired)
        models = 1.6 if repaired else 1.0  # two for each removed block, beside a screening
        for count in range(2, most + 1):
            kept = blocks - count + 1
            total += count * kept / blocks * (models + 0.25 * tried(blocks, count - 1))
        return total


def _exchanged(
    bench: Workbench, additions: Additions, node: Node, grown: Collection[Removed], values: dict[int, float]
) -> Generator[Node, None, Node]:
    """Exchange blocks until none helps. Gives each better model, also one with a block less; returns the best.

    Args:
        grown: sets to which the best block was added already.
    """
    tried, judged, count = set(grown), {node.removed}, len(node.removed)
    values[count] = node.score.value
    yield node
    for _ in range(_ROUNDS):
        before = node
        for block in sorted(before.removed, key=bench.order.index, reverse=True):
            fewer = node.removed - {block}
            if fewer in tried:
                continue
            tried.add(fewer)
            base = bench.follow(fewer, nearest(bench, fewer, [node, bench.root]))
            if base.score.value < values[count - 1]:
                values[count - 1] = base.score.value
                yield base
            best = additions.judged(base, but=judged)
            if not best:
                continue
            found = bench.follow(best[0], base)
            judged.add(found.removed)
            if found.score.value < node.score.value:
                node = found
                values[count] = node.score.value
                yield node
        if node is before:
            break
    return node
