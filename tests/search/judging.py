"""What the tests of the search share: how far a model is from another, computed apart from the workbench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deeparc_hf import Frontier, MPruneConfig
from deeparc_hf.architectures import describe
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.observe.outputs import heads_of
from deeparc_hf.pruning.plan import ComparedStack, make_plan
from deeparc_hf.search.frontier import Point
from deeparc_hf.search.objectives.divergence import relative_errors

__all__ = ["divergence", "made_up"]


def divergence(whole: nn.Module, smaller: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """How far a model's outputs are from another's."""
    losses, weights = torch.zeros(2, dtype=torch.float64)
    hosts = [describe(model).host for model in (whole, smaller)]
    with evaluating(whole), evaluating(smaller):
        for inputs in Calibration(batches, 10**6).inputs(hosts[0]):
            wanted, found = (heads_of(host, host.root(**host.inputs_in(inputs)), inputs) for host in hosts)
            more = relative_errors(found, wanted)
            losses, weights = losses + more[0].sum(dim=1), weights + more[1].sum(dim=1)
    return float((losses / weights).sum())


def made_up(times: bool = True, metric: bool = True, stacks: tuple[str, ...] = ("layers",)) -> Frontier:
    """A frontier of six blocks in each stack, of which four of the first went one after another."""
    ones = tuple(tuple(1.0 if i == j else 0.9 - abs(i - j) / 100 for j in range(6)) for i in range(6))
    compared = {name: ComparedStack(ones, parameters=(10,) * 6) for name in stacks}
    plan = make_plan(compared, MPruneConfig(num_blocks=6 * len(stacks), heal="lstsq", freeze="none"), 256)
    points = []
    for count, gone in enumerate([(), (3,), (3, 4), (1, 3, 4), (1, 2, 3, 4)]):
        points.append(
            Point(
                {stacks[0]: gone} if gone else {},
                6 * len(stacks) - count,
                1000 - 100 * count,
                0.1 * count,
                (0.09 * count, 0.12 * count),
                0.9 - 0.02 * count if metric else None,
                6 / (6 - count) if times else None,
                5.5 / (6 - count) if times and count else None,
                (5.0 / (6 - count), 6.5 / (6 - count)) if times and count else None,
            )
        )
    work = "a forward pass for 32 samples" if times else None
    return Frontier(tuple(points), plan, "greedy", "divergence", 96, 4.5, work)
