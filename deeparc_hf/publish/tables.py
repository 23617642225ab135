"""The tables of a card, as Markdown. What was not measured is "-"; a table of nothing is None."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..core.markdown import code, md, table
from ..core.tables import threshold_text
from ..reports.attempts import Attempt, Evaluation, bare
from ..reports.run_report import STAGES
from ..sparsity.report import sparsity_table
from .facts import CardFacts
from .metadata import Given

__all__ = [
    "against_original",
    "data_text",
    "epochs_table",
    "evaluation_table",
    "iteration_rows",
    "iterations_table",
    "main_metric",
    "settings_table",
    "sparsity_section",
    "steps_data",
    "steps_table",
    "with_interval",
]

_EPOCHS, _FIRST = 6, 4  # columns at most; of longer runs the first ones, and the last value


def main_metric(facts: CardFacts) -> str:
    """The metric of the run's gate, else an accuracy, else the first one that is no loss, else the loss."""
    asked = bare(facts.summary.get("metric") or "")
    if asked:
        return asked
    inside = [e.metrics for a in facts.attempts for _, e in a.evaluations]
    evaluations = inside or [e.metrics for e in facts.final]  # the table is of those in the training
    names = list(dict.fromkeys(bare(key) for metrics in evaluations for key in metrics))
    return next(
        (n for n in names if n.endswith("accuracy")), next((n for n in names if not n.endswith("loss")), "loss")
    )


def iterations_table(facts: CardFacts) -> str | None:
    """A row for the model before, and for each pruning that was tried: what it left, and what it cost. Seven columns at
    most.
    """
    metric = main_metric(facts)
    attempts = iteration_rows(facts)
    if not attempts:
        return None
    last = [next(reversed(_by_epoch(attempt, metric).values()), None) for attempt in attempts]
    measured = any(value is not None for value in last)
    verdicts = any(attempt.decision for attempt in attempts)
    if len(attempts) == 1 and not measured and not verdicts:
        return None  # all that it would say stands above
    timed = any(attempt.training_seconds for attempt in attempts)
    compared = measured and any(a.k is None and value is not None for a, value in zip(attempts, last, strict=True))
    titles = [
        *([md(metric)] if measured else []),
        *(["change"] if compared else []),
        *(["training (s)"] if timed else []),
    ]
    header = ["model", "blocks", "parameters", *titles]
    header += ["verdict"] if verdicts else []
    rows: list[list[str]] = []
    first = None  # the last value before any pruning
    for attempt, value in zip(attempts, last, strict=True):
        first = value if first is None and attempt.k is None else first
        change = "-" if None in (first, value) or attempt.k is None else f"{value - first:+.4f}"  # type: ignore[operator]
        rows.append(
            [
                md(attempt.name),
                " + ".join(map(str, attempt.blocks.values())) or "-",
                "-" if attempt.parameters is None else f"{attempt.parameters:,}",
                *([_number(value)] if measured else []),
                *([change] if compared else []),
                *(["-" if not attempt.training_seconds else f"{attempt.training_seconds:,.1f}"] if timed else []),
                *([md(attempt.decision or "-")] if verdicts else []),
            ]
        )
    return table(header, rows, left=(0, len(header) - 1) if verdicts else (0,))


def iteration_rows(facts: CardFacts) -> list[Attempt]:
    """The rows of the table of iterations. Of several trainings, those in which something was measured or removed."""
    one = not facts.continued
    return [
        row for attempt in facts.attempts for row in _by_weights(attempt) if one or row.k is not None or row.evaluations
    ]


def epochs_table(facts: CardFacts) -> str | None:
    """The main metric after each epoch of a training; of long trainings after the first ones, and the last."""
    metric, attempts = main_metric(facts), iteration_rows(facts)
    by_epoch = [_by_epoch(attempt, metric) for attempt in attempts]
    epochs = sorted({epoch for values in by_epoch for epoch in values})
    if not facts.from_run or facts.continued or len(epochs) < 2:
        return None
    long = len(epochs) > _EPOCHS
    epochs = epochs[:_FIRST] if long else epochs
    header = ["model", *(f"epoch {epoch}" for epoch in epochs), *(["last epoch"] if long else [])]
    rows = []
    for attempt, values in zip(attempts, by_epoch, strict=True):
        last = [next(reversed(values.values()), None)] if long else []
        rows.append([md(attempt.name), *map(_number, [values.get(epoch) for epoch in epochs] + last)])
    return f"{md(metric)} after each epoch, counted from each pruning on:\n\n{table(header, rows)}"


def settings_table(facts: CardFacts) -> str | None:
    """Stride, threshold, frozen blocks and time of an evaluation, for each row of the table of iterations."""
    attempts = iteration_rows(facts)
    rows = []
    for attempt in attempts:
        seconds = next((e.seconds for _, e in reversed(attempt.evaluations) if e.seconds is not None), None)
        thresholds = " ".join(map(threshold_text, attempt.thresholds)) or "-"
        cells = [
            "-" if attempt.k is None else str(attempt.k),
            thresholds,
            str(attempt.frozen),
            "-" if seconds is None else f"{seconds:,.2f}",
        ]
        rows.append([md(attempt.name), *cells])
    header = ["model", "k", "threshold", "frozen blocks", "evaluation (s)"]
    return table(header, rows) if any(set(row[1:]) - {"-", "0"} for row in rows) else None


