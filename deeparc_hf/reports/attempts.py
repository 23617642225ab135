"""Reading the reports that lie beside a checkpoint. A downloaded checkpoint is hostile input: everything is checked,
sizes are bounded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..core.markdown import md
from ..core.plain_text import allowed, plain, quoted
from ..core.statistics import wilson_interval
from ..errors import RecordError
from .provenance import TIMES, VALIDATION
from .run_report import STAGES

__all__ = [
    "Attempt",
    "Evaluation",
    "bare",
    "facts_in",
    "number",
    "read_json",
    "stages_in",
    "texts_in",
    "whole",
    "wrong_in",
]

USES = (VALIDATION,)
MOST = 256  # attempts, metrics
MOST_EVALUATIONS = 2**20
MOST_BLOCKS = 4096
_MAX_FILE = 16 * 2**20


def wrong_in(file: str, error: Exception) -> RecordError:
    """The error for a file that is not what this package writes."""
    return RecordError(
        f"{file} is not what deeparc_hf writes there ({type(error).__name__}: {plain(error, 120)}). Delete the file, "
        f"and the card is made without it."
    )


def read_json(path: Path) -> Mapping[str, Any] | None:
    """The object in a JSON file; None where there is no such file.

    Raises:
        RecordError: if the file is too large, or holds no JSON object.
    """
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_FILE:
        raise RecordError(
            f"{path.name} is larger than {_MAX_FILE} bytes. It is not read; delete it to make the card without it."
        )
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise wrong_in(path.name, error) from error
    if not isinstance(data, Mapping):
        raise wrong_in(path.name, TypeError(f"it holds a {type(data).__name__}, not an object"))
    return data


def number(value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a number, found {quoted(value)}")
    return float(value)


def whole(value: Any) -> int:
    """A whole number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"expected a whole number, found {quoted(value)}")
    return value


def texts_in(data: Any) -> dict[str, str]:
    """The short texts and numbers of an object, as texts."""
    found = _mapping(data or {})
    return {
        plain(key, 60): plain(value)
        for key, value in list(found.items())[:MOST]
        if isinstance(value, (str, int, float))
    }


def facts_in(data: Any) -> dict[str, Any]:
    """What is known of a data set (`provenance.dataset_facts`)."""
    found = _mapping(data or {})
    known = {key: plain(found[key]) for key in ("id", "revision", "config", "split") if isinstance(found.get(key), str)}
    if allowed(found.get("use"), USES):
        known["use"] = found["use"]
    return {**known, **({"rows": whole(found["rows"])} if found.get("rows") is not None else {})}


def _mapping(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"expected an object, found {quoted(data)}")
    return data


def _list(data: Any, most: int = MOST) -> Sequence[Any]:
    if isinstance(data, (str, bytes)) or not isinstance(data, Sequence) or len(data) > most:
        raise ValueError(f"expected a list of at most {most}, found {quoted(data)}")
    return data


def figures_in(data: Any) -> dict[str, float]:
    """Metrics by name; what is no finite number (a loss that overflowed is null) is left out."""
    found = list(_mapping(data or {}).items())[:MOST]
    return {
        plain(key, 80): float(v)
        for key, v in found
        if isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    }


def stages_in(data: Any) -> dict[str, dict[str, Any]]:
    """What each step of a pruning did (`quality.measure_quality`, by stage)."""
    return {stage: _quality(_mapping(data)[stage]) for stage in STAGES if _mapping(data or {}).get(stage) is not None}


