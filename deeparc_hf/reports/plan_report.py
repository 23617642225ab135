"""The report of a pruning: what it removed, cost and saved. What was not measured is None, and shows as "-"."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.environment import hardware, package_versions
from ..core.markdown import fenced, made_with, table
from ..core.settings import percent_hint
from ..core.statistics import wilson_interval
from ..core.tables import in_tens
from ..errors import ConfigError
from ..healing.sites import Healing, healing_text
from ..pruning.plan import PruningPlan, StackPlan

__all__ = ["Measurement", "Timing", "blocks_strip", "iteration_table", "timed_evaluation", "write_report"]

FORMAT_VERSION = 1
_COLUMNS = {
    "blocks": "blocks",
    "parameters": "parameters",
    "accuracy": "accuracy (95 % interval)",
    "samples": "n",
    "evaluation_loss": "evaluation loss",
    "evaluation_seconds": "evaluation time (s)",
    "training_seconds": "training time (s)",
    "frozen": "freeze",
    "threshold": "threshold",
    "k": "k",
}
_MARKS = {
    "#": "kept",
    ".": "removed",
    "*": "kept and frozen",
    "p": "must stay (pinned or protected)",
    "P": "must stay, and is frozen",
}


@dataclass(frozen=True)
class Measurement:
    """One row of the table: a model at one point of its life. None: not measured.

    Attributes:
        label: what this row is ("original", "pruned", "retrained").
        accuracy, samples: share of the evaluation samples that were right, in [0, 1], and their number.
        evaluation_seconds: time of one evaluation, warm (`timed_evaluation`), in s.
        training_seconds, frozen: time of the training that led to this row, in s, and number of blocks frozen in it.
        threshold, k: settings of the pruning that led to this row.
    """

    label: str
    blocks: int | None = None
    parameters: int | None = None
    accuracy: float | None = None
    samples: int | None = None
    evaluation_loss: float | None = None
    evaluation_seconds: float | None = None
    training_seconds: float | None = None
    frozen: int | None = None
    threshold: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise ConfigError(f"accuracy must be in [0, 1], found {self.accuracy}.{percent_hint(self.accuracy)}")

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy; None where the accuracy or the number of samples is not known."""
        if self.accuracy is None or not self.samples:
            return None
        return wilson_interval(round(self.accuracy * self.samples), self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the interval is written too, for those who read the file."""
        return {**dataclasses.asdict(self), "interval": None if self.interval is None else list(self.interval)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """The inverse of `to_dict`. Entries that this version does not know are left out."""
        known = {spec.name for spec in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in data.items() if key in known})


def iteration_table(rows: Sequence[Measurement]) -> str:
    """The rows as a Markdown table; "-" stands where nothing was measured."""
    return table(["model", *_COLUMNS.values()], [[row.label, *(_cell(row, name) for name in _COLUMNS)] for row in rows])


@dataclass(frozen=True)
class Timing:
    """Times of repeated calls, in s: the median, and each one without the warm-up; and what the last call returned."""

    seconds: float
    times: tuple[float, ...]
    result: Any


def timed_evaluation(fn: Callable[[], Any], repeats: int = 3, warmup: int = 1) -> Timing:
    """Time a function warm: the first calls, which pay for caches and lazy set-up, are not counted. Work that it leaves
    running on an accelerator is waited for.
    """
    if repeats < 1 or warmup < 0:
        raise ConfigError(f"repeats must be at least 1 and warmup at least 0, found {repeats} and {warmup}.")
    for _ in range(warmup):
        fn()
    wait = torch.accelerator.synchronize if torch.accelerator.is_available() else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        result = fn()
        wait()
        times.append(time.perf_counter() - start)
    return Timing(statistics.median(times), tuple(times), result)


def blocks_strip(plan: PruningPlan) -> str:
    """One line a stack with a mark for each block, in groups of ten, and a legend of the marks that occur."""
    width = max(map(len, plan.stacks), default=0)
    lines, used = [], set()
    for name, stack in plan.stacks.items():
        marks = "".join(_mark(stack, index) for index in range(len(stack)))
        used |= set(marks)
        lines.append(f"{name.ljust(width)}  {in_tens(marks)}  {len(stack.kept)} of {len(stack)} stay")
    legend = ", ".join(f"{mark} {meaning}" for mark, meaning in _MARKS.items() if mark in used)
    return "\n".join([*lines, legend])


def write_report(
    folder: str | Path,
    plan: PruningPlan,
    rows: Sequence[Measurement] = (),
    extra: Mapping[str, Any] | None = None,
    *,
    healings: Sequence[Healing] = (),
    device: torch.device | str | None = None,
) -> None:
    """Write report.json and report.md into a folder: a plan, and what was measured (oldest first) and healed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "format_version": FORMAT_VERSION,
        "plan": plan.to_dict(),
        "measurements": [row.to_dict() for row in rows],
        "healing": [healing.to_dict() for healing in healings],
        "versions": package_versions(),
        "hardware": hardware(device),
        "extra": dict(extra or {}),
    }
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    (folder / "report.md").write_text(_markdown(plan, rows, data), "utf-8")


def _markdown(plan: PruningPlan, rows: Sequence[Measurement], data: Mapping[str, Any]) -> str:
    gone = plan.num_blocks - plan.num_kept
    removed = f"{gone} of {plan.num_blocks} blocks removed, {plan.num_frozen} of the others frozen."
    parts = ["# Pruning report", removed if gone else "No block was removed.", fenced(blocks_strip(plan), "text")]
    if rows:
        parts += ["## Measurements", iteration_table(rows), _measured(rows)]
    parts += [
        "## How the blocks were compared",
        f"By {plan.comparison}.",
        fenced(str(plan), "text"),
    ]
    if data["healing"]:
        parts += ["## Healing", "\n".join(f"- {healing_text(site)}" for site in data["healing"])]
    parts += [made_with(data["extra"], data["hardware"], data["versions"])]
    return "\n\n".join(parts) + "\n"


def _measured(rows: Sequence[Measurement]) -> str:
    notes = []
    if any(row.interval for row in rows):
        notes.append("The interval of an accuracy is Wilson's, at 95 % confidence, over the n samples beside it.")
    if any(row.evaluation_seconds is not None for row in rows):
        notes.append("Evaluation times are warm: calls before the timed ones are not counted.")
    missing = [title for name, title in _COLUMNS.items() if all(getattr(row, name) is None for row in rows)]
    if missing:
        notes.append(f"Not measured, or not applicable: {', '.join(missing)}.")
    return " ".join(notes) or "Every column was measured."


def _cell(row: Measurement, name: str) -> str:
    value = getattr(row, name)
    if value is None:
        return "-"
    if name == "accuracy":
        interval = "" if row.interval is None else " ({:.2f} to {:.2f})".format(*(100 * end for end in row.interval))
        return f"{100 * value:.2f} %{interval}"
    if name in ("evaluation_seconds", "training_seconds"):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else f"{round(value, 4):g}"


def _mark(stack: StackPlan, index: int) -> str:
    if index in stack.removed:
        return "."
    if index in stack.pinned or index in stack.protected:
        return "P" if index in stack.frozen else "p"
    return "*" if index in stack.frozen else "#"
