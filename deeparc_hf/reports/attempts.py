"""The evaluations of a training, and the prunings that were tried in it: as a run notes them, as its report tells them,
and as a card reads them. A downloaded report is hostile input: `read` checks everything, and makes texts plain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from ..core.checks import Entry, is_number
from ..core.markdown import md
from ..core.plain_text import plain
from ..core.statistics import wilson_interval
from .provenance import TIMES, VALIDATION

__all__ = ["BEFORE", "FINISHED", "RETRAINING", "STAGES", "Attempt", "Evaluation", "Figure", "bare", "dataset_in"]

BEFORE, RETRAINING, FINISHED = "before the first pruning", "retraining", "finished"  # phases of a run
STAGES = {
    "before": "before",
    "removed": "right after the removal",
    "healed": "after healing",
    "retrained": "after the retraining",
}
_MOST_EVALUATIONS = 2**20
_MOST_METRICS = 4096


def dataset_in(entry: Entry) -> dict[str, Any]:
    """What is known of a data set (`provenance.origin_of`)."""
    texts = {key: entry[key].value for key in ("id", "revision", "config", "split")}
    known: dict[str, Any] = {key: plain(text) for key, text in texts.items() if isinstance(text, str)}
    if entry["use"].value == VALIDATION:
        known["use"] = VALIDATION
    if (rows := entry.optional("rows", Entry.whole)) is not None:
        known["rows"] = rows
    return known


def _figures_in(entry: Entry) -> dict[str, float]:
    """Metrics by name; what is no finite number (a loss that overflowed is null) is left out."""
    return {plain(key, 80): float(e.value) for key, e in entry.entries(_MOST_METRICS).items() if is_number(e.value)}


def _intervals_in(entry: Entry) -> dict[str, tuple[float, float]]:
    """Intervals by the name of the metric; one without a finite end is left out."""
    entries = entry.entries(_MOST_METRICS).items()
    return {plain(key, 80): _ends(e) for key, e in entries if None not in [end.value for end in e.items(2)]}


def _ends(entry: Entry) -> tuple[float, float]:
    low, high = entry.numbers(2)
    return low, high


def _quality(entry: Entry) -> dict[str, Any]:
    """What a step of a pruning did (`quality.measure_quality`)."""
    accuracy = entry.optional("accuracy", Entry.number)
    if accuracy is not None:
        _ends(entry["accuracy_interval"])
    return {
        "loss": entry["loss"].number(),
        "accuracy": accuracy,
        **{key: entry.optional(key, _ends) for key in ("loss_interval", "accuracy_interval")},
        "samples": entry["samples"].whole(),
        "data": md(entry["data"].value),
    }


class Figure(NamedTuple):
    """A value that was measured, and its 95 % interval where that is known."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on one set of data.

    Attributes:
        metrics: by name, without times.
        data: what is known of the data.
        seconds: time of the evaluation, as the Trainer measured it; None where it did not.
        mark: of the weights that it is of; None where it is not known.
        sparse: whether weights had been zeroed.
        intervals: 95 % intervals of those metrics that come with one.
        before: metrics of the model that the experiment began with on the same data; before_intervals, before_blocks:
            their intervals, and the number of its blocks.
        stacks: number of blocks of each stack of the model that the evaluation is of; empty where it is not known.
        judged: whether prunings were judged on the same rows.
        step, epoch: when in the training it was made; None: not in one.
        times: those among the Trainer's metrics that are times, by name.
    """

    metrics: dict[str, float]
    data: dict[str, Any]
    seconds: float | None = None
    mark: str | None = None
    sparse: bool = False
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    before: Mapping[str, float] = field(default_factory=dict)
    before_intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    before_blocks: int | None = None
    stacks: Mapping[str, int] = field(default_factory=dict)
    judged: bool = False
    step: int | None = field(default=None, compare=False)
    epoch: float = field(default=0.0, compare=False)
    times: Mapping[str, float] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, figures: Mapping[str, float], **known: Any) -> Evaluation:
        """An evaluation by its metrics, times among them."""
        times = {key: value for key, value in figures.items() if key.endswith(TIMES)}
        seconds = [value for key, value in times.items() if key.endswith("_runtime")]
        metrics = {key: value for key, value in figures.items() if key not in times}
        return cls(metrics, seconds=seconds[0] if len(seconds) == 1 else None, times=times, **known)

    @property
    def figures(self) -> dict[str, float]:
        """All metrics, times too."""
        return {**self.metrics, **self.times}

    @property
    def lasting(self) -> dict[str, float]:
        """The metrics that are finite."""
        return {key: value for key, value in self.metrics.items() if abs(value) < float("inf")}

    @property
    def is_of_evaluation_data(self) -> bool:
        """Whether it is of the Trainer's evaluation data; others have another prefix (`metric_key_prefix`)."""
        return any(key.startswith("eval_") for key in self.figures)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, as a run notes it."""
        when = {} if self.step is None else {"step": self.step, "epoch": self.epoch, "sparse": self.sparse}
        return {**when, "metrics": self.figures, "data": dict(self.data), "weights": self.mark}

    @classmethod
    def from_dict(cls, noted: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`."""
        when = {key: noted[key] for key in ("step", "epoch", "sparse") if key in noted}
        return cls.of(noted["metrics"], data=noted.get("data", {}), mark=noted.get("weights"), **when)

    @classmethod
    def read(cls, entry: Entry) -> Evaluation:
        """Read an evaluation; all but its metrics may be missing."""
        return cls.of(
            entry.optional("metrics", _figures_in, {}),
            data=entry.optional("data", dataset_in, {}),
            mark=entry["weights"].shown(64),
            sparse=entry["sparse"].value is True,
            intervals=entry.optional("intervals", _intervals_in, {}),
            before=entry.optional("before", _figures_in, {}),
            before_intervals=entry.optional("before_intervals", _intervals_in, {}),
            before_blocks=entry.optional("before_blocks", Entry.whole),
            stacks=entry.optional("stacks", _counts, {}),
            judged=entry["judged"].value is True,
        )

    def in_training(self) -> Evaluation:
        """One that the Trainer made while it trained: of validation data, unless its prefix says otherwise."""
        if not self.is_of_evaluation_data:
            return self
        return replace(self, data={**self.data, "use": VALIDATION})

    def split_of(self, key: str) -> str | None:
        """The split that a metric was measured on: as the data set calls it, else by how it was used."""
        if self.data.get("split"):
            return str(self.data["split"])
        if self.judged or self.data.get("use") == VALIDATION:
            return VALIDATION
        return "test" if key.startswith("test_") else None

    def figure(self, key: str) -> Figure:
        """A metric with the 95 % interval that came with it, or Wilson's of an accuracy of so many samples."""
        return self._figure(key, self.metrics[key], self.intervals)

    def figure_before(self, key: str) -> Figure | None:
        """The same of the model that the experiment began with; None where it was not measured."""
        return self._figure(key, self.before[key], self.before_intervals) if key in self.before else None

    def _figure(self, key: str, value: float, intervals: Mapping[str, tuple[float, float]]) -> Figure:
        rows, interval = self.data.get("rows"), intervals.get(key)
        if interval is None and rows and bare(key) == "accuracy" and 0 <= value <= 1:  # others may be no shares
            interval = wilson_interval(round(value * rows), rows)
        return Figure(value, interval)


