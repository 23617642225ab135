"""The first screen of a card: this model against the original, in figures, and what was not measured or done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..checkpoint.weights_mark import SIZES
from ..core.markdown import md, table
from ..errors import MissingDependencyError
from ..reports.attempts import FINISHED, Evaluation, Figure, bare
from .content import CardContent
from .tables import data_text, figure_text
from .vocabulary import ERRORS

__all__ = ["ENDING", "overview", "quality_alt", "quality_series", "save_quality", "state"]

ENDING = "ending"  # phase of a run that is pushed at its last step, before its callbacks hear that it is over
_NOT = "not measured"


class Point(NamedTuple):
    """One model in the picture of the quality."""

    name: str
    parameters: int
    figure: Figure


class _Headline(NamedTuple):
    """The metric that stands for the quality of a model: of it as it is, and of the original on the same data."""

    evaluation: Evaluation
    key: str
    figure: Figure
    before: Figure | None


def _headline(content: CardContent) -> _Headline | None:
    """The main metric on test data, else on data that prunings were not judged on, else on what there is."""
    asked = bare(content.run.get("metric") or "")
    measured = [(evaluation, key) for evaluation in content.final for key in evaluation.metrics]
    if not measured:
        return None
    evaluation, key = min(measured, key=lambda pair: (_kind(bare(pair[1]), asked), _split(*pair)))
    before = evaluation.figure_before(key) if content.against_original else None
    first = content.attempts[0] if content.attempts else None
    if before is None and first is not None and first.k is None and (content.removed or content.record.zeros):
        # the training may have measured it before its first pruning
        same = [e for e in first.evaluations if e.data == evaluation.data and key in e.metrics and not e.sparse]
        if same and (not content.removed or sum(first.blocks.values()) == content.blocks[0]):
            before = same[-1].figure(key)
    return _Headline(evaluation, key, evaluation.figure(key), before)


def _kind(name: str, asked: str) -> int:
    ranks = [asked and name == asked, name == "accuracy", name.endswith("accuracy"), not name.endswith("loss")]
    return next((rank for rank, fits in enumerate(ranks) if fits), len(ranks))


def _split(evaluation: Evaluation, key: str) -> int:
    split = evaluation.split_of(key) or ""
    return 2 if split.startswith("validation") else 0 if split.startswith("test") else 1


def overview(content: CardContent) -> str:
    """The table of the original against this model."""
    speed, (before, now) = content.speed, content.parameters
    timed = speed and content.against_original
    times = ["1", f"{speed['ratio']:.3f} ({speed['low']:.3f} .. {speed['high']:.3f})"] if timed else [_NOT, _NOT]
    before = before or (now if not content.removed else None)
    change = f" ({100 * (now - before) / before:+.1f} %)" if before and now and before != now else ""
    bytes_each = SIZES.get(content.dtype or "")
    counts = ["not known" if count is None else f"{count:,}" for count in (before, now)]
    sizes = [
        "not known" if count is None or bytes_each is None else f"{count * bytes_each / 1e6:,.1f}"
        for count in (before, now)
    ]
    rows = [
        _quality_row(content),
        ["time of one evaluation (measured in turns)", *times],
        ["parameters", counts[0], counts[1] + change],
        [f"size of the weights (MB{f', {content.dtype}' if bytes_each else ''})", *sizes],
    ]
    if content.removed:
        rows.append(["blocks", *map(str, content.blocks)])
    return table(["", "original", "this model"], rows)


def _quality_row(content: CardContent) -> list[str]:
    shown = _headline(content)
    if shown is None:
        return ["quality", _NOT, _NOT]
    name, n = bare(shown.key), shown.evaluation.data.get("rows")
    better = "lower is better; " if name.rpartition("_")[2] in ERRORS else ""
    data = f"{data_text(content, shown.evaluation, shown.key)}{f'; n = {n:,}' if n else ''}"
    before = figure_text(shown.before) if shown.before else _NOT
    return [f"{md(name)} ({better}{data})", before, figure_text(shown.figure)]


def _trained(content: CardContent) -> str | None:
    """Whether the model was trained after its last pruning, as far as that is known; None where nothing was removed."""
    if not content.removed or not content.record.iterations:
        return None
    last = content.last_pruning
    left = last.get("left")
    if left is not None and left == content.mark:
        healed = any(site.get("healed") for site in last.get("healing") or ())
        return f"**Not trained after the removal**: the weights are as {'the repair' if healed else 'it'} left them."
    standing = [attempt for attempt in content.attempts if attempt.k is not None and not attempt.is_taken_back]
    if content.trained_for:
        minutes = round(content.trained_for / 60)
        return f"Trained after the removal{f', for {minutes:,} minutes' if minutes > 1 else ''}."
    seconds = standing[-1].training_seconds if standing and content.from_run else None
    if seconds or "retrained" in (last.get("stages") or {}) or last.get("metrics"):
        return "Trained after the removal."
    if left is not None and content.mark is not None:
        what = "zeroed, trained or converted" if content.record.zeros is not None else "trained or converted"
        return f"The weights were changed after the removal ({what}); how was not noted."
    return "Whether it was trained after the removal was not noted."


def state(content: CardContent) -> str:
    """What was not measured or done, what it needs, and whether its training was over."""
    shown = _headline(content)
    parts = [_trained(content)]
    if shown is None:
        parts.append("No evaluation of these weights was noted.")
    elif shown.before is None and (content.removed or content.record.zeros is not None):
        parts.append("No original was measured beside it.")
    gated = content.run.get("max_drop") is not None
    if shown is not None and (shown.evaluation.judged or gated) and _split(shown.evaluation, shown.key) == 2:
        parts.append("Prunings were judged on the same data, so its figure is optimistic.")
    phase = content.run.get("phase")
    if phase == ENDING:
        pending = any(last.k is not None and last.decision is None for last in content.attempts[-1:])
        if pending and gated:
            parts.append("It was saved at the last step of its training, before its last pruning was judged.")
    elif phase not in (None, FINISHED):
        parts.append(f"It was saved in the middle of its training (state: {md(phase)}).")
    parts.append(
        f"It needs deeparc_hf: plain {content.library} does not know its type."
        if content.needs_package
        else f"It loads with plain {content.library}: nothing of what made it is needed."
    )
    return " ".join(part for part in parts if part)


def quality_series(content: CardContent) -> tuple[str, dict[str, list[Point]]]:
    """Name of the main metric, and by data the models that were measured on it, two at least."""
    shown = _headline(content)
    if shown is None or not content.removed:
        return "", {}
    name = bare(shown.key)
    key, inside = f"eval_{name}", []
    for attempt in content.attempts:
        figures = [e.figure(key) for e in attempt.evaluations if key in e.metrics and not e.sparse]
        if figures and attempt.parameters is not None:
            inside.append(Point(attempt.name, attempt.parameters, figures[-1]))
    series = {"validation data, in the training": inside}
    before, now = content.parameters
    if shown.evaluation.before and shown.before is not None and before and now:  # of the original
        ends = [Point("original", before, shown.before), Point("this model", now, shown.figure)]
        series[f"{shown.evaluation.split_of(shown.key) or 'evaluation'} data, at the end"] = ends
    return name, {data: points for data, points in series.items() if len({p.parameters for p in points}) > 1}


def quality_alt(content: CardContent) -> str:
    """What the picture shows, for those who do not see it, as Markdown."""
    metric, series = quality_series(content)
    parts = [
        f"{data}: " + ", ".join(f"{p.name} {p.figure.value:.4f} at {p.parameters:,} parameters" for p in points)
        for data, points in series.items()
    ]
    return md(f"{metric} against number of parameters. {'; '.join(parts)}.", 1000)


def save_quality(metric: str, series: Mapping[str, list[Point]], path: Path) -> None:
    """Write the picture as a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            'A picture of the iterations needs matplotlib: pip install "deeparc_hf[plots]".'
        ) from error
    figure = Figure(figsize=(7.2, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    looks = (("#1f6feb", "--", -13), ("#bf3989", "-", 7))  # colour, dashes, and where the names are, of two series
    for (data, points), (colour, dash, above) in zip(series.items(), looks, strict=False):
        points = sorted(points, key=lambda point: -point.parameters)
        sizes, values = [point.parameters / 1e6 for point in points], [point.figure.value for point in points]
        bounds = [point.figure.interval or (point.figure.value,) * 2 for point in points]
        below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
        above_it = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
        look = {"fmt": f"o{dash}", "color": colour, "capsize": 4, "linewidth": 1.2}
        axis.errorbar(sizes, values, yerr=[below, above_it], label=_plain(data), **look)
        named = {"xytext": (6, above), "textcoords": "offset points", "fontsize": 8, "color": colour}
        for point, size, value in zip(points, sizes, values, strict=True):
            axis.annotate(_plain(point.name), (size, value), **named)
    axis.invert_xaxis()
    axis.margins(x=0.18, y=0.15)
    axis.set_xlabel("parameters (millions); smaller to the right", fontsize=9)
    axis.set_ylabel(_plain(metric), fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    axis.tick_params(labelsize=8)
    figure.savefig(path, format="png")


def _plain(text: str) -> str:
    """Text that does not begin a formula."""
    return text.replace("$", r"\$")