def _quality(data: Any) -> dict[str, Any]:
    found = _mapping(data)
    pairs = {}
    for name in ("loss_interval", "accuracy_interval"):
        value = found.get(name)
        pairs[name] = None if value is None else [number(bound) for bound in _list(value, 2)]
        if value is not None and len(value) != 2:
            raise ValueError(f"{name} must have two numbers")
    accuracy = None if found.get("accuracy") is None else number(found["accuracy"])
    if accuracy is not None and pairs["accuracy_interval"] is None:
        raise ValueError("an accuracy without its interval")
    return {
        "loss": number(found["loss"]),
        "accuracy": accuracy,
        **pairs,
        "samples": whole(found["samples"]),
        "data": md(found["data"]),
    }


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
    def read(cls, entry: Mapping[str, Any]) -> Evaluation:
        """Read an evaluation: metrics, and where they are known data, weights, sparse, intervals, stacks, judged, and
        before.
        """
        figures = figures_in(entry["metrics"])
        times = [value for key, value in figures.items() if key.endswith("_runtime")]
        lasting = {key: value for key, value in figures.items() if not key.endswith(TIMES)}
        mark = plain(entry["weights"], 64) if entry.get("weights") else None
        return cls(
            lasting,
            facts_in(entry.get("data")),
            times[0] if len(times) == 1 else None,
            mark,
            entry.get("sparse") is True,
            _intervals_in(entry.get("intervals")),
            figures_in(entry.get("before")),
            _intervals_in(entry.get("before_intervals")),
            None if entry.get("before_blocks") is None else whole(entry["before_blocks"]),
            {plain(key, 200): whole(count) for key, count in list(_mapping(entry.get("stacks") or {}).items())[:MOST]},
            entry.get("judged") is True,
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

    def interval_of(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric: the one that came with it, or Wilson's of an accuracy where the number of
        samples is known.
        """
        return self.intervals.get(key) or _wilson(key, self.metrics.get(key), self.data.get("rows"))

    def interval_before(self, key: str) -> tuple[float, float] | None:
        """The same of the model that the experiment began with."""
        return self.before_intervals.get(key) or _wilson(key, self.before.get(key), self.data.get("rows"))


def _wilson(key: str, value: float | None, rows: int | None) -> tuple[float, float] | None:
    share = bare(key) == "accuracy" and value is not None and 0 <= value <= 1  # others may be no shares of the rows
    return wilson_interval(round(value * rows), rows) if share and rows else None  # type: ignore[operator]


def bare(key: str) -> str:
    """The name of a metric without what the Trainer puts before it."""
    return key.removeprefix("eval_").removeprefix("test_")


def _intervals_in(data: Any) -> dict[str, tuple[float, float]]:
    """Intervals by the name of the metric; one without a finite end is left out."""
    pairs = {plain(key, 80): _list(value, 2) for key, value in list(_mapping(data or {}).items())[:MOST]}
    if any(len(pair) != 2 for pair in pairs.values()):
        raise ValueError("an interval must have two numbers")
    return {key: (number(pair[0]), number(pair[1])) for key, pair in pairs.items() if None not in pair}


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
    def read(cls, data: Any) -> Attempt:
        """Read an entry of the report's attempts."""
        found = _mapping(data)
        entries = _list(found["evaluations"], MOST_EVALUATIONS)
        evaluations = [(number(e["epoch"]), Evaluation.read(e).in_training()) for e in map(_mapping, entries)]
        k = found.get("k")
        return cls(
            name=plain(found["name"], 60),
            blocks={plain(name): whole(count) for name, count in _mapping(found["blocks"]).items()},
            parameters=whole(found["parameters"]),
            frozen=sum(len(_list(blocks, MOST_BLOCKS)) for blocks in _mapping(found["frozen"]).values()),
            k=None if k is None else whole(k),
            thresholds=_thresholds(found),
            removed=_blocks(found.get("removed")),
            epoch=number(found["epoch"]),
            evaluations=tuple(evaluations),
            training_seconds=number(found["training_seconds"]),
            decision=plain(found["decision"], 40) if found.get("decision") else None,
            reason=plain(found["reason"]) if found.get("reason") else None,
            stages=stages_in(found.get("stages")),
        )

    @classmethod
    def of_record(cls, index: int, entry: Mapping[str, Any], blocks: dict[str, int]) -> Attempt:
        """The same from an entry of a record, which knows less.

        Args:
            blocks: blocks of each stack after it.
        """
        settings = entry.get("settings") if isinstance(entry.get("settings"), Mapping) else {}
        counts = entry.get("parameters") if isinstance(entry.get("parameters"), Mapping) else {}
        k = settings.get("k")
        data = (entry.get("data") or {}).get("evaluation")
        metrics = Evaluation.read({"metrics": entry.get("metrics"), "data": data, "weights": entry.get("weights")})
        return cls(
            name=f"pruning {index + 1}",
            blocks=blocks,
            parameters=whole(counts["after"]) if "after" in counts else None,
            frozen=sum(map(len, _blocks(entry.get("frozen")).values())),
            k=None if k is None else whole(k),
            thresholds=_thresholds(entry),
            removed=_blocks(entry.get("removed")),
            epoch=0.0,
            evaluations=((0.0, metrics),) if metrics.metrics else (),
            training_seconds=None,
            decision=None,
            reason=None,
            stages=stages_in(entry.get("stages")),
        )


def _thresholds(found: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(sorted({number(value) for value in _mapping(found.get("thresholds") or {}).values()}))


def _blocks(data: Any) -> dict[str, tuple[int, ...]]:
    return {
        plain(name): tuple(whole(i) for i in _list(blocks, MOST_BLOCKS))
        for name, blocks in _mapping(data or {}).items()
        if blocks
    }
