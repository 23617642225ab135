"""The blocks of a card: which went, which were repaired, and how alike they were, all in the original's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..architectures.layout import Layout
from ..checkpoint.record import PrunedConfig
from ..core.markdown import code, fenced, md, table
from ..core.plain_text import plain
from ..core.tables import in_tens, spans, threshold_text
from ..pruning.plan import StackPlan
from .content import CardContent

__all__ = ["alt_text", "removed_text", "repairs", "similarity_tables", "strip"]

_WHOLE = 20  # longest stack whose matrix is shown whole


def removed_text(record: PrunedConfig) -> str:
    """The blocks that are gone, by stack."""
    gone = {name: blocks for name, blocks in record.removed.items() if blocks}
    return "; ".join(f"{code(name)}: {spans(blocks)}" for name, blocks in gone.items())


def strip(record: PrunedConfig) -> str:
    """A line for each stack with a mark for each original block, and what the marks mean."""
    several = len(record.iterations) > 1
    gone: dict[str, dict[int, str]] = {}
    for number, entry in enumerate(record.iterations, 1):
        mark = "." if not several else str(number) if number < 10 else "+"
        for name, blocks in (entry.get("removed") or {}).items():
            gone.setdefault(name, {}).update(dict.fromkeys(blocks, mark))
    names = {name: plain(name, 60) for name in record.stacks}
    width = max(map(len, names.values()), default=0)
    longest = max((stack.length for stack in record.stacks.values()), default=0)
    ruler = " ".join(str(first).ljust(10) for first in range(0, longest, 10)).rstrip()
    lines, legend = [f"{'block'.ljust(width)}  {ruler}"], ["# kept"]
    for name, stack in record.stacks.items():
        frozen = {stack.kept[i] for i in record.frozen.get(name, ())}
        marks = {**gone.get(name, {}), **dict.fromkeys(stack.kept, "#"), **dict.fromkeys(frozen, "*")}
        shown = in_tens([marks.get(i, ".") for i in range(stack.length)])
        lines.append(f"{names[name].ljust(width)}  {shown}  {len(stack.kept)} of {stack.length} stay")
    if any(record.frozen.values()):
        legend.append("* kept, and frozen in the last retraining")
    legend.append("1 to 9 removed, in which pruning (+: a later one)" if several else ". removed")
    return fenced("\n".join([*lines, "", ", ".join(legend)]), "text")


def repairs(record: PrunedConfig) -> str:
    """What became of each removal site, as a list. The record has the numbers of the model as it was then."""
    layout = Layout.whole({name: stack.length for name, stack in record.stacks.items()})
    lines = []
    for number, entry in enumerate(record.iterations, 1):
        when = f" (pruning {number})" if len(record.iterations) > 1 else ""
        for site in entry.get("healing") or ():
            places = layout.kept.get(site["stack"], ())
            if all(index < len(places) for index in [*site["removed"], site.get("kept") or 0]):
                lines.append(f"- {code(site['stack'])}{when}: {_repair(site, places)}")  # else of another model
        gone = layout.removed, entry.get("removed") or {}
        layout = Layout.without(layout.lengths, {n: [b for of in gone for b in of.get(n, ())] for n in layout.lengths})
    return "\n".join(lines)


def _repair(site: Mapping[str, Any], places: Sequence[int]) -> str:
    removed = spans([places[index] for index in site["removed"]])
    if not site.get("healed"):
        return f"{removed} removed, left as it is: {md(site.get('reason') or 'no reason noted')}"
    held = site.get("held_out")
    left = "" if held is None else f"; {100 * held:.1f} % of the squared error is left on held-out samples"
    return f"{removed} removed, block {places[site['kept']]} refitted{left}"


def alt_text(content: CardContent) -> str:
    """What the heatmap shows, for those who do not see it."""
    parts = []
    for name, stack in content.plan.stacks.items():
        values = _of_pairs(stack)
        span = f", similarities from {min(values):.2f} to {max(values):.2f}" if values else ""
        removed = [content.numbers[name][index] for index in stack.removed]
        gone = f"{'block' if len(removed) == 1 else 'blocks'} {spans(removed)} removed" if removed else "none removed"
        parts.append(f"{md(name)}: {len(stack)} blocks{span}, {gone}")
    return f"Heatmap of the similarity of every two blocks. {'; '.join(parts)}."


def _of_pairs(stack: StackPlan) -> list[float]:
    return [value for i, row in enumerate(stack.similarity) for j, value in enumerate(row) if i != j]


def similarity_tables(content: CardContent) -> str:
    """The similarities of the last pruning as numbers: whole matrices of short stacks, neighbours of long ones."""
    parts = []
    for name, stack in content.plan.stacks.items():
        if len(stack) < 2:
            continue
        numbers = content.numbers[name]
        labels = [f"{number} (removed)" if i in stack.removed else str(number) for i, number in enumerate(numbers)]
        title = f"{code(name)} (threshold {threshold_text(stack.threshold)})"
        digits = 6 if any(0.9995 <= value < 1 for value in _of_pairs(stack)) else 3  # all but the same
        values = [[f"{value:.{digits}f}" for value in row] for row in stack.similarity]
        if len(stack) > _WHOLE:
            rows = [[labels[i], labels[i + 1], values[i][i + 1]] for i in range(len(stack) - 1)]
            shown = table(["block", "next block", "similarity"], rows, left=(0, 1))
            parts.append(f"{title}, of neighbours:\n\n{shown}")
        else:
            rows = [[label, *row] for label, row in zip(labels, values, strict=True)]
            parts.append(f"{title}:\n\n{table(['block', *map(str, numbers)], rows)}")
    return "\n\n".join(parts)
