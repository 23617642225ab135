"""The result of the census of timm's families as it is kept, `timm.json` beside this file, and its part of the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deeparc_hf.core.markdown import md

__all__ = ["NO_STACK", "read", "section", "shares", "verdict_of", "write"]

KEPT = Path(__file__).with_name("timm.json")
NO_STACK = "found no list in it of blocks that are alike"
Verdict = Callable[[Mapping[str, Any]], str]
_GOOD = ("stock", "stock in part", "package", "package in part")
_MEANING = {
    "stock": "all removals that were tried load with stock timm",
    "stock in part": "some do, the others are refused",
    "package": "all load in a `TimmWrapper`, some of them only where deeparc_hf is installed",
    "package in part": "some do, the others are refused",
    "refused": "no removal is possible",
    "no stack": "there is no list of blocks that are alike",
    "stock differs": "not tried: the whole model does not come back equal from a stock load",
}


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(KEPT.read_text("utf-8"))
    return found


def write(rows: Mapping[str, Mapping[str, Any]]) -> None:
    made = {name: version(name) for name in ("timm", "transformers", "torch")}
    kept = {"versions": made, "families": {family: rows[family] for family in sorted(rows)}}
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


def verdict_of(row: Mapping[str, Any], verdict: Verdict) -> str:
    """What can be done with a family: bare if timm can do it, else in TimmWrapper."""
    bare, wrapped = verdict(row["bare"]), verdict(row["wrapped"])
    if NO_STACK in row["bare"].get("reason", ""):
        return "no stack"
    if wrapped in ("package", "package in part"):
        return wrapped  # some stacks go by it alone
    return bare if bare in _GOOD else wrapped


def shares(rows: Mapping[str, Mapping[str, Any]], verdict: Verdict) -> tuple[set[str], set[str], set[str]]:
    """Families that have a stack, those of them that can be pruned and loaded, and those that stock timm loads."""
    stacked = {family for family, row in rows.items() if verdict_of(row, verdict) not in ("no stack", "stock differs")}
    good = {family for family in stacked if verdict_of(rows[family], verdict) in _GOOD}
    return stacked, good, {family for family in good if verdict(rows[family]["bare"]) in _GOOD}


def section(verdict: Verdict, uses: Callable[[Iterable[Mapping[str, Any]]], list[str]]) -> str:
    """The part of the page on timm's families.

    Args:
        uses: makes the table of what is done with pruned models.
    """
    kept = read()
    rows, made = kept["families"], kept["versions"]
    stacked, good, by_stock = shares(rows, verdict)
    found = Counter(verdict_of(row, verdict) for row in rows.values())
    lines = [
        "",
        "## Families of timm",
        "",
        f"All {len(rows)} families (modules of `timm.models`) of timm {made['timm']}: the smallest architecture with a",
        "block to spare, with at most four blocks a stack where a number counts them. Blocks are removed and results",
        "judged as above, of the bare model and of the one in a `TimmWrapper`.",
        "",
        f"Of {len(stacked)} families with a stack of blocks, {len(good)} can be pruned and loaded, {len(by_stock)} of",
        "them by stock timm alone. Of the others no argument that timm's entry points take counts the blocks.",
        "",
        "| what | families | meaning |",
        "| --- | ---: | --- |",
    ]
    order = [*_MEANING, *sorted(found.keys() - set(_MEANING))]
    lines += [f"| {what} | {found[what]} | {_MEANING.get(what, 'a fault')} |" for what in order if found[what]]
    lines += ["", *uses(row[kind] for row in rows.values() for kind in ("bare", "wrapped"))]
    lines += [
        "",
        "| family | architecture | bare | wrapped | stacks (blocks) | why not all by stock |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for family, row in rows.items():
        stacks = row["wrapped"].get("stacks", {}) or row["bare"].get("stacks", {})
        names = [f"{name.removeprefix('timm_model.')} ({stack['blocks']})" for name, stack in stacks.items()]
        shown = "; ".join(names[:4]) + (f"; {len(names) - 4} more" if len(names) > 4 else "")
        what = " | ".join(verdict(row[kind]) for kind in ("bare", "wrapped"))
        lines.append(f"| `{family}` | {row['architecture']} | {what} | {md(shown)} | {md(_why(row))} |")
    return "\n".join(lines) + "\n"


def _why(row: Mapping[str, Any]) -> str:
    told = [row.get("why", ""), row["bare"].get("reason", "")]
    told += [stack.get("why", "") for kind in ("bare", "wrapped") for stack in row[kind].get("stacks", {}).values()]
    return next((why for why in told if why), "")
