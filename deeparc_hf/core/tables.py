"""Tables for people: as plain text, and as HTML for notebooks. Text of others goes through `plain_text` first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .plain_text import plain

__all__ = ["html_table", "in_tens", "runs", "spans", "text_table", "threshold_text"]

_MOST_ROWS = 500
_LONGEST_CELL = 400


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def html_table(caption: Any, header: Sequence[str], rows: Sequence[Sequence[Any]], notes: Iterable[Any] = ()) -> str:
    """A table as HTML, for `_repr_html_`; of very many rows the first ones. Whatever a cell holds is shown as text."""
    cut = [f"and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []
    left = 'style="text-align: left"'
    lines = [
        f'<table>\n<caption style="text-align: left; white-space: nowrap">{_shown(caption)}</caption>',
        f"<thead><tr>{''.join(f'<th {left}>{_shown(title)}</th>' for title in header)}</tr></thead>",
        "<tbody>",
        *(f"<tr>{''.join(f'<td {left}>{_shown(cell)}</td>' for cell in row)}</tr>" for row in rows[:_MOST_ROWS]),
        "</tbody>\n</table>",
        *(f"<div>{_shown(note)}</div>" for note in [*cut, *notes][: _MOST_ROWS + 1]),
    ]
    return "\n".join(lines)


def runs(indices: Iterable[int]) -> list[list[int]]:
    """Whole numbers in rising order, as runs without a gap."""
    found: list[list[int]] = []
    for index in indices:
        if found and index == found[-1][-1] + 1:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def spans(indices: Iterable[int]) -> str:
    """Whole numbers in rising order, runs of three and more as their ends: 0-3, 5, 6."""
    shown = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs(indices))
    return ", ".join(shown) or "-"


def in_tens(marks: Sequence[str]) -> str:
    """A row of marks, one for each block, in groups of ten."""
    return " ".join("".join(marks[i : i + 10]) for i in range(0, len(marks), 10))


def threshold_text(value: float) -> str:
    """A threshold in four decimals, or in as many as tell it from 1."""
    return f"{value:.4f}" if value < 0.9995 else f"{value:.8f}".rstrip("0")


def _shown(value: Any) -> str:
    return escape(plain(value, _LONGEST_CELL))
