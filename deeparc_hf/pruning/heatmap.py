"""Heatmaps of the similarity of blocks of a plan (`plan.PruningPlan`), as pictures."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.plain_text import listed, plain, quoted
from ..core.tables import threshold_text
from ..errors import ConfigError, MissingDependencyError

__all__ = ["plot_plan", "save_heatmap"]

_PER_ROW = 4
_ANNOTATED = 16
_ALL_TICKS = 40
_REMOVED_COLOR = "#c1272d"
_MUCH_ALIKE = 30.0  # ratio of the distances, beyond which the nearest ones would all have one colour
_BAR = "similarity of different blocks"
_NEAREST = 1e-8  # distance from 1 that is still told apart


@dataclass(frozen=True)
class Scale:
    """Colours over the similarities of different blocks, from the least to the largest."""

    low: float
    high: float
    # by the distance from 1: in a causal model most are near 1, and differ by powers of ten in what decides
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float]) -> Scale:
        """The scale that spans these values."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        distances = sorted(max(1 - value, _NEAREST) for value in values)
        logarithmic = (
            high <= 1 + 1e-3 and bool(distances) and distances[-1] / distances[len(distances) // 10] > _MUCH_ALIKE
        )
        return cls(low, high, logarithmic) if high - low > 1e-9 else cls(low - 1e-3, high + 1e-3, False)

    def place(self, value: float) -> float:
        """Where a similarity lies on the scale."""
        return max(1 - value, _NEAREST) if self.logarithmic else value

    def norm(self) -> Any:
        """The same for matplotlib."""
        from matplotlib.colors import LogNorm, Normalize

        ends = sorted((self.place(self.low), self.place(self.high)))
        return LogNorm(*ends) if self.logarithmic else Normalize(*ends)

    def label(self, bar: Any) -> None:
        """Have the colour bar show similarities, the largest on top."""
        if not self.logarithmic:
            return
        nearest, farthest = (math.log10(self.place(value)) for value in (self.high, self.low))
        powers = range(math.floor(nearest), math.ceil(farthest) + 1)
        steps = (1, 2, 5) if farthest - nearest < 3 else (1,)
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if self.place(self.high) <= tick <= self.place(self.low)]
        bar.set_ticks(ticks, labels=[f"{1 - tick:.8f}".rstrip("0") for tick in ticks])
        bar.ax.minorticks_off()
        bar.ax.invert_yaxis()


