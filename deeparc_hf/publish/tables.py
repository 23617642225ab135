"""The tables of a card, which its template asks for. What was not measured is "-"; a table of nothing is None."""

from __future__ import annotations

import dataclasses
import math

from ..core.markdown import code, md, table
from ..core.tables import threshold_text
from ..reports.attempts import STAGES, Attempt, Evaluation, Figure, bare
from ..reports.run_report import loss_text, share_text
from ..sparsity.report import sparsity_table
from .content import CardContent

_EPOCHS, _FIRST = 6, 4  # columns at most; of longer runs the first ones, and the last value


def _main_metric(content: CardContent) -> str:
    """The metric of the run's gate, else an accuracy, else the first one that is no loss, else the loss."""
    asked = bare(content.run.get("metric") or "")
    if asked:
        return asked
    inside = [e.metrics for a in content.attempts for e in a.evaluations]
    evaluations = inside or [e.metrics for e in content.final]  # the table is of those in the training
    names = list(dict.fromkeys(bare(key) for metrics in evaluations for key in metrics))
    return next(
        (n for n in names if n.endswith("accuracy")), next((n for n in names if not n.endswith("loss")), "loss")
    )


def iterations_table(content: CardContent) -> str | None:
    """A row for the model before, and for each pruning that was tried: what it left, and what it cost."""
    metric = _main_metric(content)
    attempts = _iteration_rows(content)
    if not attempts:
        return None
    last = [next(reversed(_by_epoch(attempt, metric).values()), None) for attempt in attempts]
    measured = any(value is not None for value in last)
    verdicts = any(attempt.decision for attempt in attempts)
    if len(attempts) == 1 and not measured and not verdicts:
        return None  # all that it would say stands above
    first, changes = None, []  # the last value before any pruning; the rows' changes from there
    for attempt, value in zip(attempts, last, strict=True):
        first = value if first is None and attempt.k is None else first
        unknown = first is None or value is None or attempt.k is None
        changes.append(None if unknown else value - first)
    seconds = [attempt.training_seconds or None for attempt in attempts]
    columns = [
        (True, "model", [md(attempt.name) for attempt in attempts]),
        (True, "blocks", [" + ".join(map(str, attempt.blocks.values())) or "-" for attempt in attempts]),
        (True, "parameters", [_or_dash(attempt.parameters, ",") for attempt in attempts]),
        (measured, md(metric), list(map(_number, last))),
        (first is not None, "change", [_or_dash(change, "+.4f") for change in changes]),
        (any(seconds), "training (s)", [_or_dash(value, ",.1f") for value in seconds]),
        (verdicts, "verdict", [md(attempt.decision or "-") for attempt in attempts]),
    ]
    _, titles, cells = zip(*(column for column in columns if column[0]), strict=True)
    return table(titles, zip(*cells, strict=True), left=(0, len(titles) - 1) if verdicts else (0,))


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _iteration_rows(content: CardContent) -> list[Attempt]:
    """The rows of the table of iterations. Of several trainings, those in which something was measured or removed."""
    rows = [row for attempt in content.attempts for row in _by_weights(attempt)]
    return [row for row in rows if not content.continued or row.k is not None or row.evaluations]


def epochs_table(content: CardContent) -> str | None:
    """The main metric after each epoch of a training; of long trainings after the first ones, and the last."""
    metric, attempts = _main_metric(content), _iteration_rows(content)
    by_epoch = [_by_epoch(attempt, metric) for attempt in attempts]
    epochs = sorted({epoch for values in by_epoch for epoch in values})
    if not content.from_run or content.continued or len(epochs) < 2:
        return None
    long = len(epochs) > _EPOCHS
    epochs = epochs[:_FIRST] if long else epochs
    header = ["model", *(f"epoch {epoch}" for epoch in epochs), *(["last epoch"] if long else [])]
    rows = []
    for attempt, values in zip(attempts, by_epoch, strict=True):
        last = [next(reversed(values.values()), None)] if long else []
        rows.append([md(attempt.name), *map(_number, [values.get(epoch) for epoch in epochs] + last)])
    return f"{md(metric)} after each epoch, counted from each pruning on:\n\n{table(header, rows)}"


def settings_table(content: CardContent) -> str | None:
    """Stride, threshold, frozen blocks and time of an evaluation, for each row of the table of iterations."""
    rows = []
    for attempt in _iteration_rows(content):
        seconds = next((e.seconds for e in reversed(attempt.evaluations) if e.seconds is not None), None)
        thresholds = " ".join(map(threshold_text, sorted(set(attempt.thresholds.values())))) or "-"
        frozen = sum(map(len, attempt.frozen.values()))
        cells = [_or_dash(attempt.k, "d"), thresholds, str(frozen), _or_dash(seconds, ",.2f")]
        rows.append([md(attempt.name), *cells])
    header = ["model", "k", "threshold", "frozen blocks", "evaluation (s)"]
    return table(header, rows) if any(set(row[1:]) - {"-", "0"} for row in rows) else None


