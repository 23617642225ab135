"""Evolution: of each number of removed blocks a set is mutated, and its best offspring takes its place.

After EvoPress (Sieberling et al. 2025, arXiv 2410.14649): one parent, mutations that keep the number of removed blocks.
Offspring are judged on all data at once, and the first parent is not random: it is the best set of the number before
and the block that is missed least beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from math import comb
from random import Random

from ..workbench import Node, Removed, Workbench
from .base import Additions, Free, Strategy, nearest, register

__all__ = ["Evolution"]

_SEED = 0
_OFFSPRING = 6  # of each generation
_GENERATIONS = 15  # at most, for each number of blocks
_PATIENCE = 3  # generations without a better one
_DRAWS = 20  # for each of the offspring, until one is new


@register("evolution")
class Evolution(Strategy):
    summary = "one or two removed blocks are exchanged at random, and the best of several such sets goes on (EvoPress)"
    refines = True

    def run(self, bench: Workbench, free: Free, most: int) -> Iterator[Node]:
        random, additions, node = Random(_SEED), Additions(bench, free), bench.root
        for _ in range(most):
            found = additions.best(node, 1)
            if not found:
                return
            node = found[0]
            node = yield from _generations(bench, free, node, random)

    @staticmethod
    def passes(blocks: int, most: int, repaired: bool) -> float:
        sets = [min(comb(blocks, count), 5 * _OFFSPRING) for count in range(1, most + 1)]
        return 0.7 * sum(sets)


def _generations(bench: Workbench, free: Free, node: Node, random: Random) -> Generator[Node, None, Node]:
    """Gives better and better models with as many blocks removed; no set is computed twice. Returns the best."""
    judged, idle = {node.removed}, 0
    yield node
    for _ in range(_GENERATIONS):
        parent = node
        for removed in _offspring(parent.removed, free, judged, random):
            judged.add(removed)
            child = bench.follow(removed, nearest(bench, removed, [parent, node, bench.root]))
            if child.score.value < node.score.value:
                node = child
        if node is not parent:
            yield node
        idle = idle + 1 if node is parent else 0
        if idle == _PATIENCE:
            break
    return node


def _offspring(parent: Removed, free: Free, judged: Collection[Removed], random: Random) -> list[Removed]:
    """New sets, some; none where no more are found."""
    found: list[Removed] = []
    for _ in range(_OFFSPRING * _DRAWS):
        child = _mutated(parent, free, random)
        if child is not None and child not in judged and child not in found:
            found.append(child)
        if len(found) == _OFFSPRING:
            break
    return found


def _mutated(parent: Removed, free: Free, random: Random) -> Removed | None:
    """One or two removed blocks exchanged for kept ones, one three times as often; None where it cannot be."""
    count = min(random.randint(1, 2), random.randint(1, 2), len(parent))
    gone = random.sample(sorted(parent), count)
    child = parent.difference(gone)
    for _ in gone:
        choices = [block for block in free(child) if block not in gone]
        if not choices:
            return None
        child |= {random.choice(choices)}
    return child
