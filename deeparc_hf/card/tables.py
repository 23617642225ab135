"""The tables and drawings of a card, as Markdown. What was not measured is "-"; a table of nothing is None."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..plan import PruningPlan, StackPlan
from ..record import PrunedConfig
from ..report import wilson_interval
from ..run_report import stages_table
from ..sparsity_report import sparsity_table
from .facts import CardFacts
from .reading import Attempt, Evaluation
from .text import code, fenced, linked, md, plain, table

__all__ = ["evaluation_table", "iterations_table", "main_metric", "similarity_tables", "sparsity_section", "steps_table", "strip"]

_EPOCHS, _FIRST = 6, 3  # columns at most; of longer runs the first ones, and the last value
_WHOLE = 20  # longest stack whose matrix is shown whole
_PER_GROUP = 10


def main_metric(facts: CardFacts) -> str:
    """The metric of the run's gate, else an accuracy, else the first one that is no loss, else the loss."""
    asked = (facts.summary.get("metric") or "").removeprefix("eval_")
    if asked:
        return asked
    inside = [e.metrics for a in facts.attempts for _, e in a.evaluations]
    evaluations = inside or [e.metrics for e in facts.final]  # the table is of those in the training
    names = list(dict.fromkeys(key.removeprefix("eval_") for metrics in evaluations for key in metrics))
    return next((n for n in names if n.endswith("accuracy")), next((n for n in names if not n.endswith("loss")), "loss"))


def iterations_table(facts: CardFacts) -> str | None:
    """A row for the model before, and for each pruning: the metric at the end of each epoch, blocks, parameters, times, frozen blocks."""
    metric = main_metric(facts)
    one = not facts.continued  # of several trainings the last value of each is shown
    attempts = [row for attempt in facts.attempts for row in _by_weights(attempt) if one or row.k is not None or row.evaluations]
    if not attempts:
        return None
    by_epoch = [_by_epoch(attempt, metric) for attempt in attempts]
    epochs = sorted({epoch for values in by_epoch for epoch in values}) if facts.from_run and one else []
    long = len(epochs) > _EPOCHS
    epochs = epochs[:_FIRST] if long else epochs
    measured = any(by_epoch)
    titles = [f"{md(metric)}, epoch {epoch}" for epoch in epochs] if epochs else [md(metric)]
    titles += [f"{md(metric)}, last epoch"] if long else []
    header = [
        "model",
        *([*titles, "change"] if measured else []),
        "blocks",
        "parameters",
        "evaluation time (s)",
        "training time (s)",
        "freeze",
        "k",
        "threshold",
        "verdict",
    ]
    rows: list[list[str]] = []
    first = None  # the last value before any pruning
    for attempt, values in zip(attempts, by_epoch, strict=True):
        seconds = next((e.seconds for _, e in reversed(attempt.evaluations) if e.seconds is not None), None)
        last = next(reversed(values.values()), None)
        first = last if first is None and attempt.k is None else first  # of the model before any pruning, as it was
        shown = [values.get(epoch) for epoch in epochs] if epochs else [last]
        shown += [last] if long else []
        change = "-" if None in (first, last) or attempt.k is None else f"{last - first:+.4f}"
        rows.append(
            [
                md(attempt.name),
                *([*map(_number, shown), change] if measured else []),
                " + ".join(map(str, attempt.blocks.values())) or "-",
                "-" if attempt.parameters is None else f"{attempt.parameters:,}",
                "-" if seconds is None else f"{seconds:,.2f}",
                "-" if not attempt.training_seconds else f"{attempt.training_seconds:,.1f}",
                str(attempt.frozen),
                "-" if attempt.k is None else str(attempt.k),
                " ".join(f"{value:.4f}" for value in attempt.thresholds) or "-",
                md(attempt.decision or "-"),
            ]
        )
    return table(header, rows, left=(0, len(header) - 1))


def _by_weights(attempt: Attempt) -> list[Attempt]:
    """A row for the model as it was, and one for it with zeroed weights, where some were zeroed while it was trained."""
    dense = tuple(entry for entry in attempt.evaluations if not entry[1].sparse)
    sparse = tuple(entry for entry in attempt.evaluations if entry[1].sparse)
    if not sparse:
        return [attempt]
    zeroed = dataclasses.replace(attempt, name=f"{attempt.name}, weights zeroed", evaluations=sparse)
    if not dense:
        return [zeroed]
    return [dataclasses.replace(attempt, evaluations=dense), dataclasses.replace(zeroed, training_seconds=None, decision=None)]


def _by_epoch(attempt: Attempt, metric: str) -> dict[int, float]:
    """The last value within each epoch, counted from the attempt's beginning."""
    found = {}
    for epoch, evaluation in attempt.evaluations:
        value = evaluation.metrics.get(f"eval_{metric}", evaluation.metrics.get(metric))
        if value is not None:
            found[max(0, math.ceil(epoch - attempt.epoch - 1e-6))] = value
    return found


def steps_table(facts: CardFacts) -> str | None:
    """The loss and the share of right answers before, right after the removal, after healing and after the retraining."""
    rows = [{"name": md(a.name), "k": a.k, "stages": a.stages} for a in facts.attempts if a.k is not None and a.stages]
    return stages_table(rows)


