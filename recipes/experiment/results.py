"""The figures of an experiment: a row for each model, as JSON and as the table that the first experiments printed."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deeparc_hf.checkpoint.weights_mark import mark_of_files
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.files import finite, write_whole
from deeparc_hf.core.markdown import table
from deeparc_hf.core.statistics import wilson_interval
from deeparc_hf.publish import CARD_FILE
from deeparc_hf.publish.gather import EVALUATIONS_FILE
from deeparc_hf.reports.provenance import TIMES

__all__ = [
    "RESULTS",
    "TEXTS",
    "Measured",
    "Row",
    "Speed",
    "against_original",
    "metric_cell",
    "read_ends",
    "read_rows",
    "results_table",
    "shown",
    "whereabouts",
    "write_evaluations",
    "write_results",
]

RESULTS, TEXTS = "results", "texts"
_EPOCHS, _FIRST = 6, 3
_MAIN = ("accuracy", "perplexity", "bleu", "wer")


@dataclass(frozen=True)
class Measured:
    """What one evaluation on the test data gives.

    Attributes:
        metrics: by name.
        intervals: 95 % intervals of those that have one.
        samples: number of test samples.
        seconds: warm time of one evaluation, the median of several.
        texts: what was generated, beside what it should be; kept in a file of its own.
        data: of metrics that are of other data than the test data, what is known of these.
    """

    metrics: Mapping[str, float]
    samples: int
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float | None = None
    texts: Sequence[Mapping[str, str]] = field(default=(), compare=False, repr=False)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def with_more(self, more: Measured) -> Measured:
        """With what was measured beside it; the number of samples is that of this one."""
        joined = {name: {**getattr(self, name), **getattr(more, name)} for name in ("metrics", "intervals", "data")}
        return dataclasses.replace(self, **joined, texts=[*self.texts, *more.texts])

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, Any], samples: int) -> Measured:
        """From what Trainer.evaluate returns on the test data; an accuracy gets its Wilson interval."""
        figures, intervals = {}, {}
        for key, value in metrics.items():
            name = key.removeprefix("test_")
            if name == key or not isinstance(value, (int, float)) or key.endswith(TIMES):
                continue
            figures[name] = float(value)
            if name.endswith("accuracy") and 0 <= value <= 1:
                intervals[name] = wilson_interval(round(value * samples), samples)
        return cls(figures, samples, intervals)


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        name: "original", "iteration 1", "iteration 1, 30 % zeros".
        blocks: number of blocks of each stack.
        parameters: number of parameters.
        measured: on the test data.
        frozen: blocks that the training before it left frozen.
        threshold, k: of the pruning before it.
        sparsity: measured share of zeros in the matrices that were zeroed.
        training_seconds: time of the training that led to it.
        validation: main metric at the end of each epoch of that training, on the validation data.
        tested: the same on the test data, where it was asked for.
        folder: where the model lies, within the output folder; None if it was not saved.
        verdict: of the gate.
    """

    name: str
    blocks: Mapping[str, int]
    parameters: int
    measured: Measured
    frozen: int = 0
    threshold: float | None = None
    k: int | None = None
    sparsity: float | None = None
    training_seconds: float | None = None
    validation: Sequence[float] = ()
    tested: Sequence[float] = ()
    folder: str | None = None
    verdict: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without the texts."""
        data = dataclasses.asdict(dataclasses.replace(self, measured=dataclasses.replace(self.measured, texts=())))
        del data["measured"]["texts"]
        return finite(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """The inverse of `to_dict`."""
        intervals = {name: tuple(bounds) for name, bounds in data["measured"]["intervals"].items()}
        measured = Measured(**{**data["measured"], "intervals": intervals})
        epochs = {name: tuple(data.get(name, ())) for name in ("validation", "tested")}
        return cls(**{**data, "measured": measured, **epochs})


@dataclass(frozen=True)
class Speed:
    """Warm times of two models, measured in turns in one process.

    Attributes:
        ratio: time of the smaller one over that of the original: the median of the turns' ratios.
        low, high: the lowest and the highest of these.
        blocks: number of blocks over that of the original, the ideal.
        turns: number of turns.
    """

    ratio: float
    low: float
    high: float
    blocks: float
    turns: int

    @property
    def of_ideal(self) -> float:
        """The speed-up that was reached, over that which the share of blocks promises."""
        return self.blocks / self.ratio

    def __str__(self) -> str:
        return (
            f"Evaluation time: {self.ratio:.3f} of the original's ({self.low:.3f} .. {self.high:.3f}, {self.turns} "
            f"turns); {self.blocks:.3f} of the blocks are left, so the speed-up is {self.of_ideal:.2f} of the ideal."
        )


def results_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table with the columns of the first experiments."""
    names = list(dict.fromkeys(name for row in rows for name in row.measured.metrics))
    epochs = max((len(row.validation) for row in rows), default=0)
    first = _FIRST if epochs > _EPOCHS else epochs  # of long trainings the first epochs, and the last one
    titles = [*(f"epoch {epoch + 1}" for epoch in range(first)), *(["last epoch"] if first < epochs else [])]
    header = ["model", *titles, *names, "blocks", "parameters"]
    header += ["evaluation time (s)", "training time (s)", "freeze", "threshold", "K", "zeros (%)"]
    lines = []
    for row in rows:
        validation = [f"{value:.4f}" for value in row.validation[:first]] + ["-"] * (first - len(row.validation))
        if first < epochs:
            validation.append(f"{row.validation[-1]:.4f}" if row.validation else "-")
        lines.append(
            [
                row.name + (f" ({row.verdict})" if row.verdict else ""),
                *validation,
                *(metric_cell(row.measured, name, "..") for name in names),
                " + ".join(map(str, row.blocks.values())),
                f"{row.parameters:,}",
                shown(row.measured.seconds, ",.2f"),
                shown(row.training_seconds, ",.2f"),
                str(row.frozen),
                shown(row.threshold, ".4f"),
                shown(row.k),
                shown(row.sparsity and 100 * row.sparsity, ".1f"),
            ]
        )
    return table(header, lines)


