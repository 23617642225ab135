"""The frontier of a search: for each number of blocks the best model that was found, and what it costs and saves."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.checks import MAX_BLOCKS, Entry, MalformedError, at_most, is_number, read_json, unboxed
from ..core.files import finite
from ..core.plain_text import plain, quoted
from ..core.tables import html_table, runs, text_table
from ..errors import ConfigError, PlanError
from ..pruning.choice import Choice, Lesser
from ..pruning.plan import PruningPlan, chosen_plan
from .drawing import plot_frontier

__all__ = ["Frontier", "Point"]

FORMAT_VERSION = 1
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """One model on the frontier.

    Attributes:
        removed: by stack, the blocks that go.
        num_blocks: blocks that stay.
        parameters: that the model has then.
        value: of the objective, on the samples that judged; lower is better.
        interval: 95 %, over these samples.
        metric: what the user's `evaluate` gave; None without one.
        speedup: how many times as fast the model should be, by the times of its blocks; None: not timed.
        measured: the same, measured on the smaller model; None: not measured.
        measured_interval: 95 %, of the median over the turns.
    """

    removed: Mapping[str, tuple[int, ...]]
    num_blocks: int
    parameters: int
    value: float
    interval: Interval | None = None
    metric: float | None = None
    speedup: float | None = None
    measured: float | None = None
    measured_interval: Interval | None = None

    @property
    def faster(self) -> float | None:
        """How many times as fast it is: measured, or else by the times of the blocks."""
        return self.speedup if self.measured is None else self.measured

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()} | {
            "removed": {name: list(indices) for name, indices in self.removed.items()}
        }


@dataclass(frozen=True)
class Frontier:
    """What a search found.

    Attributes:
        points: the whole model first, then a model for each number of blocks that was reached, fewer and fewer.
        plan: the blocks as they were compared, and the settings; nothing is removed.
        search, objective: names of the strategy, and of what it made small.
        samples: that models were judged on.
        passes: forward passes over all calibration samples that the search took.
        work: what was timed, in words; None: nothing was.
        greater_is_better: whether a larger metric is better.
        complete: whether the search came to its end.
    """

    points: tuple[Point, ...]
    plan: PruningPlan
    search: str
    objective: str
    samples: int
    passes: float = 0.0
    work: str | None = None
    greater_is_better: bool = True
    complete: bool = True

    @property
    def whole(self) -> Point:
        """The model as it was given."""
        return self.points[0]

    def choose(
        self,
        *,
        num_blocks: int | None = None,
        parameters: float | None = None,
        speedup: float | None = None,
        max_drop: float | None = None,
        max_value: float | None = None,
        freeze: str | Sequence[str] | None = None,
    ) -> PruningPlan:
        """The plan for a budget: with `num_blocks` the model with so many blocks, with `parameters` or `speedup` the
        largest one that is small or fast enough, with `max_drop` or `max_value` the smallest one that is good enough.

        Args:
            num_blocks: blocks that stay.
            parameters: the most that it may have.
            speedup: how many times as fast it must be: as measured, where it was, else by the times of the blocks.
            max_drop: how much worse than the whole model's the metric of `evaluate` may be.
            max_value: the most that the objective may be.
            freeze: as in `MPruneConfig`; default: what the search was told.

        Returns:
            A plan like any other: `prune_model(model, dataloader, plan)` carries it out and heals.

        Raises:
            ConfigError: if there is not exactly one budget, or it is of something that was not measured.
            PlanError: if no model that was found meets it.
        """
        budgets = {
            "num_blocks": num_blocks,
            "parameters": parameters,
            "speedup": speedup,
            "max_drop": max_drop,
            "max_value": max_value,
        }
        given = {name: unboxed(value) for name, value in budgets.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                f"Exactly one of {', '.join(budgets)} says which model is wanted, found {', '.join(given) or 'none'}."
            )
        ((name, value),) = given.items()
        if not is_number(value):
            raise ConfigError(f"{name} must be a finite number, found {quoted(value)}.")
        return self.plan_of(self._within(name, float(value)), freeze)

    def plan_of(self, point: Point, freeze: str | Sequence[str] | None = None) -> PruningPlan:
        """The plan that leads to a model of the frontier; `freeze` as in `choose`."""
        lesser = [each for each in self.points[1:] if each.num_blocks > point.num_blocks]
        choice = Choice(
            self.search,
            self.objective,
            point.value,
            point.interval,
            self.samples,
            point.speedup,
            point.measured,
            tuple(Lesser(each.removed, each.value, each.faster) for each in lesser),
        )
        settings = {} if freeze is None else {"freeze": freeze}
        return chosen_plan(self.plan, point.removed, choice, **settings)

    def plot(self, x: str | None = None, ax: Any = None) -> Any:
        """Draw quality against time or size: the objective, and the metric where there is one, with their intervals.
        Needs matplotlib.

        Args:
            x: "speedup", "parameters" or "num_blocks"; default: "speedup" where times are known, else "parameters".
            ax: matplotlib Axes to draw into; default: those of a new figure.

        Raises:
            ConfigError: if nothing was timed and x is "speedup".
            MissingDependencyError: if matplotlib is not installed.
        """
        return plot_frontier(self, x, ax)

    # ---- JSON ----

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "search": self.search,
            "objective": self.objective,
            "samples": self.samples,
            "passes": self.passes,
            "work": self.work,
            "greater_is_better": self.greater_is_better,
            "complete": self.complete,
            "points": [point.to_dict() for point in self.points],
            "plan": self.plan.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Frontier:
        """The inverse of `to_dict`.

        Raises:
            PlanError: if the data is no frontier.
        """
        entry = Entry(data)
        try:
            version = entry["format_version"].value
            if type(version) is not int or version != FORMAT_VERSION:
                raise PlanError(
                    f"This frontier has format version {quoted(version)}; this version of deeparc_hf reads "
                    f"{FORMAT_VERSION}."
                )
            plan = PruningPlan.from_dict(entry["plan"].value)
            entry["plan"].must_be(not plan.removed, "one that removes nothing")
            points = tuple(_point_in(point, plan) for point in entry["points"].items(MAX_BLOCKS))
            counts = [point.num_blocks for point in points]
            falling = all(more > fewer for more, fewer in itertools.pairwise(counts))
            entry["points"].must_be(counts[:1] == [plan.num_blocks] and falling, "the whole model, then smaller ones")
            for name in ("greater_is_better", "complete"):
                entry[name].must_be(isinstance(entry[name].value, bool), "true or false")
            return cls(
                points,
                plan,
                plain(entry["search"].text()),
                plain(entry["objective"].text()),
                entry["samples"].whole(),
                entry["passes"].number(),
                entry.optional("work", lambda work: plain(work.text())),
                entry["greater_is_better"].value,
                entry["complete"].value,
            )
        except MalformedError as error:
            raise _no_frontier(error) from error

    def to_json(self, path: str | Path | None = None) -> str:
        """The frontier as JSON text; written to `path` too if one is given."""
        text = json.dumps(finite(self.to_dict()), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, "utf-8")
        return text

    @classmethod
    def from_json(cls, text_or_path: str | Path) -> Frontier:
        """Read from a JSON text, or from the file at a path."""
        is_text = isinstance(text_or_path, str) and text_or_path.lstrip().startswith(("{", "["))
        try:
            return cls.from_dict(read_json(text_or_path if is_text else Path(text_or_path)))
        except MalformedError as error:
            raise _no_frontier(error) from error

    # ---- as text ----

    def __str__(self) -> str:
        return "\n".join([text_table([self._columns(), *self._rows()]), self._summary()])

    def _repr_html_(self) -> str:
        return html_table(self._summary(), self._columns(), self._rows(), [])

    def _within(self, name: str, value: float) -> Point:
        """The model that meets a budget."""
        if name == "num_blocks":
            found = [point for point in self.points if point.num_blocks == value]
            have = ", ".join(str(point.num_blocks) for point in self.points)
            if not found:
                raise PlanError(f"No model with {value:g} blocks was found, only with {have}. Take one of these.")
            return found[-1]
        known = [(point, reading) for point in self.points if (reading := self._reading(name, point)) is not None]
        # a metric that was no number is one that no budget lets through
        if not known or (name == "speedup" and len(known) < len(self.points)):
            raise ConfigError(_NOT_MEASURED[name])
        readings = [reading for _, reading in known]
        good = [point for point, reading in known if at_most(reading, _limit(name, value))]
        if good:
            return good[0] if name in ("speedup", "parameters") else good[-1]
        best = -min(readings) if name == "speedup" else min(readings)
        raise PlanError(f"No model that was found meets {name}={value:g}: {_BEST[name].format(best)}")

    def _reading(self, name: str, point: Point) -> float | None:
        """What a budget bounds, so that less is better."""
        if name == "parameters":
            return float(point.parameters)
        if name == "speedup":
            return -1.0 if point is self.whole else None if point.faster is None else -point.faster
        if name == "max_value":
            return point.value
        if point.metric is None or self.whole.metric is None:
            return None
        drop = self.whole.metric - point.metric
        return drop if self.greater_is_better else -drop

    def _columns(self) -> list[str]:
        columns = ["blocks", "removed", "parameters", f"{self.objective} (95 % interval)"]
        columns += ["metric"] * (self.whole.metric is not None)
        return columns + (["speed-up by blocks", "measured"] if self.work is not None else [])

    def _rows(self) -> list[list[str]]:
        rows = []
        for point in self.points:
            gone = " ".join(
                f"{name}:" * (len(self.plan.stacks) > 1) + ",".join(_run(run) for run in runs(indices))
                for name, indices in point.removed.items()
                if indices
            )
            value = f"{point.value:.4g}" + _bounds(point.interval)
            row = [str(point.num_blocks), gone or "-", f"{point.parameters:,}", value]
            if self.whole.metric is not None:
                row.append("-" if point.metric is None else f"{point.metric:.4f}")
            if self.work is not None:
                row.append("-" if point.speedup is None else f"{point.speedup:.2f}")
                row.append("-" if point.measured is None else f"{point.measured:.2f}{_bounds(point.measured_interval)}")
            rows.append(row)
        return rows

    def _summary(self) -> str:
        heals = "healed" if self.plan.config.heal is not None else "as the removal leaves them"
        ended = "" if self.complete else "; the search was broken off"
        timed = "" if self.work is None else f" Timed: {self.work}."
        judged = f"judged on {self.samples} samples" if self.samples else "judged by evaluate"
        return (
            f"{self.search} search by {self.objective}, models {heals}, {judged}, "
            f"{self.passes:.1f} forward passes over the calibration data{ended}.{timed}"
        )


_NOT_MEASURED = {
    "speedup": "speedup needs times, and this search measured none (measure_times=False). Search with them.",
    "max_drop": "max_drop bounds the metric of evaluate=..., and there is none of the whole model. Give search_blocks "
    "one that gives a number, or say max_value, which bounds the objective.",
}
_FURTHER = "Search further (num_blocks of search_blocks), or ask for less."
_BEST = {
    "speedup": f"the fastest is {{:.2f}} times as fast as the whole one. {_FURTHER}",
    "parameters": f"the smallest has {{:,.0f}}. {_FURTHER}",
    "max_drop": "the whole one's is 0. Give 0 or more.",
    "max_value": "the least value is {:.4g}. Allow as much.",
}


def _limit(name: str, value: float) -> float:
    return -value if name == "speedup" else value


def _run(run: Sequence[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"


def _bounds(interval: Interval | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3g} .. {interval[1]:.3g})"


def _point_in(entry: Entry, plan: PruningPlan) -> Point:
    """A point, from outside."""
    removed = {}
    for name, indices in entry["removed"].entries().items():
        indices.must_be(name in plan.stacks, f"of a stack of the plan ({', '.join(plan.stacks)})")
        removed[name] = tuple(sorted(indices.wholes(len(plan.stacks[name]) - 1)))
        stack, gone = plan.stacks[name], set(removed[name])
        good = len(gone) == len(removed[name]) < len(stack) and not gone & {*stack.pinned, *stack.protected}
        indices.must_be(good, "blocks that may go, none twice, and not all")
    entry["num_blocks"].must_be(
        entry["num_blocks"].whole() == plan.num_blocks - sum(map(len, removed.values())), "the blocks that stay"
    )
    intervals = {key: entry.optional(key, lambda found: found.numbers(2)) for key in ("interval", "measured_interval")}
    pairs: dict[str, Any] = {key: None if found is None else (found[0], found[1]) for key, found in intervals.items()}
    for key, pair in pairs.items():
        entry[key].must_be(pair is None or pair[0] <= pair[1], "a lower and an upper bound")
    numbers = {key: entry.optional(key, Entry.number) for key in ("metric", "speedup", "measured")}
    for key in ("speedup", "measured"):
        entry[key].must_be(numbers[key] is None or numbers[key] > 0, "a number above 0")
    return Point(
        removed, entry["num_blocks"].whole(), entry["parameters"].whole(), entry["value"].number(), **numbers, **pairs
    )


def _no_frontier(error: Exception) -> PlanError:
    return PlanError(f"This is not the frontier of a search: {plain(error, 400)}. Make one with search_blocks(...).")
