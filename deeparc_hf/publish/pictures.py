"""The picture of quality against size: the original, each pruning, and this model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import MissingDependencyError
from ..reports.attempts import Figure, bare
from .content import CardContent
from .overview import headline

__all__ = ["Point", "Series", "quality_alt", "quality_series", "save_quality"]

_COLOURS = ("#1f6feb", "#bf3989", "#1a7f37")


class Point(NamedTuple):
    """One model: what to call it, its number of parameters, and what was measured."""

    name: str
    parameters: int
    figure: Figure


class Series(NamedTuple):
    """Models that were measured on the same data."""

    data: str
    points: list[Point]


def quality_series(content: CardContent) -> tuple[str, list[Series]]:
    """Name of the main metric, and the models that were measured by it: within a series on the same data, two at
    least.
    """
    shown = headline(content)
    if shown is None or not content.removed:
        return "", []
    name = bare(shown.key)
    key, inside = f"eval_{name}", []
    for attempt in content.attempts:
        figures = [e.figure(key) for e in attempt.evaluations if key in e.metrics and not e.sparse]
        if figures and attempt.parameters is not None:
            inside.append(Point(attempt.name, attempt.parameters, figures[-1]))
    series = [Series("validation data, in the training", inside)]
    before, now = content.parameters
    if shown.evaluation.before and shown.before is not None and before and now:  # of the original
        ends = [Point("original", before, shown.before), Point("this model", now, shown.figure)]
        series.append(Series(f"{shown.evaluation.split_of(shown.key) or 'evaluation'} data, at the end", ends))
    return name, [one for one in series if len({point.parameters for point in one.points}) > 1]


def quality_alt(metric: str, series: Sequence[Series]) -> str:
    """What the picture shows, for those who do not see it."""
    parts = [
        f"{one.data}: " + ", ".join(f"{p.name} {p.figure.value:.4f} at {p.parameters:,} parameters" for p in one.points)
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
        sizes, values = [point.parameters / 1e6 for point in points], [point.figure.value for point in points]
        bounds = [point.figure.interval or (point.figure.value,) * 2 for point in points]
        below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
        above_it = [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]
        look = {"fmt": f"o{dash}", "color": colour, "capsize": 4, "linewidth": 1.2}
        axis.errorbar(sizes, values, yerr=[below, above_it], label=_plain(one.data), **look)
        for point, size in zip(points, sizes, strict=True):
            label, offset = _plain(point.name), (6, 7 if above else -13)
            axis.annotate(
                label, (size, point.figure.value), xytext=offset, textcoords="offset points", fontsize=8, color=colour
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