def evaluation_table(final: Sequence[Evaluation]) -> str | None:
    """Every metric of the model as it is, and of the one before where it is known; accuracies have a Wilson interval where n is known."""
    rows = []
    compared = any(evaluation.before for evaluation in final)
    keys = {key for evaluation in final for key in evaluation.metrics}
    for evaluation in final:
        n = evaluation.data.get("rows")
        for key, value in evaluation.metrics.items():
            name = key.removeprefix("eval_")
            interval = _interval(evaluation.intervals.get(key))
            if interval == "-" and name in ("accuracy", "test_accuracy") and n and 0 <= value <= 1:  # others may be no shares of the rows
                low, high = wilson_interval(round(value * n), n)
                interval = _interval((low, high))
            before = [_number(evaluation.before.get(key)), _interval(evaluation.before_intervals.get(key))] if compared else []
            validation = evaluation.judged or (key != name and f"test_{name}" in keys)
            shown = f"{md(name)} (validation data)" if validation else md(name)
            rows.append([shown, *before, _number(value), interval, f"{n:,}" if n else "-", data_text(evaluation.data)])
    titles = ["before", "95 % interval", "this model"] if compared else ["value"]
    header = ["metric", *titles, "95 % interval", "n", "data"]
    return table(header, rows, left=(0, len(header) - 1)) if rows else None


def _interval(bounds: tuple[float, float] | None) -> str:
    return "-" if bounds is None else f"{_number(bounds[0])} .. {_number(bounds[1])}"


def data_text(data: Mapping[str, Any]) -> str:
    """A data set in a few words."""
    if "id" not in data:
        return "not named"
    more = [f"{key} {md(data[key])}" for key in ("config", "split") if key in data]
    return ", ".join([linked(data["id"], "datasets/"), *more])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.4g}"


def strip(record: PrunedConfig) -> str:
    """A line for each stack with a mark for each original block, in groups of ten, and what the marks mean."""
    gone: dict[str, dict[int, int]] = {}
    for number, entry in enumerate(record.iterations, 1):
        for name, blocks in (entry.get("removed") or {}).items():
            gone.setdefault(name, {}).update(dict.fromkeys(blocks, number))
    names = {name: plain(name, 60) for name in record.stacks}
    width = max(map(len, names.values()), default=0)
    several = len(record.iterations) > 1
    lines, stay = [], False
    for name, stack in record.stacks.items():
        kept, frozen = set(stack.kept), {stack.kept[i] for i in record.frozen.get(name, ())}
        marks = ["*" if i in frozen else "#" if i in kept else _gone_mark(gone.get(name, {}).get(i), several) for i in range(stack.length)]
        stay = stay or bool(frozen)
        groups = " ".join("".join(marks[i : i + _PER_GROUP]) for i in range(0, len(marks), _PER_GROUP))
        lines.append(f"{names[name].ljust(width)}  {groups}  {len(kept)} of {stack.length} stay")
    legend = ["# kept", *(["* kept, and frozen in the last retraining"] if stay else [])]
    legend.append("1 to 9 removed, in which pruning (+: a later one)" if several else ". removed")
    return fenced("\n".join([*lines, "", ", ".join(legend)]), "text")


def _gone_mark(iteration: int | None, several: bool) -> str:
    if not several or iteration is None:
        return "."
    return str(iteration) if iteration < 10 else "+"


def similarity_tables(plan: PruningPlan) -> str:
    """The similarities of the last pruning as numbers: whole matrices of short stacks, neighbours of long ones."""
    return "\n\n".join(_similarity(name, stack) for name, stack in plan.stacks.items() if len(stack) > 1)


def _similarity(name: str, stack: StackPlan) -> str:
    labels = [f"{index} (removed)" if index in stack.removed else str(index) for index in range(len(stack))]
    title = f"{code(name)} (threshold {stack.threshold:.4f})"
    if len(stack) > _WHOLE:
        rows = [[labels[i], labels[i + 1], _similar(stack.similarity[i][i + 1])] for i in range(len(stack) - 1)]
        return f"{title}, of neighbours:\n\n{table(['block', 'next block', 'similarity'], rows, left=(0, 1))}"
    rows = [[labels[i], *map(_similar, row)] for i, row in enumerate(stack.similarity)]
    return f"{title}:\n\n{table(['block', *map(str, range(len(stack)))], rows)}"


def _similar(value: float) -> str:
    return f"{value:.3f}"


def sparsity_section(facts: CardFacts) -> str | None:
    """What was zeroed, as asked for and as measured; None where nothing was."""
    if facts.zeros is None:
        return None
    zeros, size, matrices = facts.zeros
    parts = [f"{100 * zeros / max(1, size):.2f} % of the {size:,} weights of {matrices} matrices are zero."]
    if facts.sparsity is not None:
        c = facts.sparsity.config
        what = f"the {md(c.pattern)} pattern" if c.pattern else f"{100 * c.sparsity:g} % of each output row"
        how = "block by block" if c.sequential else "in one pass of the dense model"
        data = f"inputs measured {how} on {facts.sparsity.samples:,} samples" if facts.sparsity.samples else "without data"
        parts[0] += f" Asked for: {md(c.method)}, {what}, {data}."
        parts.append(sparsity_table([_shown(m) for m in facts.sparsity.matrices.values()]))
    parts.append("The zeros are stored like any other number: the checkpoint is neither smaller nor faster by them.")
    return "\n\n".join(parts)


def _shown(matrix: Any) -> Any:
    return dataclasses.replace(matrix, stack=code(matrix.stack), role=code(matrix.role))
