"""The picture of quality against size: the original, each pruning, and this model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MissingDependencyError
from ..reports.attempts import Evaluation, bare
from .facts import CardFacts
from .overview import headline

__all__ = ["Point", "Series", "quality_alt", "quality_series", "save_quality"]

_COLOURS = ("#1f6feb", "#bf3989", "#1a7f37")


@dataclass(frozen=True)
class Point:
    """One model: its size, its figure with the interval, and what to call it."""

    name: str
    parameters: int
    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Models that were measured on the same data."""

    data: str
    points: tuple[Point, ...]


def quality_series(facts: CardFacts) -> tuple[str, list[Series]]:
    """Name of the main metric, and the models that were measured by it: within a series on the same data,
    two at least.
    """
    shown = headline(facts)
    if shown is None or not facts.removed:
        return "", []
    name = bare(shown.key)
    found = []
    inside = [
        point
        for attempt in facts.attempts
        if (point := _inside(attempt.name, attempt.parameters, attempt.evaluations, name))
    ]
    found.append(Series("validation data, in the training", tuple(inside)))
    before, now = facts.parameters
    if shown.evaluation.before and shown.before is not None and before and now:  # of the original
        original, this = (
            Point("original", before, *shown.before),
            Point("this model", now, *_figure(shown.evaluation, shown.key)),
        )
        split = shown.evaluation.split_of(shown.key)
        found.append(Series(f"{split or 'evaluation'} data, at the end", (original, this)))
    return name, [series for series in found if len({point.parameters for point in series.points}) > 1]


def _inside(
    name: str, parameters: int | None, evaluations: Sequence[tuple[float, Evaluation]], metric: str
) -> Point | None:
    last = next((e for _, e in reversed(evaluations) if f"eval_{metric}" in e.metrics and not e.sparse), None)
    return None if last is None or parameters is None else Point(name, parameters, *_figure(last, f"eval_{metric}"))


def _figure(evaluation: Evaluation, key: str) -> tuple[float, tuple[float, float] | None]:
    return evaluation.metrics[key], evaluation.interval_of(key)


def quality_alt(metric: str, series: Sequence[Series]) -> str:
    """What the picture shows, for those who do not see it."""
    parts = [
        f"{one.data}: " + ", ".join(f"{p.name} {p.value:.4f} at {p.parameters:,} parameters" for p in one.points)
        for one in series
    ]
    return f"{metric} against number of parameters. {'; '.join(parts)}."


def save_quality(metric: str, series: Sequence[Series], path: Path) -> None:
    """Write the picture as a PNG.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
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
    for one, colour, dash, above in zip(series, _COLOURS, ("--", "-", ":"), (False, True, True), strict=False):
        points = sorted(one.points, key=lambda point: -point.parameters)
        sizes, values = [point.parameters / 1e6 for point in points], [point.value for point in points]
        low, high = zip(*[point.interval or (point.value, point.value) for point in points], strict=True)
        errors = [
            [v - lo for v, lo in zip(values, low, strict=True)],
            [hi - v for v, hi in zip(values, high, strict=True)],
        ]
        errors = [[max(0.0, error) for error in side] for side in errors]
        axis.errorbar(
            sizes, values, yerr=errors, fmt=f"o{dash}", color=colour, capsize=4, label=_plain(one.data), linewidth=1.2
        )
        for point, size in zip(points, sizes, strict=True):
            label, offset = _plain(point.name), (6, 7 if above else -13)
            axis.annotate(
                label, (size, point.value), xytext=offset, textcoords="offset points", fontsize=8, color=colour
            )
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
