"""Search for the best blocks to remove, for each number of them, by what the smaller and healed model puts out.

What is best to remove when the kept blocks are repaired may be among the worst to remove when they are not, and
likeness of blocks need not find it: so every candidate is repaired, in closed form, before it is judged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import Subject, describe
from ..checkpoint.record import check_record
from ..core.caller import warn_caller
from ..core.checks import is_number, unboxed
from ..core.distributed import agree
from ..core.plain_text import quoted
from ..core.progress_bars import bar, duration
from ..core.sentence_encoders import with_inner
from ..core.shards import moves_together
from ..errors import CalibrationWarning, ConfigError, PlanError, RegistryError
from ..observe.batches import cut
from ..observe.calibration import Calibration
from ..observe.forward import evaluating, require_weights
from ..pruning.compare import check_settings, compare_blocks, uncompared_plan
from ..pruning.config import MPruneConfig
from ..pruning.may_go import check_reachable, may_go, wanted_removals
from ..pruning.plan import ComparedStack, PruningPlan
from ..pruning.surgery import refuse_wrapped
from .found import Ends, Evaluation, Found
from .frontier import Frontier, Point
from .journal import Journal, asked_of
from .objectives import ModelObjective, Objective, objectives
from .playback import Block
from .strategies import Strategy, strategies
from .timing import BlockTimes, time_blocks, work_of
from .workbench import SENSITIVITY_PASSES, Removed, Workbench, by_stack

__all__ = ["check_search", "check_speedup", "find_frontier", "search_blocks", "search_plan"]

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
    samples: int = 1024,
    protect: Sequence[str] = (),
    min_blocks: int = 1,
    freeze: str | tuple[str, ...] = "none",
    measure_times: bool = True,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Frontier:
    """Search for the best blocks to remove. The model is left as it is.

    All samples judge, each quarter by repairs that were fitted on the others. What every block puts out is kept in
    memory for all of them, about twice (samples x positions x width x blocks values), and the whole model's outputs:
    where that would be more than 4 GB, fewer samples are used. After Ctrl-C the frontier holds what was found so far,
    where that is anything.

    Args:
        model: a model that `find_stacks` knows.
        dataloader: any iterable of batches, as for `analyze`. Use training data, never the data you evaluate on.
        heal: "lstsq" repairs the kept block before each removal, in closed form; None leaves the blocks as they are.
        evaluate: measures a model, on data of its own; called with the whole model and with the best smaller one of
            each number of blocks; of sentence-transformers' models with the whole encoder.
        greater_is_better: whether a larger number from `evaluate` is better.
        search: the strategy: "greedy", "exchange", "beam" or "evolution".
        objective: what is made small: "divergence" of the outputs from the whole model's (no labels needed), "hidden"
            (the last hidden states), the model's "loss", or the "metric" of `evaluate`: each candidate is made and
            measured then.
        num_blocks: how far to go: the fewest blocks that stay; default: half of them.
        max_value: stop where the objective is larger than this.
        samples: the most samples to use.
        protect: patterns of blocks that stay, as in `MPruneConfig`.
        min_blocks: the fewest blocks that stay in each stack.
        freeze: as in `MPruneConfig`, for the plans.
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
    subject = describe(model)
    refuse_wrapped(model)
    require_weights(subject.host)
    check_record(subject, 0)
    total = sum(map(len, subject.stacks.values()))
    num_blocks, max_value, samples = unboxed(num_blocks), unboxed(max_value), unboxed(samples)
    _check_goals(total, num_blocks, max_value, samples)
    config = MPruneConfig(
        num_blocks=-(-total // 2) if num_blocks is None else num_blocks,
        heal=heal,
        search=search,
        objective=objective,
        protect=protect,  # type: ignore[arg-type]  # made a tuple there
        min_blocks=min_blocks,
        freeze=freeze,
        calibration_samples=samples,
    )
    return find_frontier(
        subject,
        list(Calibration(dataloader, samples).inputs(subject.host)),
        config,
        evaluate=evaluate,
        greater_is_better=greater_is_better,
        max_value=max_value,
        measures=("blocks", "models") if measure_times else (),
        journal=journal,
        progress=progress,
        at_most=True,
    )


def search_plan(
    model: nn.Module | Subject,
    batches: Sequence[Mapping[str, Any]],
    config: MPruneConfig,
    *,
    most: int | None = None,
    labels: Mapping[str, tuple[int, ...]] | None = None,
    shared: bool = False,
    evaluate: Callable[[nn.Module], float] | None = None,
    greater_is_better: bool = True,
    progress: bool = True,
) -> PruningPlan:
    """The plan that a search finds for the target of the settings.

    Args:
        batches: what the model is looked at on, as it takes them.
        evaluate, greater_is_better: as in `search_blocks`, for the objective "metric".
        most: blocks that go at most; needed where the target is "max_drop", and the plan is the last one then.
        labels: as in `compare_blocks`.
        shared: whether all processes search, on the same batches, and share the work.

    Raises:
        PlanError: if the target cannot be reached; and as `search_blocks`.
    """
    subject, target = describe(model), config.target
    if isinstance(config.num_blocks, tuple):
        raise PlanError(
            f"num_blocks lists {len(config.num_blocks)} targets, one for each iteration of a training with "
            "MPruneCallback. Give one target."
        )
    if target == "max_drop" and most is None:
        raise ConfigError(
            "max_drop is judged after a retraining, in a training with MPruneCallback. Without one give num_blocks, "
            "keep_ratio or speedup."
        )
    check_settings(subject, config)
    whole = config.replace(num_blocks=sum(subject.lengths.values()))
    if most is not None:
        most = min(most, _Free(uncompared_plan(subject, whole, labels), config).most)
    if 0 in (most, wanted_removals(subject.lengths, config)):
        calibration = Calibration(batches, config.calibration_samples)
        return compare_blocks(subject, calibration, whole, progress=progress, labels=labels)  # nothing is to go
    chosen: list[int] = []

    def choose(points: Sequence[Point]) -> Point:
        """By the times of the blocks, which a later timing of the smaller model may not quite reach."""
        point = points[-1]
        if target == "speedup":
            enough = [each for each in points if (each.speedup or 0.0) >= (config.speedup or 0.0)]
            fastest = max(points, key=lambda each: each.speedup or 0.0)
            if not enough:
                raise PlanError(
                    f"speedup={config.speedup:g} cannot be reached: the fastest model that was found is "
                    f"{fastest.speedup or 0.0:.3g} times as fast, with {fastest.num_blocks} blocks. Ask for less."
                )
            point = enough[0]
        chosen.append(points.index(point))
        return point

    frontier = find_frontier(
        subject,
        batches,
        config,
        evaluate=evaluate,
        greater_is_better=greater_is_better,
        measures=("blocks",),
        most=most,
        labels=labels,
        shared=shared,
        progress=progress,
        choose=choose,
    )
    return frontier.plan_of(frontier.points[chosen[0]])


def find_frontier(
    subject: Subject,
    batches: Sequence[Mapping[str, Any]],
    config: MPruneConfig,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    greater_is_better: bool = True,
    max_value: float | None = None,
    measures: Collection[str] = (),
    journal: str | Path | None = None,
    most: int | None = None,
    at_most: bool = False,
    labels: Mapping[str, tuple[int, ...]] | None = None,
    shared: bool = False,
    progress: bool = True,
    choose: Callable[[Sequence[Point]], Point] | None = None,
) -> Frontier:
    """`search_blocks` with settings as a training has them.

    Args:
        measures: "blocks": the blocks are timed; "models": each smaller model is made, as a copy, and timed.
        most: blocks that go at most, where the settings do not say.
        at_most: whether fewer may go than the settings ask for, where not so many can, or Ctrl-C ends the search.
        choose: names one of the models that were found, which is timed beside the whole one at the end.
    """
    strategy, goal = check_search(config, measured=evaluate is not None)
    if callable(evaluate) and subject.host.outer is not None:
        evaluate = with_inner(subject.host.outer, subject.root, evaluate)
    total = sum(map(len, subject.stacks.values()))
    whole = config.replace(num_blocks=total)
    check_settings(subject, whole)
    measured = None if evaluate is None else Evaluation(evaluate, subject.root)
    judge = None if measured is None else str(measured)
    known = Journal(journal, {} if journal is None else asked_of(subject, batches, config, judge, greater_is_better))
    plan = compare_blocks(
        subject, Calibration(batches, config.calibration_samples), whole, progress=progress, labels=labels
    )
    check_reachable(*_known_of(plan), config, at_most=at_most)
    free = _Free(plan, config)
    wanted = wanted_removals(subject.lengths, config)
    wanted = most if wanted is None else wanted
    most = free.most if wanted is None else min(wanted, free.most)
    repaired = config.heal is not None
    about = strategy.passes(len(free(frozenset())), most, repaired) + (SENSITIVITY_PASSES if repaired else 0.0)
    title = f"Searching, about {about:.0f} passes over the data"
    with evaluating(subject.root), bar(title, progress, round(about), "pass") as shown:
        bench = Workbench(
            subject,
            batches,
            goal(),
            heals=repaired,
            measure=_measure(goal, measured, greater_is_better),
            shared=shared,
            journal=known,
            tell=lambda passes: _advance(shown, passes),
        )
        told = strategy.name, goal.unit, about, bench.samples, duration(about * bench.seconds)
        logger.info("%s search for the least %s: about %.0f forward passes over %d samples, %s.", *told)
        ends = Ends(max_value, config.speedup)
        found = Found(subject, bench, cut(batches[0], _TIMED), measured, measures, ends, shared)
        complete = _run(strategy, bench, free, most, ends, found, at_most)
        if choose is not None:
            found.time(choose(found.points()))
    return Frontier(
        points=found.points(),
        plan=plan,
        search=strategy.name,
        objective=goal.name,
        samples=0 if issubclass(goal, ModelObjective) else bench.root.score.samples,
        passes=bench.passes,
        work=None if found.times is None else found.times.work,
        greater_is_better=greater_is_better,
        complete=complete,
    )


def check_search(config: MPruneConfig, measured: bool = False) -> tuple[type[Strategy], type[Objective]]:
    """The strategy and the objective that settings name; `measured`: there is an `evaluate`.

    Raises:
        ConfigError: if there is none of that name, or it needs an `evaluate`.
    """
    try:
        strategy, goal = strategies.get(config.search or "greedy"), objectives.get(config.objective)
    except RegistryError as error:
        raise ConfigError(str(error)) from None
    if issubclass(goal, ModelObjective) and not measured:
        raise ConfigError(
            f"objective={config.objective!r} is what evaluate=... of analyze or search_blocks measures, and there is "
            "none. Give one, or take objective='divergence'."
        )
    return strategy, goal


def check_speedup(subject: Subject, calibration: Calibration, config: MPruneConfig) -> None:
    """Time the blocks on a batch, and refuse a speed-up that would not be reached if all went that may go.

    Raises:
        PlanError: in every process.
    """
    assert config.speedup is not None
    whole = config.replace(num_blocks=sum(subject.lengths.values()))
    free = _Free(uncompared_plan(subject, whole), whole)

    def time_them() -> BlockTimes | None:
        inputs = next(calibration.inputs(subject.host), None)
        if inputs is None:
            return None
        modules = {(name, i): block for name, stack in subject.stacks.items() for i, block in enumerate(stack.blocks)}
        return time_blocks(subject.host, modules, work_of(subject.host, cut(inputs, _TIMED)))

    times = agree(time_them, together=moves_together(subject.root))
    fastest = config.speedup if times is None else times.speedup(free.slowest(times.shares))
    if fastest < config.speedup:
        raise PlanError(
            f"speedup={config.speedup:g} cannot be reached: with every block gone that may go the model would be "
            f"{fastest:.2f} times as fast ({times.work}). Ask for less, or protect fewer blocks."
        )


def _run(
    strategy: type[Strategy],
    bench: Workbench,
    free: _Free,
    most: int,
    ends: Ends,
    found: Found,
    may_break_off: bool,
) -> bool:
    """Search; whether it came to its end."""
    deepest = 0
    try:
        for node in strategy().run(bench, free, most):
            if len(node.removed) > deepest:  # those with fewer blocks removed are as good as they get, or nearly
                if found.is_enough or (deepest and deepest not in found.found):
                    return True
                deepest = len(node.removed)
            if not ends.too_bad(node):
                found.add(node)
            if not strategy.refines and (found.is_enough or ends.too_bad(node)):
                return True
    except KeyboardInterrupt:
        if not found.found or not may_break_off:
            raise
        warn_caller(
            f"The search was broken off after {len(found.found)} of {most} numbers of blocks: the frontier holds what "
            "was found.",
            CalibrationWarning,
        )
        return False
    return True


def _known_of(plan: PruningPlan) -> tuple[dict[str, ComparedStack], dict[str, tuple[int, ...]]]:
    """The stacks of a plan, and their protected blocks."""
    stacks = plan.stacks.items()
    return {name: stack.compared for name, stack in stacks}, {name: stack.protected for name, stack in stacks}


class _Free:
    """Which blocks may go beside those that are removed already."""

    def __init__(self, plan: PruningPlan, config: MPruneConfig) -> None:
        self._stacks = may_go(*_known_of(plan), config)

    @property
    def most(self) -> int:
        return sum(stack.most for stack in self._stacks.values())

    def slowest(self, shares: Mapping[Block, float]) -> list[Block]:
        """The blocks that take most of the time, as many as may go."""
        return [
            block
            for name, stack in self._stacks.items()
            for block in sorted(((name, i) for i in stack.blocks), key=lambda each: -shares[each])[: stack.room]
        ]

    def __call__(self, removed: Removed) -> list[Block]:
        gone = by_stack(removed)
        return [
            (name, index)
            for name, stack in self._stacks.items()
            if len(gone.get(name, ())) < stack.room
            for index in stack.blocks
            if (name, index) not in removed
        ]


def _check_goals(total: int, num_blocks: int | None, max_value: float | None, samples: int) -> None:
    """Refuse what no search could reach, before any work is done."""
    if num_blocks is not None and (type(num_blocks) is not int or num_blocks < 1):
        raise ConfigError(
            "num_blocks counts the blocks that stay, of all stacks, so it must be a whole number from 1, found "
            f"{quoted(num_blocks)}."
        )
    if type(samples) is not int or samples < 1:
        raise ConfigError(f"samples must be a whole number from 1, found {quoted(samples)}.")
    if num_blocks is not None and num_blocks >= total:
        raise PlanError(
            f"num_blocks counts the blocks that stay, and the model has {total} blocks, found {num_blocks}. Give a "
            "smaller number."
        )
    if max_value is not None and not is_number(max_value):
        raise ConfigError(f"max_value must be a finite number, found {quoted(max_value)}.")


def _measure(
    goal: type[Objective], evaluate: Callable[[nn.Module], float] | None, greater_is_better: bool
) -> Callable[[nn.Module], float] | None:
    """What gives the loss of a model, for objectives that look at models."""
    if evaluate is None or not issubclass(goal, ModelObjective):
        return None
    return lambda model: goal.loss(evaluate(model), greater_is_better)


def _advance(shown: Any, passes: float) -> None:
    if shown.total is not None and shown.n + passes > shown.total:
        shown.total = None
    shown.update(passes)