def _by_weights(attempt: Attempt) -> list[Attempt]:
    """A row for the model as it was, and one for it with zeroed weights,
    where some were zeroed while it was trained.
    """
    dense = tuple(entry for entry in attempt.evaluations if not entry[1].sparse)
    sparse = tuple(entry for entry in attempt.evaluations if entry[1].sparse)
    if not sparse:
        return [attempt]
    zeroed = dataclasses.replace(attempt, name=f"{attempt.name}, weights zeroed", evaluations=sparse)
    if not dense:
        return [zeroed]
    return [
        dataclasses.replace(attempt, evaluations=dense),
        dataclasses.replace(zeroed, training_seconds=None, decision=None),
    ]


def _by_epoch(attempt: Attempt, metric: str) -> dict[int, float]:
    """The last value within each epoch, counted from the attempt's beginning."""
    found = {}
    for epoch, evaluation in attempt.evaluations:
        value = evaluation.metrics.get(f"eval_{metric}", evaluation.metrics.get(metric))
        if value is not None:
            found[max(0, math.ceil(epoch - attempt.epoch - 1e-6))] = value
    return found


def steps_table(facts: CardFacts) -> tuple[str | None, str | None]:
    """What each step of each pruning did: the share of right answers, where answers are classes; and the loss."""
    rows = [attempt for attempt in facts.attempts if attempt.k is not None and attempt.stages]
    if not rows:
        return None, None
    right = any(found["accuracy"] is not None for attempt in rows for found in attempt.stages.values())
    steps = [stage for stage in STAGES if any(stage in attempt.stages for attempt in rows)]
    header = ["model", *(STAGES[stage] for stage in steps)]
    shares = (
        table(header, [[md(a.name), *(_share(a.stages.get(stage)) for stage in steps)] for a in rows])
        if right
        else None
    )
    return shares, table(header, [[md(a.name), *(_loss(a.stages.get(stage)) for stage in steps)] for a in rows])


def steps_data(facts: CardFacts) -> str:
    """What the steps were measured on: the same samples within a row."""
    found = {
        (a.stages[stage]["samples"], a.stages[stage]["data"])
        for a in facts.attempts
        if a.k is not None
        for stage in a.stages
    }
    return "; ".join(f"{samples:,} samples of {data}" for samples, data in sorted(found))


def _share(found: Mapping[str, Any] | None) -> str:
    if found is None or found["accuracy"] is None:
        return "-"
    low, high = (100 * bound for bound in found["accuracy_interval"])
    return f"{100 * found['accuracy']:.1f} % ({low:.1f} .. {high:.1f})"


def _loss(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['loss']:.4f}" + (
        "" if found["loss_interval"] is None else " ({:.4f} .. {:.4f})".format(*found["loss_interval"])
    )


def against_original(facts: CardFacts) -> bool:
    """Whether figures "before" are of the original, and not of a model that had lost blocks already."""
    began = {evaluation.before_blocks for evaluation in facts.final if evaluation.before} - {None}
    return not facts.removed or began <= {facts.blocks[0]}


def evaluation_table(facts: CardFacts, given: Given) -> str | None:
    """Every metric of the model as it is, and of the original where it is known."""
    rows = []
    compared = any(evaluation.before for evaluation in facts.final)
    for evaluation in facts.final:
        n = evaluation.data.get("rows")
        for key, value in evaluation.metrics.items():
            original = [with_interval(evaluation.before.get(key), evaluation.interval_before(key))] if compared else []
            data = data_text(facts, given, evaluation, key)
            rows.append(
                [
                    md(bare(key)),
                    *original,
                    with_interval(value, evaluation.interval_of(key)),
                    f"{n:,}" if n else "-",
                    data,
                ]
            )
    before = "original" if against_original(facts) else "before"
    header = ["metric", *([before] if compared else []), "this model", "n", "data"]
    return table(header, rows, left=(0, len(header) - 1)) if rows else None


def with_interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    """A figure with its interval."""
    return _number(value) + (
        "" if bounds is None or value is None else f" ({_number(bounds[0])} .. {_number(bounds[1])})"
    )


def data_text(facts: CardFacts, given: Given, evaluation: Evaluation, key: str) -> str:
    """The data of a figure in a few words: its name, its configuration, its split."""
    parts = given.words_of(facts, evaluation.data) or ["data not named"]
    split = evaluation.split_of(key)
    return ", ".join([*parts, md(split) if split else "split not noted"])


def _number(value: float | None) -> str:
    """A figure in as many digits as one reads."""
    if value is None:
        return "-"
    size = abs(value)
    return (
        f"{value:.4g}"
        if size >= 1e6
        else f"{value:,.4f}"
        if size < 10
        else f"{value:,.2f}"
        if size < 1000
        else f"{value:,.1f}"
    )


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
        data = (
            f"inputs measured {how} on {facts.sparsity.samples:,} samples" if facts.sparsity.samples else "without data"
        )
        parts[0] += f" Asked for: {md(c.method)}, {what}, {data}."
        parts.append(sparsity_table([_shown(m) for m in facts.sparsity.matrices.values()]))
    parts.append("The zeros are stored like any other number: the checkpoint is neither smaller nor faster by them.")
    return "\n\n".join(parts)


def _shown(matrix: Any) -> Any:
    return dataclasses.replace(matrix, stack=code(matrix.stack), role=code(matrix.role))
