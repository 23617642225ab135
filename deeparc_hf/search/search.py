"""Search for the best blocks to remove, for each number of them, by what the smaller and healed model puts out.

What is best to remove when the kept blocks are repaired is among the worst to remove when they are not, and likeness of
blocks finds neither: so every candidate is repaired, in closed form, before it is judged.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures import Subject, describe
from ..checkpoint.record import check_record
from ..checkpoint.weights_mark import mark_of_model
from ..core.caller import warn_caller
from ..core.progress_bars import bar
from ..core.transaction import Transaction
from ..errors import CalibrationWarning, ConfigError, PlanError, RegistryError
from ..healing.heal import apply_healing
from ..observe.batches import cut
from ..observe.calibration import Calibration
from ..observe.forward import evaluating, require_weights
from ..pruning.compare import compare_blocks
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..pruning.surgery import refuse_wrapped, remove_blocks
from .frontier import Frontier, Point
from .journal import Journal
from .objectives import objectives
from .playback import Block
from .strategies import Strategy, strategies
from .timing import BlockTimes, Work, compare_times, time_blocks, work_of
from .workbench import Node, Removed, Workbench, by_stack

__all__ = ["search_blocks"]

logger = logging.getLogger(__name__)

_TIMED = 32  # samples of the batch that is timed, at most


def search_blocks(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    heal: str | None = "lstsq",
    evaluate: Callable[[nn.Module], float] | None = None,
    greater_is_better: bool = True,
    search: str = "greedy",
    objective: str = "divergence",
    num_blocks: int | None = None,
    max_value: float | None = None,
    samples: int = 256,
    protect: Sequence[str] = (),
    min_blocks: int = 1,
    freeze: str | Sequence[str] = "none",
    measure_times: bool = True,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Frontier:
    """Search for the best blocks to remove. The model is left as it is.

    Five eighths of the samples are for the repairs, the others judge. What every block puts out is kept in memory for
    all of them, about twice: samples x positions x width x blocks values. After Ctrl-C the frontier holds what was
    found so far, where that is anything.

    Args:
        model: a model that `find_stacks` knows.
        dataloader: any iterable of batches, as for `analyze`. Use training data, never the data you evaluate on.
        heal: "lstsq" repairs the kept block before each removal, in closed form; None leaves the blocks as they are.
        evaluate: measures a model, on data of its own; called with the whole model and with the best smaller one of
            each number of blocks.
        greater_is_better: whether a larger number from `evaluate` is better.
        search: the strategy: "greedy", "exchange", "beam" or "evolution".
        objective: what is made small: "divergence" of the outputs from the whole model's (no labels needed), "hidden"
            (the last hidden states), or the model's "loss".
        num_blocks: how far to go: the fewest blocks that stay; default: half of them.
        max_value: stop where the objective is larger than this.
        samples: the most samples to use.
        protect, min_blocks, freeze: as in `MPruneConfig`; the plans take them over.
        measure_times: time the blocks, and each of the smaller models beside the whole one.
        journal: a file where scores are kept; a search that was killed goes on with it.
        progress: show a progress bar on a terminal.

    Returns:
        The frontier: print it, and `frontier.choose(speedup=1.5)` gives a plan.

    Raises:
        CalibrationError: if the data is empty or too little, or the model cannot run on it.
        ConfigError: if a setting makes no sense, or the journal is of another search.
        PlanError: if no block can go.
        UnsupportedModelError, SurgeryError: as `analyze` and `remove_blocks`.
    """
    strategy, goal = _registered(search, objective)
    subject = describe(model)
    refuse_wrapped(model)
    require_weights(subject.host)
    check_record(subject, 0)
    total = sum(map(len, subject.stacks.values()))
    fewest = -(-total // 2) if num_blocks is None else num_blocks
    protected = (protect,) if isinstance(protect, str) else tuple(protect)
    config = MPruneConfig(
        num_blocks=total,
        heal=heal,
        protect=protected,
        min_blocks=min_blocks,
        freeze=freeze,
        calibration_samples=samples,
    )
    batches = list(Calibration(dataloader, samples).inputs(subject.host))
    plan = compare_blocks(subject, Calibration(batches, samples), config, progress=progress)
    free = _Free(plan, min_blocks)
    most = min(total - fewest, free.most)
    if most < 1:
        raise PlanError(
            f"No block can go: {total} blocks, of which {fewest} or more are to stay, and {free.most} may go at all. "
            "Ask for fewer (num_blocks), or protect fewer."
        )
    asked = {
        "model": [subject.name, subject.lengths, mark_of_model(subject.root)],
        "data": _digest(batches),
        "settings": {"heal": heal, "objective": objective, "search": search, "min_blocks": min_blocks},
        "protect": list(protected),
    }
    about = strategy.passes(len(free(frozenset())), most)
    logger.info("%s search: about %.0f forward passes over %d samples.", search, about, plan.samples)
    with (
        evaluating(subject.root),
        bar(f"Searching, about {about:.0f} passes over the data", progress, round(about), "pass") as shown,
    ):
        bench = Workbench(
            subject,
            batches,
            goal(),
            heals=heal is not None,
            journal=Journal(journal, asked),
            tell=lambda passes: _advance(shown, passes),
        )
        found = _Found(subject, bench, cut(batches[0], _TIMED), evaluate, measure_times)
        complete = _run(strategy, bench, free, most, max_value, found)
    return Frontier(
        points=found.points(),
        plan=plan,
        search=search,
        objective=objective,
        samples=bench.root.score.samples,
        passes=bench.passes,
        work=None if found.times is None else found.times.work,
        greater_is_better=greater_is_better,
        complete=complete,
    )


def _run(
    strategy: type[Strategy], bench: Workbench, free: _Free, most: int, max_value: float | None, found: _Found
) -> bool:
    """Search; whether it came to its end."""
    try:
        for node in strategy().run(bench, free, most):
            if max_value is not None and node.score.value > max_value:
                return True
            found.add(node)
    except KeyboardInterrupt:
        if not found.nodes:
            raise
        warn_caller(
            f"The search was broken off after {len(found.nodes)} of {most} numbers of blocks: the frontier holds what "
            "was found.",
            CalibrationWarning,
        )
        return False
    return True


class _Free:
    """Which blocks may go beside those that are removed already."""

    def __init__(self, plan: PruningPlan, min_blocks: int) -> None:
        self._blocks = {
            name: [i for i in range(len(stack)) if i not in stack.pinned and i not in stack.protected]
            for name, stack in plan.stacks.items()
        }
        self._room = {name: max(len(stack) - min_blocks, 0) for name, stack in plan.stacks.items()}

    @property
    def most(self) -> int:
        return sum(min(len(blocks), self._room[name]) for name, blocks in self._blocks.items())

    def __call__(self, removed: Removed) -> list[Block]:
        gone = by_stack(removed)
        return [
            (name, index)
            for name, blocks in self._blocks.items()
            if len(gone.get(name, ())) < self._room[name]
            for index in blocks
            if (name, index) not in removed
        ]


class _Found:
    """The best model of each number of blocks, made for real and measured."""

    def __init__(
        self,
        subject: Subject,
        bench: Workbench,
        timed: Any,
        evaluate: Callable[[nn.Module], float] | None,
        measures: bool,
    ) -> None:
        self.nodes: dict[int, Node] = {}
        self.times: BlockTimes | None = None
        self._subject, self._bench, self._evaluate = subject, bench, evaluate
        self._work: Work | None = None
        if measures:
            self._work = work_of(subject.host, timed)
            self.times = time_blocks(subject.host, bench.modules, self._work)
        self._measured: dict[Removed, Point] = {}
        self._whole = self._point(bench.root, subject.root)

    def add(self, node: Node) -> None:
        """Keep a model, if it is the best of its number of blocks, and the measures of it."""
        count = len(node.removed)
        known = self.nodes.get(count)
        if known is None or node.score.value < known.score.value:
            self.nodes[count] = node
            self._measured.pop(known.removed, None) if known is not None else None
            self._measured[node.removed] = self._measure(node)

    def points(self) -> tuple[Point, ...]:
        return (self._whole, *(self._measured[self.nodes[count].removed] for count in sorted(self.nodes)))

    def _measure(self, node: Node) -> Point:
        """Make the smaller model, as a copy, and measure it."""
        smaller = copy.deepcopy(self._subject.root)
        removed = by_stack(node.removed)
        remove_blocks(smaller, removed, example=self._bench.example)
        pruned = describe(smaller)
        with Transaction() as undo:
            for (name, index), healing in node.repairs.items():
                place = index - sum(gone < index for gone in removed.get(name, ()))
                apply_healing(healing, pruned.stacks[name].blocks[place], undo)
        point = self._point(node, smaller)
        if self._work is None:
            return point
        ratio, interval = compare_times(self._subject.host, pruned.host, self._work)
        return dataclasses.replace(point, measured=ratio, measured_interval=interval)

    def _point(self, node: Node, model: nn.Module) -> Point:
        removed = {name: tuple(indices) for name, indices in by_stack(node.removed).items()}
        metric = None
        if self._evaluate is not None:
            metric = float(self._evaluate(model))
        return Point(
            removed,
            len(self._bench.order) - len(node.removed),
            sum(p.numel() for p in model.parameters()),
            node.score.value,
            node.score.interval,
            metric,
            None if self.times is None else self.times.speedup(node.removed),
        )


def _registered(search: str, objective: str) -> tuple[type[Strategy], Any]:
    try:
        return strategies.get(search), objectives.get(objective)
    except RegistryError as error:
        raise ConfigError(str(error)) from None


def _advance(shown: Any, passes: float) -> None:
    if shown.total is not None and shown.n + passes > shown.total:
        shown.total = None
    shown.update(passes)


def _digest(batches: Sequence[dict[str, Any]]) -> str:
    """What tells the data of one search from that of another."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