def save_heatmap(plan: Any, path: str | Path, numbers: Mapping[str, Sequence[int]] | None = None) -> None:
    """Write a PNG with the similarity matrix of every stack, on one colour scale.

    Frames on the diagonal are clusters; red cells on it (hatched, or filled in long stacks) and red labels mark the
    blocks that go. `numbers` are what to call the blocks of each stack; default: their places in it.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    figure = _matplotlib("figure").Figure(figsize=_size(len(plan.stacks)), dpi=150, layout="constrained")
    _draw(plan, plan.stacks, figure, numbers or {})
    figure.savefig(path, format="png")


def plot_plan(plan: Any, stack: str | None = None, ax: Any = None) -> Any:
    """As `PruningPlan.plot`."""
    if stack is not None and stack not in plan.stacks:
        raise ConfigError(f"The plan has no stack {quoted(stack)}. Its stacks: {listed(plan.stacks)}.")
    chosen = dict(plan.stacks) if stack is None else {stack: plan.stacks[stack]}
    if ax is not None and len(chosen) != 1:
        raise ConfigError(
            f"ax is a place for one stack, and the plan has {len(chosen)}: {listed(chosen)}. Give stack=, or leave ax "
            "out."
        )
    pyplot = _matplotlib("pyplot")
    if ax is None:
        axes = _draw(plan, chosen, pyplot.figure(figsize=_size(len(chosen)), layout="constrained"), {})
        return axes[0] if len(axes) == 1 else axes
    ((name, only),) = chosen.items()
    scale = Scale.over(_values(chosen))
    place = ax.get_position()
    width, height = ax.figure.get_size_inches()
    image = _draw_stack(ax, name, only, scale, min(place.width * width, place.height * height), range(len(only)))
    scale.label(ax.figure.colorbar(image, ax=ax, label=_BAR))
    ax.set_xlabel(_below(chosen), fontsize=9)
    return ax


def _matplotlib(module: str) -> Any:
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        raise MissingDependencyError('A heatmap needs matplotlib: pip install "deeparc_hf[plots]".') from error


def _size(stacks: int) -> tuple[float, float]:
    """Of a figure, in inches."""
    columns = min(_PER_ROW, stacks)
    side = _side(stacks)
    return side * columns + 1.0, (side + 0.45) * math.ceil(stacks / columns) + 0.7


def _side(stacks: int) -> float:
    return 4.2 if stacks > 1 else 5.6


def _draw(plan: Any, stacks: Mapping[str, Any], figure: Any, numbers: Mapping[str, Sequence[int]]) -> Any:
    """Draw stacks into a figure, on one scale; returns an array of their axes."""
    columns = min(_PER_ROW, len(stacks))
    axes = figure.subplots(math.ceil(len(stacks) / columns), columns, squeeze=False)
    scale = Scale.over(_values(stacks))
    for axis, (name, stack) in zip(axes.flat, stacks.items(), strict=False):
        image = _draw_stack(axis, name, stack, scale, _side(len(stacks)), numbers.get(name) or range(len(stack)))
    for axis in list(axes.flat)[len(stacks) :]:
        axis.set_axis_off()
    scale.label(figure.colorbar(image, ax=axes, label=_BAR, shrink=0.8, aspect=30, pad=0.02))
    samples = f"{plan.samples:,} samples" if plan.samples else "number of samples not known"
    figure.suptitle(
        f"Similarity of blocks: {plan.config.similarity}, rows={plan.config.effective_rows}, {samples}", fontsize=12
    )
    figure.supxlabel(_below(stacks), fontsize=9)
    return axes.ravel()[: len(stacks)]


def _values(stacks: Mapping[str, Any]) -> list[float]:
    """The similarities of different blocks."""
    rows = [(i, row) for stack in stacks.values() for i, row in enumerate(stack.similarity)]
    return [value for i, row in rows for j, value in enumerate(row) if i != j]


def _below(stacks: Mapping[str, Any]) -> str:
    gone = "red: removed" if any(stack.removed for stack in stacks.values()) else "nothing is removed"
    return f"block (frames: clusters; {gone})"


def _draw_stack(axis: Any, name: str, stack: Any, scale: Scale, side: float, numbers: Sequence[int]) -> Any:
    """One heatmap; returns the image, for the colour bar."""
    from matplotlib.patches import Rectangle

    length = len(stack)
    shown = [
        [float("nan") if i == j else scale.place(value) for j, value in enumerate(row)]
        for i, row in enumerate(stack.similarity)
    ]
    colours = "viridis_r" if scale.logarithmic else "viridis"
    image = axis.imshow(shown, norm=scale.norm(), cmap=colours, interpolation="nearest")
    axis.set_facecolor("#d8d8d8")  # the diagonal
    title = plain(name, 60).replace("$", r"\$")  # which would begin a formula
    axis.set_title(
        f"{title}\n{len(stack.kept)} of {length} blocks stay, threshold {threshold_text(stack.threshold)}", fontsize=9
    )
    if length <= _ANNOTATED:
        for i, row in enumerate(stack.similarity):
            for j, value in enumerate(row):
                if i == j and i in stack.removed:
                    continue  # hatched
                red, green, blue, _ = image.cmap(image.norm(shown[i][j])) if i != j else (1, 1, 1, 1)
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
                size = min(9.0, 13.0 * side / length)
                written = {"ha": "center", "va": "center", "fontsize": size, "color": "white" if dark else "black"}
                axis.text(j, i, "1" if i == j else _short(value), **written)
    for cluster in stack.clusters:
        if len(cluster) > 1:
            place = (cluster[0] - 0.5, cluster[0] - 0.5), len(cluster), len(cluster)
            axis.add_patch(Rectangle(*place, fill=False, edgecolor="white", linewidth=2.2))
            axis.add_patch(Rectangle(*place, fill=False, edgecolor="black", linewidth=1.0))
    for index in stack.removed:
        style = {"fill": False, "hatch": "////"} if length <= _ANNOTATED else {"facecolor": _REMOVED_COLOR}
        axis.add_patch(Rectangle((index - 0.5, index - 0.5), 1, 1, edgecolor=_REMOVED_COLOR, linewidth=0, **style))
    ticks = range(length) if length <= _ALL_TICKS else range(0, length, 5)
    size = max(4.0, min(8.0, 52.0 * side / 4.2 / length))
    for ruler in (axis.xaxis, axis.yaxis):
        ruler.set_ticks(ticks, [str(numbers[index]) for index in ticks], fontsize=size)
        for index, label in zip(ticks, ruler.get_ticklabels(), strict=True):
            if index in stack.removed:
                label.set(color=_REMOVED_COLOR, fontweight="bold")
    axis.tick_params(length=2)
    return image


def _short(value: float) -> str:
    """Two decimals without the leading zero: .98, -.03; what rounds to 1 is not printed as 1."""
    return ">.99" if value >= 0.995 else f"{value:.2f}".replace("0.", ".", 1)