def _by_weights(attempt: Attempt) -> list[Attempt]:
    """A row for the model as it was, and one for it with zeroed weights, where some were zeroed in its training."""
    dense, sparse = (tuple(e for e in attempt.evaluations if e.sparse == zeroed) for zeroed in (False, True))
    if not sparse:
        return [attempt]
    zeroed = dataclasses.replace(attempt, name=f"{attempt.name}, weights zeroed", evaluations=sparse)
    if not dense:
        return [zeroed]
    zeroed = dataclasses.replace(zeroed, training_seconds=None, decision=None)
    return [dataclasses.replace(attempt, evaluations=dense), zeroed]


def _by_epoch(attempt: Attempt, metric: str) -> dict[int, float]:
    """The last value within each epoch, counted from the attempt's beginning."""
    by_epoch = {}
    for evaluation in attempt.evaluations:
        value = evaluation.metrics.get(f"eval_{metric}", evaluation.metrics.get(metric))
        if value is not None:
            by_epoch[max(0, math.ceil(evaluation.epoch - attempt.epoch - 1e-6))] = value
    return by_epoch


def steps_table(content: CardContent) -> tuple[str | None, str | None]:
    """What each step of each pruning did: the share of right answers, where answers are classes; and the loss."""
    attempts = [attempt for attempt in content.attempts if attempt.k is not None and attempt.stages]
    steps = [stage for stage in STAGES if any(stage in attempt.stages for attempt in attempts)]
    header = ["model", *(STAGES[stage] for stage in steps)]
    right = any(quality["accuracy"] is not None for attempt in attempts for quality in attempt.stages.values())
    shares, losses = (
        table(header, [[md(a.name), *(cell(a.stages.get(stage)) for stage in steps)] for a in attempts])
        for cell in (share_text, loss_text)
    )
    return shares if right else None, losses if attempts else None


def steps_data(content: CardContent) -> str:
    """What the steps were measured on: the same samples within a row."""
    pruned = [attempt for attempt in content.attempts if attempt.k is not None]
    measured = {(quality["samples"], quality["data"]) for attempt in pruned for quality in attempt.stages.values()}
    return "; ".join(f"{samples:,} samples of {data}" for samples, data in sorted(measured))


def evaluation_table(content: CardContent) -> str | None:
    """Every metric of the model as it is, and of the original where it is known."""
    compared = any(evaluation.before for evaluation in content.final)
    rows = []
    for evaluation in content.final:
        n = _or_dash(evaluation.data.get("rows") or None, ",")
        for key in evaluation.metrics:
            original = [figure_text(evaluation.figure_before(key))] if compared else []
            data = data_text(content, evaluation, key)
            rows.append([md(bare(key)), *original, figure_text(evaluation.figure(key)), n, data])
    before = "original" if content.against_original else "before"
    header = ["metric", *([before] if compared else []), "this model", "n", "data"]
    return table(header, rows, left=(0, len(header) - 1)) if rows else None


def figure_text(figure: Figure | None) -> str:
    """A figure with its interval."""
    if figure is None or figure.interval is None:
        return _number(None if figure is None else figure.value)
    low, high = map(_number, figure.interval)
    return f"{_number(figure.value)} ({low} .. {high})"


def data_text(content: CardContent, evaluation: Evaluation, key: str) -> str:
    """The data of a figure in a few words: its name, its configuration, its split."""
    parts = content.words_of(evaluation.data) or ["data not named"]
    split = evaluation.split_of(key)
    return ", ".join([*parts, md(split) if split else "split not noted"])


def _number(value: float | None) -> str:
    """A figure in as many digits as one reads."""
    size = abs(value or 0)
    form = ",.4f" if size < 10 else ",.2f" if size < 1000 else ",.1f" if size < 1e6 else ".4g"
    return _or_dash(value, form)


def sparsity_section(content: CardContent) -> str | None:
    """What was zeroed, as asked for and as measured; None where nothing was."""
    if content.record.zeros is None:
        return None
    zeros, size, count = content.record.zeros
    parts = [f"{100 * zeros / max(1, size):.2f} % of the {size:,} weights of {count} matrices are zero."]
    if content.sparsity is not None:
        c, samples = content.sparsity.config, content.sparsity.samples
        what = f"the {md(c.pattern)} pattern" if c.pattern else f"{100 * c.sparsity:g} % of each output row"
        how = "block by block" if c.sequential else "in one pass of the dense model"
        data = f"inputs measured {how} on {samples:,} samples" if samples else "without data"
        parts[0] += f" Asked for: {md(c.method)}, {what}, {data}."
        matrices = content.sparsity.matrices.values()
        shown = [dataclasses.replace(m, stack=code(m.stack), role=code(m.role)) for m in matrices]
        parts.append(sparsity_table(shown))
    parts.append("The zeros are stored like any other number: the checkpoint is neither smaller nor faster by them.")
    return "\n\n".join(parts)
