"""Search for the best blocks to remove, for each number of them, by what the smaller and healed model puts out.

What is best to remove when the kept blocks are repaired may be among the worst to remove when they are not, and
likeness of blocks need not find it: so every candidate is repaired, in closed form, before it is judged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures import Subject, describe
from ..checkpoint.record import check_record
from ..core.caller import warn_caller
from ..core.checks import is_number
from ..core.distributed import agree
from ..core.environment import package_versions
from ..core.progress_bars import bar
from ..errors import CalibrationWarning, ConfigError, PlanError, RegistryError
from ..observe.batches import cut
from ..observe.calibration import Calibration
from ..observe.forward import evaluating, require_weights
from ..pruning.compare import check_settings, compare_blocks, uncompared_plan
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..pruning.surgery import refuse_wrapped
from .frontier import Frontier, Point
from .journal import Journal
from .objectives import ModelObjective, Objective, objectives
from .playback import Block
from .strategies import Strategy, strategies
from .timing import BlockTimes, compare_times, time_blocks, work_of
from .workbench import SENSITIVITY_PASSES, Node, Removed, Workbench, by_stack

__all__ = ["check_search", "check_speedup", "find_frontier", "search_blocks", "search_plan"]

logger = logging.getLogger(__name__)

_SCORES = 4  # counts up where the same search gives other scores than in an earlier version
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
            each number of blocks.
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
    _check_goals(total, num_blocks, max_value)
    config = MPruneConfig(
        num_blocks=-(-total // 2) if num_blocks is None else num_blocks,
        heal=heal,
        search=search,
        objective=objective,
        protect=(protect,) if isinstance(protect, str) else tuple(protect),
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
    progress: bool = True,
) -> PruningPlan:
    """The plan that a search finds for the target of the settings.

    Args:
        batches: what the model is looked at on, as it takes them.
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
    if 0 in (most, _wanted(subject.lengths, config)):
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
    total = sum(map(len, subject.stacks.values()))
    whole = config.replace(num_blocks=total)
    plan = compare_blocks(
        subject, Calibration(batches, config.calibration_samples), whole, progress=progress, labels=labels
    )
    free = _Free(plan, config)
    wanted = _wanted(subject.lengths, config)
    wanted = (free.most if most is None else most) if wanted is None else wanted
    most = min(wanted, free.most)
    if most < 1 or (most < wanted and config.target in ("num_blocks", "keep_ratio") and not at_most):
        raise PlanError(
            f"The search is to remove {wanted} of {total} blocks, and {free.most} may go: the others are pinned or "
            f"protected, or min_blocks={config.min_blocks} keeps them. Keep more blocks, or protect fewer."
        )
    asked = {} if journal is None else _asked(subject, batches, config, evaluate, greater_is_better)
    repaired = config.heal is not None
    about = strategy.passes(len(free(frozenset())), most, repaired) + (SENSITIVITY_PASSES if repaired else 0.0)
    told = strategy.name, goal.unit, about, plan.samples
    logger.info("%s search for the least %s: about %.0f forward passes over %d samples.", *told)
    title = f"Searching, about {about:.0f} passes over the data"
    with evaluating(subject.root), bar(title, progress, round(about), "pass") as shown:
        bench = Workbench(
            subject,
            batches,
            goal(),
            heals=repaired,
            measure=_measure(goal, evaluate, greater_is_better),
            shared=shared,
            journal=Journal(journal, asked),
            tell=lambda passes: _advance(shown, passes),
        )
        found = _Found(subject, bench, cut(batches[0], _TIMED), evaluate, measures, shared)
        ends = _Ends(max_value, config.speedup)
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
            f"objective={config.objective!r} is what evaluate=... of search_blocks measures, and there is none. Give "
            "one, or take objective='divergence'."
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

    times = agree(time_them)
    fastest = config.speedup if times is None else times.speedup(free(frozenset()))
    if fastest < config.speedup:
        raise PlanError(
            f"speedup={config.speedup:g} cannot be reached: with every block gone that may go the model would be "
            f"{fastest:.2f} times as fast ({times.work}). Ask for less, or protect fewer blocks."
        )


