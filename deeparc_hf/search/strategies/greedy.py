"""Greedy: one block after another, each time that whose removal and repair costs least.

SLEB (Song et al. 2024, arXiv 2402.09025) goes so without repairs.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..workbench import Node, Workbench
from .base import Additions, Free, Strategy, register, tried

__all__ = ["Greedy"]

_FINALISTS = 2


@register("greedy")
class Greedy(Strategy):
    summary = "one block after another, each time the one that is missed least after the repair"

    def run(self, bench: Workbench, free: Free, most: int) -> Iterator[Node]:
        additions, node = Additions(bench, free), bench.root
        for _ in range(most):
            found = additions.best(node, _FINALISTS)
            if not found:
                return
            node = found[0]
            yield node

    @staticmethod
    def passes(blocks: int, most: int, repaired: bool) -> float:
        candidates = sum(tried(blocks, gone) for gone in range(most))
        length = 1 - most / blocks / 2  # of a pass, for fewer and fewer blocks are left
        # all candidates on an eighth of the samples, the better halves on more, from their block on; and their fits
        each = 0.42 * 0.5 + (1.8 / blocks if repaired else 0.0)
        return 1 + length * (candidates * each + _FINALISTS * most * 0.6)
