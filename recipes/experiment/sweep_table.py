"""The table of a sweep: our figures, and beside them those of the earlier experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .results import Row
from .sweep_file import ORIGINAL, SeedRow, SweepFile

__all__ = ["sweep_report"]

_NO_ROW = SeedRow()


def sweep_report(file: SweepFile, done: Mapping[str, Sequence[Row]], failed: Sequence[str] = ()) -> str:
    """Markdown: a row for each cell and iteration.

    Args:
        done: the rows of the cells that are done.
        failed: names of the cells that failed.
    """
    main, *rest = file.metrics
    header = ["cell", "model"]
    for name in ("blocks", "parameters", main, "change", "time / original", "freeze"):
        header += [name, f"seed: {name}"] if file.seed else [name]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    others = [["cell", "model", "figure", "here", "seed"], ["---", "---", "---", "---:", "---:"]]
    remarks = []
    seed_origin = file.seed.get(ORIGINAL, {}).get(ORIGINAL, _NO_ROW)
    for cell in file.cells:
        rows = {row.name: row for row in done.get(cell.name, ())}
        seeds = file.seed.get(cell.name, {})
        own = rows.get(ORIGINAL)
        names = [name for name in dict.fromkeys([*rows, *seeds]) if cell.name == ORIGINAL or _is_of_cell(name)]
        for name in sorted(names, key=lambda name: "zeros" in name) or ["-"]:
            ours, seed = rows.get(name), seeds.get(name, _NO_ROW)
            figures = _figures(file, main, ours, own)
            if file.seed:
                figures = _woven(figures, _seed_figures(main, seed, seed_origin, file.scale.get(main, 1)))
            lines.append([cell.name, name, *figures])
            others += _others(file, cell.name, name, rest, ours, seed)
            remarks += [f"- {cell.name}, {name}: {text}" for text in _remarks(seed)]
    parts = [f"# {file.title}", _table(lines)]
    parts.append(
        "Change: of the metric, against the original. Time: warm evaluation time over that of the original, which each "
        "cell measures in its own process. Metrics are of one run on the test samples; each cell's results.md has "
        "intervals."
    )
    if file.seed:
        parts.append(
            "The seed's times are from other hardware, so only their ratios can be compared; its metrics are those "
            "after its last epoch; * marks rows with a known slip."
        )
    missing = [cell.name for cell in file.cells if cell.name not in done and cell.name not in failed]
    if failed:
        parts.append(f"Failed: {', '.join(failed)}.")
    if missing:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    if len(others) > 2:
        parts += ["## Other figures", _table(others)]
    if remarks:
        parts += ["## About the seed's figures", "\n".join(remarks)]
    return "\n\n".join(parts) + "\n"


def _is_of_cell(name: str) -> bool:
    """Whether a row is of a cell's own: the original, and what was zeroed of it, stand in the table once."""
    return not name.startswith(ORIGINAL)


def _figures(file: SweepFile, main: str, row: Row | None, own: Row | None) -> list[str]:
    if row is None:
        return ["-"] * 6
    scale = file.scale.get(main, 1)
    value = row.measured.metrics.get(main)
    change = ratio = None
    if own is not None and own is not row:
        origin = own.measured.metrics.get(main)
        change = None if value is None or origin is None else scale * (value - origin)
        ratio = row.measured.seconds / own.measured.seconds if row.measured.seconds and own.measured.seconds else None
    return [
        _blocks(list(row.blocks.values())),
        f"{row.parameters:,}",
        _number(None if value is None else scale * value),
        _signed(change, scale),
        _ratio(ratio),
        str(row.frozen),
    ]


def _seed_figures(main: str, row: SeedRow, origin: SeedRow, scale: float) -> list[str]:
    value, before = row.metrics.get(main), origin.metrics.get(main)
    change = None if value is None or before is None or row is origin else value - before
    ratio = row.seconds / origin.seconds if row.seconds and origin.seconds and row is not origin else None
    blocks = row.blocks if isinstance(row.blocks, list) else [] if row.blocks is None else [row.blocks]
    mark = " *" if row.slip else ""
    shown = [
        _blocks(blocks),
        "-" if row.parameters is None else f"{row.parameters:,}",
        _number(value),
        _signed(change, scale),
        _ratio(ratio),
        "-" if row.freeze is None else str(row.freeze),
    ]
    return [shown[0] + mark, *shown[1:]]


def _others(
    file: SweepFile, cell: str, name: str, metrics: Sequence[str], ours: Row | None, seed: SeedRow
) -> list[list[str]]:
    lines = []
    for metric in metrics:
        value = None if ours is None else ours.measured.metrics.get(metric)
        pair = (
            _number(None if value is None else file.scale.get(metric, 1) * value),
            _number(seed.metrics.get(metric)),
        )
        if pair != ("-", "-"):
            lines.append([cell, name, metric, *pair])
    if seed.training_seconds is not None:
        spent = None if ours is None else ours.training_seconds
        lines.append([cell, name, "training time (s)", _seconds(spent), _seconds(seed.training_seconds)])
    return lines


def _remarks(seed: SeedRow) -> list[str]:
    return [*([f"\\* known slip: {seed.slip}"] if seed.slip else []), *([seed.note] if seed.note else [])]


def _blocks(counts: Sequence[int]) -> str:
    """Those of one stack or two; of more (the stages of a CNN) their sum comes first."""
    parts = " + ".join(map(str, counts)) or "-"
    return f"{sum(counts)} ({parts})" if len(counts) > 2 else parts


def _woven(ours: Sequence[str], seeds: Sequence[str]) -> list[str]:
    return [cell for pair in zip(ours, seeds, strict=True) for cell in pair]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) >= 10 else f"{value:.4f}"


def _signed(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value:+.4f}" if scale == 1 else f"{value:+.3f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