@dataclass(frozen=True)
class _Ends:
    """Where a search need not go further."""

    max_value: float | None
    speedup: float | None

    def too_bad(self, node: Node) -> bool:
        return self.max_value is not None and node.score.value > self.max_value

    def enough(self, point: Point) -> bool:
        return self.speedup is not None and point.speedup is not None and point.speedup >= self.speedup


def _run(
    strategy: type[Strategy],
    bench: Workbench,
    free: _Free,
    most: int,
    ends: _Ends,
    found: _Found,
    may_break_off: bool,
) -> bool:
    """Search; whether it came to its end."""
    reached = most
    try:
        for node in strategy().run(bench, free, most):
            if ends.too_bad(node):
                return True
            if len(node.removed) > reached:
                return True
            if ends.enough(found.add(node)):
                reached = len(node.removed)
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


def _wanted(lengths: Mapping[str, int], config: MPruneConfig) -> int | None:
    """How many blocks the settings ask to remove; None where they do not say."""
    total = sum(lengths.values())
    if isinstance(config.num_blocks, dict):
        return sum(lengths[name] - count for name, count in config.num_blocks.items())
    if isinstance(config.num_blocks, int):
        return total - config.num_blocks
    return None if config.keep_ratio is None else total - round(total * config.keep_ratio)


class _Free:
    """Which blocks may go beside those that are removed already."""

    def __init__(self, plan: PruningPlan, config: MPruneConfig) -> None:
        self._blocks = {
            name: [i for i in range(len(stack)) if i not in stack.pinned and i not in stack.protected]
            for name, stack in plan.stacks.items()
        }
        stay = dict.fromkeys(plan.stacks, config.min_blocks)
        if isinstance(config.num_blocks, dict):
            stay |= {name: len(stack) for name, stack in plan.stacks.items()}
            stay |= {name: max(count, config.min_blocks) for name, count in config.num_blocks.items()}
        self._room = {name: max(len(stack) - stay[name], 0) for name, stack in plan.stacks.items()}

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
    """The best model of each number of blocks, and its measures."""

    def __init__(
        self,
        subject: Subject,
        bench: Workbench,
        timed: Mapping[str, Any],
        evaluate: Callable[[nn.Module], float] | None,
        measures: Collection[str],
        shared: bool,
    ) -> None:
        self.found: dict[int, tuple[Node, Point]] = {}
        self.times: BlockTimes | None = None
        self._subject, self._bench, self._evaluate = subject, bench, evaluate
        self._work, self._agree = work_of(subject.host, timed), agree if shared else _alone
        self._makes, self._compares = evaluate is not None or "models" in measures, "models" in measures
        if "blocks" in measures:
            self.times = self._agree(partial(time_blocks, subject.host, bench.modules, self._work))
        self._whole = self._point(bench.root, subject.root)

    def add(self, node: Node) -> Point:
        """Keep a model, if it is the best of its number of blocks, with the measures of it."""
        count = len(node.removed)
        if count not in self.found or node.score.value < self.found[count][0].score.value:
            self.found[count] = node, self._measured(node) if self._makes else self._point(node, None)
        return self.found[count][1]

    def points(self) -> tuple[Point, ...]:
        return (self._whole, *(self.found[count][1] for count in sorted(self.found)))

    def time(self, point: Point) -> None:
        """Time a model that was found beside the whole one, where memory suffices for a copy of it."""
        node, known = next((entry for entry in self.found.values() if entry[1] is point), (None, point))
        if node is None or known.measured is not None:
            return
        node.repairs  # noqa: B018  computed in all processes, if that is still to be done

        def compare() -> Point:
            try:
                return self._timed(known, self._bench.make(node))
            except Exception as error:  # a time is told, and decides nothing: a model that cannot be copied has none
                told = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.info("The smaller model is not timed, because it cannot be copied: %s", told)
                return known

        self.found[len(node.removed)] = node, self._agree(compare)

    def _measured(self, node: Node) -> Point:
        """Make the smaller model, as a copy, and measure it."""
        smaller = self._bench.make(node)
        point = self._point(node, smaller)
        return self._timed(point, smaller) if self._compares else point

    def _timed(self, point: Point, smaller: nn.Module) -> Point:
        ratio, interval = compare_times(self._subject.host, describe(smaller).host, self._work)
        return dataclasses.replace(point, measured=ratio, measured_interval=interval)

    def _point(self, node: Node, model: nn.Module | None) -> Point:
        """`model`: the smaller one, where it was made."""
        gone = {id(p) for block in node.removed for p in self._bench.modules[block].parameters()}
        left = [p.numel() for p in self._subject.root.parameters() if id(p) not in gone]
        return Point(
            {name: tuple(indices) for name, indices in by_stack(node.removed).items()},
            len(self._bench.order) - len(node.removed),
            sum(left if model is None else (p.numel() for p in model.parameters())),
            node.score.value,
            node.score.interval,
            None if self._evaluate is None or model is None else _finite(_evaluated(self._evaluate, model)),
            None if self.times is None else self.times.speedup(node.removed),
        )