def bare(key: str) -> str:
    """The name of a metric without what the Trainer puts before it."""
    return key.removeprefix("eval_").removeprefix("test_")


@dataclass
class Attempt:
    """One row of a run's report: the model before the first pruning, or a pruning that was tried.

    Attributes:
        blocks, parameters: of the model then; blocks by stack. parameters is None where a record does not know it.
        step, epoch: when in the training it began.
        frozen: blocks that were not trained, by stack.
        training_seconds: time of the training steps; None where it is not known.
        iteration, k, thresholds: number of the pruning among those that are accepted, its stride, and thresholds by
            stack; None and empty for the model before the first pruning.
        compared: how its blocks were compared, in words.
        removed, plan_removed: blocks that it removed, by stack, numbered as in the original, and as right before.
        search: how a search chose them, in words; speedup: how many times as fast the model should be after it.
        stages: what each step did (`quality.measure_quality`, by stage).
        metric, value, baseline, drop: what it was judged by; None where nothing was judged.
        reason, decision: of the verdict; None before.
    """

    name: str
    blocks: dict[str, int]
    parameters: int | None
    step: int = 0
    epoch: float = 0.0
    frozen: Mapping[str, Sequence[int]] = field(default_factory=dict)
    training_seconds: float | None = 0.0
    evaluations: tuple[Evaluation, ...] = ()
    iteration: int | None = None
    k: int | None = None
    thresholds: Mapping[str, float] = field(default_factory=dict)
    compared: str | None = None
    removed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    plan_removed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    search: str | None = None
    speedup: float | None = None
    healing: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    metric: str | None = None
    value: float | None = None
    baseline: float | None = None
    drop: float | None = None
    reason: str | None = None
    decision: str | None = None

    @property
    def is_taken_back(self) -> bool:
        return self.decision == "rolled back"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, a copy: an entry of the report's attempts."""
        data = asdict(self)
        lacking = [name for name in ("reason", "decision", "compared", "search", "speedup") if data[name] is None]
        if self.k is None:
            lacking += ["iteration", "k", "thresholds", "removed", "plan_removed", "healing"]
            lacking += [] if self.stages else ["stages"]
        if self.metric is None:
            lacking += ["metric", "value", "baseline", "drop"]
        data["evaluations"] = [evaluation.to_dict() for evaluation in self.evaluations]
        return {name: value for name, value in data.items() if name not in lacking}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Attempt:
        """The inverse of `to_dict`."""
        return cls(**{**data, "evaluations": tuple(map(Evaluation.from_dict, data["evaluations"]))})

    @classmethod
    def read(cls, entry: Entry) -> Attempt:
        """Read an entry of the report's attempts."""
        evaluations = entry["evaluations"].items(_MOST_EVALUATIONS)
        return cls(
            name=plain(entry["name"].value, 60),
            blocks=_counts(entry["blocks"]),
            parameters=entry["parameters"].whole(),
            frozen=_blocks(entry["frozen"]),
            k=entry.optional("k", Entry.whole),
            thresholds=entry.optional("thresholds", _thresholds, {}),
            compared=entry["compared"].shown(),
            removed=entry.optional("removed", _blocks, {}),
            epoch=entry["epoch"].number(),
            evaluations=tuple(
                replace(Evaluation.read(e).in_training(), epoch=e["epoch"].number()) for e in evaluations
            ),
            training_seconds=entry["training_seconds"].number(),
            decision=entry["decision"].shown(40),
            reason=entry["reason"].shown(),
            stages=entry.optional("stages", _stages, {}),
        )

    @classmethod
    def of_record(cls, index: int, noted: Mapping[str, Any], blocks: dict[str, int]) -> Attempt:
        """The same from what a record noted of a pruning, which is less; blocks: of each stack after it."""
        entry = Entry(noted)
        data = entry.optional("data", lambda data: data["evaluation"].value)
        evaluation = Evaluation.read(
            Entry({"metrics": noted.get("metrics"), "weights": noted.get("weights"), "data": data})
        )
        return cls(
            name=f"pruning {index + 1}",
            blocks=blocks,
            parameters=entry.optional("parameters", lambda counts: counts.optional("after", Entry.whole)),
            frozen=entry.optional("frozen", _blocks, {}),
            k=entry.optional("settings", lambda settings: settings.optional("k", Entry.whole)),
            thresholds=entry.optional("thresholds", _thresholds, {}),
            removed=entry.optional("removed", _blocks, {}),
            evaluations=(evaluation,) if evaluation.metrics else (),
            training_seconds=None,
            stages=entry.optional("stages", _stages, {}),
        )


def _stages(entry: Entry) -> dict[str, dict[str, Any]]:
    return {stage: _quality(entry[stage]) for stage in STAGES if entry.get(stage) is not None}


def _thresholds(entry: Entry) -> dict[str, float]:
    return {plain(name): threshold.number() for name, threshold in entry.entries().items()}


def _blocks(entry: Entry) -> dict[str, tuple[int, ...]]:
    return {plain(name): blocks.wholes() for name, blocks in entry.entries().items() if blocks.value}


def _counts(entry: Entry) -> dict[str, int]:
    return {plain(name): count.whole() for name, count in entry.entries().items()}
