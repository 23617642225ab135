"""The frontier of a search (`frontier.Frontier`) as a picture: quality against time or size, with intervals."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError, MissingDependencyError

__all__ = ["plot_frontier"]

_VALUE, _METRIC = "#0072b2", "#d55e00"  # colours that the colour-blind can tell (Okabe and Ito)
_LABELS = {"speedup": "times as fast", "parameters": "parameters", "num_blocks": "blocks"}


def plot_frontier(frontier: Any, x: str | None, ax: Any) -> Any:
    """Draw a frontier; see `Frontier.plot`. The Axes are given back."""
    if x is None:
        x = "parameters" if frontier.work is None else "speedup"
    if x not in _LABELS:
        raise ConfigError(f"x must be one of {', '.join(_LABELS)}, found {x!r}.")
    places = [_place(frontier, point, x) for point in frontier.points]
    if any(place is None for place in places):
        raise ConfigError("x='speedup' needs times, and this search measured none. Take x='parameters'.")
    if ax is None:
        try:
            pyplot = importlib.import_module("matplotlib.pyplot")
        except ImportError as error:
            raise MissingDependencyError('Pictures need matplotlib: pip install "deeparc_hf[plots]".') from error
        ax = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")[1]
    values = [point.value for point in frontier.points]
    bounds = [point.interval or (point.value, point.value) for point in frontier.points]
    ax.errorbar(
        places,
        values,
        yerr=[
            [max(value - low, 0.0) for value, (low, _) in zip(values, bounds, strict=True)],
            [max(high - value, 0.0) for value, (_, high) in zip(values, bounds, strict=True)],
        ],
        xerr=_spread(frontier, places) if x == "speedup" else None,
        color=_VALUE,
        marker="o",
        capsize=3,
    )
    for place, value, point in zip(places, values, frontier.points, strict=True):
        ax.annotate(str(point.num_blocks), (place, value), xytext=(4, 5), textcoords="offset points", fontsize=8)
    ax.set_xlabel(_LABELS[x])
    ax.set_ylabel(f"{frontier.objective} (lower is better)", color=_VALUE)
    ax.set_title(f"{frontier.search} search: the number at a point is that of its blocks", fontsize=9)
    if x != "speedup":
        ax.invert_xaxis()
    if frontier.whole.metric is not None:
        beside = ax.twinx()
        beside.plot(places, [point.metric for point in frontier.points], color=_METRIC, marker="s", linestyle="--")
        beside.set_ylabel("metric", color=_METRIC)
    return ax


def _place(frontier: Any, point: Any, x: str) -> float | None:
    if x == "speedup":
        return 1.0 if point is frontier.whole else point.faster
    return float(getattr(point, x))


def _spread(frontier: Any, places: list[Any]) -> list[list[float]]:
    """How far the measured times reach to either side."""
    ends = [point.measured_interval or (place, place) for point, place in zip(frontier.points, places, strict=True)]
    low = [max(place - end[0], 0.0) for place, end in zip(places, ends, strict=True)]
    return [low, [max(end[1] - place, 0.0) for place, end in zip(places, ends, strict=True)]]
