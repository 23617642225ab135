"""Heatmaps of the similarity of blocks, as pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MissingDependencyError
from .plain_text import plain
from .plan import PruningPlan, StackPlan
from .report import threshold_text

__all__ = ["save_heatmap"]

_PER_ROW = 4
_ANNOTATED = 16
_ALL_TICKS = 40
_REMOVED_COLOR = "#c1272d"
_MUCH_ALIKE = 30.0  # ratio of the distances, beyond which the nearest ones would all have one colour
_NEAREST = 1e-8  # distance from 1 that is still told apart


@dataclass(frozen=True)
class _Scale:
    """Colours over the similarities of different blocks. The diagonal is always 1, says nothing, and has no part in it.

    Attributes:
        low, high: the least and the largest similarity.
        logarithmic: whether the distance from 1 is shown by its logarithm. In a causal model most similarities are near 1, and their
            distances from 1, which decide what is removed, differ by powers of ten.
    """

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float]) -> _Scale:
        """The scale that spans these values."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        distances = sorted(max(1 - value, _NEAREST) for value in values)
        logarithmic = high <= 1 + 1e-3 and bool(distances) and distances[-1] / distances[len(distances) // 10] > _MUCH_ALIKE
        return cls(low, high, logarithmic) if high - low > 1e-9 else cls(low - 1e-3, high + 1e-3, False)

    @property
    def colours(self) -> str:
        return "viridis_r" if self.logarithmic else "viridis"

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
        powers = range(math.ceil(nearest), math.floor(farthest) + 1)
        bar.set_ticks([10.0**power for power in powers], labels=[f"{1 - 10.0**power:.{max(1, -power)}f}" for power in powers])
        bar.ax.minorticks_off()
        bar.ax.invert_yaxis()


def save_heatmap(plan: PruningPlan, path: str | Path, numbers: Mapping[str, Sequence[int]] | None = None) -> None:
    """Write a PNG with the similarity matrix of every stack; all stacks share one colour scale, which spans the values of different blocks.

    Frames on the diagonal are clusters; red cells on it (hatched, or filled in long stacks) and red labels mark the blocks that
    go. The values are printed in stacks of up to 16 blocks.

    Args:
        numbers: what to call the blocks of each stack; default: their places in it.

    Raises:
        MissingDependencyError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError('A heatmap needs matplotlib: pip install "deeparc_hf[plots]".') from error
    stacks = list(plan.stacks.items())
    columns = min(_PER_ROW, len(stacks))
    rows = math.ceil(len(stacks) / columns)
    side = 4.2 if columns > 1 else 5.6
    figure = Figure(figsize=(side * columns + 1.0, (side + 0.45) * rows + 0.7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    scale = _Scale.over([v for _, stack in stacks for i, row in enumerate(stack.similarity) for j, v in enumerate(row) if i != j])
    for axis, (name, stack) in zip(axes.flat, stacks, strict=False):
        image = _draw_stack(axis, name, stack, scale, side, (numbers or {}).get(name) or range(len(stack)))
    for axis in list(axes.flat)[len(stacks) :]:
        axis.set_axis_off()
    bar = figure.colorbar(image, ax=axes, label="similarity of different blocks", shrink=0.8, aspect=30, pad=0.02)
    scale.label(bar)
    samples = f"{plan.samples:,} samples" if plan.samples else "number of samples not known"
    figure.suptitle(f"Similarity of blocks: {plan.config.similarity}, rows={plan.config.effective_rows}, {samples}", fontsize=12)
    gone = "red: removed" if plan.removed else "nothing is removed"
    figure.supxlabel(f"block (frames: clusters; {gone})", fontsize=9)
    figure.savefig(path, format="png")


def _draw_stack(axis: Any, name: str, stack: StackPlan, scale: _Scale, side: float, numbers: Sequence[int]) -> Any:
    """One heatmap; returns the image, for the colour bar."""
    from matplotlib.patches import Rectangle

    length = len(stack)
    shown = [[float("nan") if i == j else scale.place(value) for j, value in enumerate(row)] for i, row in enumerate(stack.similarity)]
    image = axis.imshow(shown, norm=scale.norm(), cmap=scale.colours, interpolation="nearest")
    axis.set_facecolor("#d8d8d8")  # the diagonal
    title = plain(name, 60).replace("$", r"\$")  # which would begin a formula
    axis.set_title(f"{title}\n{len(stack.kept)} of {length} blocks stay, threshold {threshold_text(stack.threshold)}", fontsize=9)
    if length <= _ANNOTATED:
        for i, row in enumerate(stack.similarity):
            for j, value in enumerate(row):
                if i == j and i in stack.removed:
                    continue  # hatched
                red, green, blue, _ = image.cmap(image.norm(shown[i][j])) if i != j else (1, 1, 1, 1)
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.55
                size = min(9.0, 13.0 * side / length)
                axis.text(
                    j, i, "1" if i == j else _short(value), ha="center", va="center", fontsize=size, color="white" if dark else "black"
                )
    for cluster in stack.clusters:
        if len(cluster) > 1:
            corner = (cluster[0] - 0.5, cluster[0] - 0.5)
            axis.add_patch(Rectangle(corner, len(cluster), len(cluster), fill=False, edgecolor="white", linewidth=2.2))
            axis.add_patch(Rectangle(corner, len(cluster), len(cluster), fill=False, edgecolor="black", linewidth=1.0))
    for index in stack.removed:
        style = {"fill": False, "hatch": "////"} if length <= _ANNOTATED else {"facecolor": _REMOVED_COLOR}
        axis.add_patch(Rectangle((index - 0.5, index - 0.5), 1, 1, edgecolor=_REMOVED_COLOR, linewidth=0, **style))
    ticks = range(length) if length <= _ALL_TICKS else range(0, length, 5)
    size = max(4.0, min(8.0, 52.0 * side / 4.2 / length))
    axis.set_xticks(ticks, [str(numbers[index]) for index in ticks], fontsize=size)
    axis.set_yticks(ticks, [str(numbers[index]) for index in ticks], fontsize=size)
    for index, *labels in zip(ticks, axis.get_xticklabels(), axis.get_yticklabels(), strict=True):
        for label in labels:
            if index in stack.removed:
                label.set(color=_REMOVED_COLOR, fontweight="bold")
    axis.tick_params(length=2)
    return image


def _short(value: float) -> str:
    """Two decimals without the leading zero: .98, -.03; what rounds to 1 is not printed as 1."""
    return ">.99" if value >= 0.995 else f"{value:.2f}".replace("0.", ".", 1)