def against_original(rows: Sequence[Row]) -> list[str]:
    """A sentence for each pruned model: whether its main metric lies within the interval of the original."""
    first, *others = rows
    name = next((name for name in (*_MAIN, *first.measured.intervals) if name in first.measured.intervals), None)
    if name is None:
        return []
    low, high = first.measured.intervals[name]
    found = []
    for row in others:
        value = row.measured.metrics.get(name)
        if value is None or row.sparsity is not None:
            continue
        outside = (
            f"{low - value:.4f} below" if value < low else f"{value - high:.4f} above" if value > high else "within"
        )
        found.append(
            f"{row.name}: {name} {value:.4f} lies {outside} the original's 95 % interval ({low:.4f} .. {high:.4f})."
        )
    return found


def write_results(
    folder: Path,
    rows: Sequence[Row],
    speeds: Mapping[str, Speed],
    origin: Mapping[str, Any],
    notes: Sequence[str] = (),
    ends: Mapping[str, str] | None = None,
    sections: Sequence[str] = (),
) -> None:
    """Write results.json and results.md, each whole or not at all. Speeds are by name of the row; origin is how it was
    made (arguments, data); ends are why there are no rows of these names; sections of results.md come before how it
    was made.
    """
    data: dict[str, Any] = {
        "rows": [row.to_dict() for row in rows],
        "speeds": {name: dataclasses.asdict(speed) for name, speed in speeds.items()},
        "notes": list(notes),
        "ends": dict(ends or {}),
        **origin,
        "hardware": hardware(),
        "versions": package_versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# Results", results_table(rows)]
    repeats = origin.get("pruning", {}).get("repeats")
    times = "one evaluation" if repeats == 1 else f"the median of {repeats or 'several'}"
    counts = ", ".join(f"{n:,}" for n in sorted({row.measured.samples for row in rows}))
    parts.append(
        f"Metrics: on {counts} test samples, with 95 % intervals where they are known. Epochs: the main metric on the "
        f"validation data after each epoch of the training that led to the row. Evaluation time: warm, {times}. "
        "Freeze: blocks that were not trained. One run with one seed."
    )
    parts += [*against_original(rows), *(f"{name}: {speed}" for name, speed in speeds.items()), *notes]
    made_with = {**data["hardware"], **data["versions"]}
    parts += [
        *sections,
        "## Made with",
        f"```json\n{json.dumps(origin, indent=1)}\n```",
        "\n".join(f"- {key}: {value}" for key, value in made_with.items()),
    ]
    write_whole(folder / f"{RESULTS}.md", "\n\n".join(parts) + "\n")
    _write_json(folder / f"{RESULTS}.json", data)


def write_evaluations(
    folder: Path,
    row: Row,
    original: Row,
    data: Mapping[str, Any],
    speed: Speed | None = None,
    *,
    judged: bool = False,
    answers: Sequence[Mapping[str, str]] = (),
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's figures on the test data beside it, with those of the original, for its card
    (`create_model_card`).

    Args:
        data: what is known of the test data (`provenance.origin_of`).
        judged: whether prunings were judged on the same rows.
        speed: its time over that of the original.
        answers: to the same prompts, of the original ("before") and this model ("generated").
        training: settings of the training that led to this model, where there was one.
    """
    apart = row.measured.data
    own = [name for name in row.measured.metrics if name not in apart]
    sets = [(own, {**data, "rows": row.measured.samples}, judged)]
    for facts in [facts for number, facts in enumerate(apart.values()) if facts not in list(apart.values())[:number]]:
        sets.append(([name for name, known in apart.items() if known == facts], dict(facts), False))
    mark, entries = mark_of_files(folder), []
    for names, facts, seen in sets:
        entry: dict[str, Any] = dict(zip(("metrics", "intervals"), _of(row.measured, names), strict=True))
        if row.name != original.name:
            entry |= zip(("before", "before_intervals"), _of(original.measured, names), strict=True)
            entry["before_blocks"] = sum(original.blocks.values())
        entries.append({**entry, "data": facts, "weights": mark, "stacks": row.blocks, "judged": seen})
    report: dict[str, Any] = {"evaluations": entries, "speed": None if speed is None else dataclasses.asdict(speed)}
    report |= {"training": training, "training_seconds": row.training_seconds if training else None}
    _write_json(folder / EVALUATIONS_FILE, {**report, "answers": list(answers)})


def _of(measured: Measured, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some metrics and their intervals."""
    parts = (measured.metrics, measured.intervals)
    return [_test({name: part[name] for name in names if name in part}) for part in parts]


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")


def whereabouts(folder: Path, rows: Sequence[Row], published: str | None = None) -> str:
    """Where what an experiment made lies, for its end; `published` is a repository."""
    others = sorted(path.name for path in folder.glob("*.md") if path.stem != RESULTS)
    lines = [f"Results: {folder / RESULTS}.md, the same in {RESULTS}.json{''.join(f', and {name}' for name in others)}"]
    models = [folder / row.folder for row in rows if row.folder is not None]
    if models:
        lines.append(f"Models: {', '.join(map(str, models))}")
    cards = [path / CARD_FILE for path in models if (path / CARD_FILE).is_file()]
    if cards:
        lines.append(f"Card: {', '.join(map(str, cards))}")
    if published is not None:
        lines.append(f"Published: {published}")
    elif cards:
        lines.append(f"To publish it: deeparc push {shlex.quote(str(cards[-1].parent))} ORG/NAME")
    return "\n".join(lines)


def _test(figures: Mapping[str, Any]) -> dict[str, Any]:
    """With the names that Trainer.evaluate gives them."""
    return {f"test_{name}": value for name, value in figures.items()}


def read_rows(folder: Path) -> list[Row]:
    """The rows of an experiment that is done."""
    return [Row.from_dict(entry) for entry in _read(folder)["rows"]]


def read_ends(folder: Path) -> dict[str, str]:
    """Why rows of an experiment that is done are missing, by their names."""
    return dict(_read(folder).get("ends", {}))


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / f"{RESULTS}.json").read_text("utf-8")))


def metric_cell(measured: Measured, name: str, to: str) -> str:
    """A metric as a table shows it, with its interval where it has one; `to` stands between the bounds."""
    value, interval = measured.metrics.get(name), measured.intervals.get(name)
    bounds = "" if value is None or interval is None else f" ({interval[0]:.4f} {to} {interval[1]:.4f})"
    return shown(value, ".4f") + bounds


def shown(value: float | None, form: str = "") -> str:
    """A figure as a table shows it."""
    return "-" if value is None else format(value, form)
