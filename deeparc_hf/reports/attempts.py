"""Reading the reports that lie beside a checkpoint: their evaluations, and the prunings that were tried. A downloaded
checkpoint is hostile input: everything is checked, sizes are bounded, and texts are made plain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..core.checks import Entry, is_number
from ..core.markdown import md
from ..core.plain_text import plain
from ..core.statistics import wilson_interval
from .provenance import TIMES, VALIDATION
from .run_report import STAGES

__all__ = ["Attempt", "Evaluation", "Figure", "bare", "dataset_in", "texts_in"]

_MOST_EVALUATIONS = 2**20
_MOST_METRICS = 4096


def texts_in(entry: Entry | None) -> dict[str, str]:
    """The short texts and numbers of an object, as texts."""
    entries = {} if entry is None else entry.entries()
    return {plain(key, 60): plain(e.value) for key, e in entries.items() if isinstance(e.value, (str, int, float))}


def dataset_in(entry: Entry | None) -> dict[str, Any]:
    """What is known of a data set (`provenance.dataset_facts`)."""
    if entry is None:
        return {}
    texts = {key: entry[key].value for key in ("id", "revision", "config", "split")}
    known: dict[str, Any] = {key: plain(text) for key, text in texts.items() if isinstance(text, str)}
    if entry["use"].value == VALIDATION:
        known["use"] = VALIDATION
    if (rows := entry.get("rows")) is not None:
        known["rows"] = rows.whole()
    return known


def _figures_in(entry: Entry | None) -> dict[str, float]:
    """Metrics by name; what is no finite number (a loss that overflowed is null) is left out."""
    entries = {} if entry is None else entry.entries(_MOST_METRICS)
    return {plain(key, 80): float(e.value) for key, e in entries.items() if is_number(e.value)}


def _intervals_in(entry: Entry | None) -> dict[str, tuple[float, float]]:
    """Intervals by the name of the metric; one without a finite end is left out."""
    entries = {} if entry is None else entry.entries(_MOST_METRICS)
    ends = {plain(key, 80): e for key, e in entries.items() if None not in [end.value for end in e.items(2)]}
    return {key: tuple(e.numbers(2)) for key, e in ends.items()}  # type: ignore[misc]


def _qualities_in(entry: Entry | None) -> dict[str, dict[str, Any]]:
    """What each step of a pruning did (`quality.measure_quality`, by stage)."""
    stages = {} if entry is None else {stage: entry.get(stage) for stage in STAGES}
    return {stage: _quality(quality) for stage, quality in stages.items() if quality is not None}


def _quality(entry: Entry) -> dict[str, Any]:
    intervals = {key: entry.get(key) for key in ("loss_interval", "accuracy_interval")}
    accuracy = entry.get("accuracy")
    if accuracy is not None:
        entry["accuracy_interval"].numbers(2)
    return {
        "loss": entry["loss"].number(),
        "accuracy": None if accuracy is None else accuracy.number(),
        **{key: None if interval is None else interval.numbers(2) for key, interval in intervals.items()},
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

    @classmethod
    def read(cls, entry: Entry) -> Evaluation:
        """Read an evaluation: metrics, and where they are known data, weights, sparse, intervals, stacks, judged, and
        before.
        """
        figures = _figures_in(entry.get("metrics"))
        times = [value for key, value in figures.items() if key.endswith("_runtime")]
        before_blocks, stacks = entry.get("before_blocks"), entry.get("stacks")
        return cls(
            metrics={key: value for key, value in figures.items() if not key.endswith(TIMES)},
            data=dataset_in(entry.get("data")),
            seconds=times[0] if len(times) == 1 else None,
            mark=plain(entry["weights"].value, 64) if entry["weights"].value else None,
            sparse=entry["sparse"].value is True,
            intervals=_intervals_in(entry.get("intervals")),
            before=_figures_in(entry.get("before")),
            before_intervals=_intervals_in(entry.get("before_intervals")),
            before_blocks=None if before_blocks is None else before_blocks.whole(),
            stacks={} if stacks is None else _counts(stacks),
            judged=entry["judged"].value is True,
        )

    def in_training(self) -> Evaluation:
        """One that the Trainer made while it trained: of validation data, unless its prefix says otherwise."""
        if not any(key.startswith("eval_") for key in self.metrics):
            return self
        return replace(self, data={**self.data, "use": VALIDATION})

    def split_of(self, key: str) -> str | None:
        """The split that a metric was measured on: as the data set calls it, else by how it was used; None where that
        is not known.
        """
        if self.data.get("split"):
            return str(self.data["split"])
        if self.judged or self.data.get("use") == VALIDATION:
            return VALIDATION
        return "test" if key.startswith("test_") else None

    def figure(self, key: str) -> Figure:
        """A metric with its 95 % interval: the one that came with it, or Wilson's of an accuracy where the number of
        samples is known.
        """
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


@dataclass(frozen=True)
class Attempt:
    """One row of a run's report: the model before the first pruning, or a pruning that was tried."""

    name: str
    blocks: dict[str, int]
    parameters: int | None
    frozen: int
    k: int | None
    thresholds: tuple[float, ...]
    removed: dict[str, tuple[int, ...]]
    epoch: float
    evaluations: tuple[tuple[float, Evaluation], ...]
    training_seconds: float | None
    decision: str | None
    reason: str | None
    stages: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, entry: Entry) -> Attempt:
        """Read an entry of the report's attempts."""
        evaluations = entry["evaluations"].items(_MOST_EVALUATIONS)
        k, decision, reason = entry.get("k"), entry["decision"].value, entry["reason"].value
        return cls(
            name=plain(entry["name"].value, 60),
            blocks=_counts(entry["blocks"]),
            parameters=entry["parameters"].whole(),
            frozen=sum(map(len, _blocks(entry["frozen"]).values())),
            k=None if k is None else k.whole(),
            thresholds=_thresholds(entry),
            removed=_blocks(entry.get("removed")),
            epoch=entry["epoch"].number(),
            evaluations=tuple((e["epoch"].number(), Evaluation.read(e).in_training()) for e in evaluations),
            training_seconds=entry["training_seconds"].number(),
            decision=plain(decision, 40) if decision else None,
            reason=plain(reason) if reason else None,
            stages=_qualities_in(entry.get("stages")),
        )

    @classmethod
    def of_record(cls, index: int, noted: Mapping[str, Any], blocks: dict[str, int]) -> Attempt:
        """The same from what a record noted of a pruning, which is less.

        Args:
            blocks: blocks of each stack after it.
        """
        entry = Entry(noted)
        settings, counts, data = (entry.get(key) for key in ("settings", "parameters", "data"))
        k = None if settings is None else settings.get("k")
        after = None if counts is None else counts.get("after")
        shown = {"metrics": noted.get("metrics"), "weights": noted.get("weights")}
        evaluation = Evaluation.read(Entry({**shown, "data": None if data is None else data["evaluation"].value}))
        return cls(
            name=f"pruning {index + 1}",
            blocks=blocks,
            parameters=None if after is None else after.whole(),
            frozen=sum(map(len, _blocks(entry.get("frozen")).values())),
            k=None if k is None else k.whole(),
            thresholds=_thresholds(entry),
            removed=_blocks(entry.get("removed")),
            epoch=0.0,
            evaluations=((0.0, evaluation),) if evaluation.metrics else (),
            training_seconds=None,
            decision=None,
            reason=None,
            stages=_qualities_in(entry.get("stages")),
        )


def _thresholds(entry: Entry) -> tuple[float, ...]:
    thresholds = entry.get("thresholds")
    return () if thresholds is None else tuple(sorted({e.number() for e in thresholds.entries().values()}))


def _blocks(entry: Entry | None) -> dict[str, tuple[int, ...]]:
    entries = {} if entry is None else entry.entries()
    return {plain(name): blocks.wholes() for name, blocks in entries.items() if blocks.value}


def _counts(entry: Entry) -> dict[str, int]:
    return {plain(name): count.whole() for name, count in entry.entries().items()}