def _alone(work: Callable[[], Any]) -> Any:
    return work()


def _check_goals(total: int, num_blocks: int | None, max_value: float | None) -> None:
    """Refuse what no search could reach, before any work is done."""
    if num_blocks is not None and (type(num_blocks) is not int or num_blocks < 1):
        raise ConfigError(f"num_blocks counts the blocks that stay, so it must be at least 1, found {num_blocks!r}.")
    if num_blocks is not None and num_blocks >= total:
        raise PlanError(
            f"num_blocks counts the blocks that stay, and the model has {total} blocks, found {num_blocks}. Give a "
            "smaller number."
        )
    if max_value is not None and not is_number(max_value):
        raise ConfigError(f"max_value must be a finite number, found {max_value!r}.")


def _measure(
    goal: type[Objective], evaluate: Callable[[nn.Module], float] | None, greater_is_better: bool
) -> Callable[[nn.Module], float] | None:
    """What gives the loss of a model, for objectives that look at models."""
    if evaluate is None or not issubclass(goal, ModelObjective):
        return None
    return lambda model: goal.loss(_evaluated(evaluate, model), greater_is_better)


def _evaluated(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """What the user measures; many functions leave the model training."""
    value = float(evaluate(model))
    model.eval()
    return value


def _finite(value: float) -> float | None:
    if math.isfinite(value):
        return value
    warn_caller(f"evaluate gave {value} for a model. Its metric is left out.", CalibrationWarning)
    return None


def _advance(shown: Any, passes: float) -> None:
    if shown.total is not None and shown.n + passes > shown.total:
        shown.total = None
    shown.update(passes)


def _asked(
    subject: Subject,
    batches: Sequence[Mapping[str, Any]],
    config: MPruneConfig,
    evaluate: Callable[[nn.Module], float] | None,
    greater_is_better: bool,
) -> dict[str, Any]:
    """What the scores of a search depend on."""
    judged = config.objective
    if issubclass(objectives.get(judged), ModelObjective):
        judged += f", {_name_of(evaluate)}, {greater_is_better}"
    state = {name: value for name, value in subject.root.state_dict().items() if isinstance(value, torch.Tensor)}
    return {
        "model": [subject.name, subject.lengths],
        "weights": _digest([state]),
        "config": hashlib.sha256(json.dumps(subject.host.settings(), sort_keys=True, default=str).encode()).hexdigest(),
        "data": _digest(batches),
        "settings": {name: getattr(config, name) for name in ("heal", "search", "min_blocks")},
        "objective": judged,
        "protect": list(config.protect),
        "versions": package_versions(),
        "scores": _SCORES,
    }


def _name_of(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _digest(batches: Sequence[Mapping[str, Any]]) -> str:
    """What tells the data of one search from that of another."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
