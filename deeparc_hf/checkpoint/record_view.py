"""A pruning record as tables for notebooks (`record.PrunedConfig._repr_html_`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.plain_text import plain
from ..core.tables import html_table, spans

__all__ = ["record_html"]

_MOST = 10**6  # no model has so many blocks
_TARGETS = ("num_blocks", "keep_ratio", "threshold")


def record_html(record: Any) -> str:
    """What a record tells: what is left of each stack, each pruning, zeroed weights; blocks by original numbers."""
    base = record.base_model or "a checkpoint that is not on the Hub"
    times = len(record.iterations)
    what = f"Pruned {times} time{'s' * (times != 1)}" if record.stacks or times else "No block was removed"
    stacks = [
        [name, stack.length, len(stack.kept), spans(stack.kept), spans(record.removed[name])]
        for name, stack in record.stacks.items()
    ]
    prunings = [[number, *_pruning(entry)] for number, entry in enumerate(record.iterations, 1)]
    headers = ["stack", "blocks before", "left", "these are left", "removed"]
    parts = [html_table(f"{what}; before, {base}", headers, stacks, _zeros(record))]
    if prunings:
        headers = ["pruning", "removed", "frozen", "asked for", "samples"]
        parts.append(html_table("Prunings, oldest first", headers, prunings))
    return "\n".join(parts)


def _pruning(entry: Mapping[str, Any]) -> list[str]:
    settings = entry.get("settings")
    settings = settings if isinstance(settings, Mapping) else {}
    target = next(
        (f"{name}={plain(settings[name], 80)}" for name in _TARGETS if settings.get(name) is not None), "blocks by name"
    )
    return [_blocks(entry.get("removed")), _blocks(entry.get("frozen")), target, plain(entry.get("samples", "-"))]


def _blocks(found: Any) -> str:
    if not isinstance(found, Mapping):
        return "-"
    listed = {name: blocks for name, blocks in found.items() if isinstance(blocks, (list, tuple))}
    whole = {name: [i for i in blocks if isinstance(i, int) and 0 <= i < _MOST] for name, blocks in listed.items()}
    return "; ".join(f"{plain(name, 60)}: {spans(blocks)}" for name, blocks in whole.items() if blocks) or "-"


def _zeros(record: Any) -> list[str]:
    if record.zeros is None:
        return []
    zeros, size, matrices = record.zeros
    return [f"Zeroed weights: {100 * zeros / max(1, size):.2f} % of {size:,} in {matrices} matrices."]
