"""The result of the census, as it is kept: `census.json` beside this file, and the page that is made from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deeparc_hf.core.markdown import md

from . import timm_table
from .trial import BAD, Row

__all__ = ["PAGE", "counts", "page", "read", "row_of", "versions", "write"]

KEPT = Path(__file__).with_name("census.json")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_LONGEST_REASON = 160


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "torch")}


def row_of(row: Row) -> dict[str, Any]:
    """A row as it is kept: what became of each removal, and of what is done with a pruned model, and for each stack the
    first reasons why some were refused.
    """
    kept: dict[str, Any] = {"model": row.model, "state": row.state}
    if row.reason:
        kept["reason"] = row.reason[:_LONGEST_REASON]
    for name, stack in row.stacks.items():
        entry = {key: stack[key] for key in ("blocks", "pinned")}
        entry["removals"] = {removal: result for removal, (result, _) in stack["removals"].items()}
        if "uses" in stack:
            entry["uses"] = {use: result for use, (result, _) in stack["uses"].items()}
        for key, tried in (("why", stack["removals"]), ("why_uses", stack.get("uses", {}))):
            why = next((why for result, why in tried.values() if result == "refused"), "")
            entry |= {key: why[:_LONGEST_REASON]} if why else {}
        kept.setdefault("stacks", {})[name] = entry
    return kept


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(KEPT.read_text("utf-8"))
    return found


def write(rows: Mapping[str, Mapping[str, Any]]) -> None:
    rows = {kind: rows[kind] for kind in sorted(rows)}
    KEPT.write_text(json.dumps({"versions": versions(), "types": rows}, indent=1) + "\n", "utf-8")
    PAGE.write_text(page(read()), "utf-8")


def results(row: Mapping[str, Any]) -> list[str]:
    return [result for stack in row.get("stacks", {}).values() for result in stack["removals"].values()]


def verdict(row: Mapping[str, Any]) -> str:
    """ "stock", "package": all that was tried can be loaded so. "stock in part", "package in part": some of it. Else
    "refused", "nothing to remove", the state, or a fault.
    """
    found = results(row)
    done = [result for stack in row.get("stacks", {}).values() for result in stack.get("uses", {}).values()]
    fault = next((fault for fault in BAD if fault in found or fault in done), None)
    if fault is not None or row["state"] != "tried":
        return fault or str(row["state"])
    if not found:
        return "nothing to remove"
    stock, good = found.count("stock"), found.count("stock") + found.count("package")
    if not good:
        return "refused"
    return ("stock" if stock == good else "package") + ("" if good == len(found) else " in part")


def counts(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    return Counter(map(verdict, rows))


_ORDER = ("stock", "stock in part", "package", "package in part", "refused", "nothing to remove")
_MEANING = {
    "stock": "all removals that were tried load with stock transformers",
    "stock in part": "some do, the others are refused",
    "package": "all load, some of them only where deeparc_hf is installed (see [architectures](architectures.md))",
    "package in part": "some do, the others are refused",
    "refused": "no removal is possible; the table says why",
    "nothing to remove": "the model has no stack with a block to spare",
    "no inputs": "not tried: no inputs could be made for a tiny model of it",
    "not built": "not tried: no tiny model of it could be built",
    "stock differs": "not tried: the whole model does not come back equal from a stock load, or no number comes out",
}


_USES = {
    "training": "a forward and a backward pass, with activation checkpointing: the gradients are those without",
    "healing": "`heal_model` (a site that cannot be healed is left alone), and a load as above",
    "sparsifying": "`sparsify_model` (Wanda, half of the weights), and a load as above",
}
_RESULTS = {
    "yes": "runs",
    "refused": "is refused, with the reason",
    "not offered": "runs; the type has no activation checkpointing",
    "nor unpruned": "nor does the unpruned model",
}


def _uses(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A table of what is done with pruned models."""
    stacks = [stack["uses"] for row in rows for stack in row.get("stacks", {}).values() if "uses" in stack]
    lines = [
        f"With the first pruned model of each of {len(stacks)} stacks:",
        "",
        f"| what | {' | '.join(_RESULTS.values())} |",
        f"| --- | {' | '.join('---:' for _ in _RESULTS)} |",
    ]
    for use, meaning in _USES.items():
        found = Counter(stack[use] for stack in stacks)
        lines.append(f"| {meaning} | {' | '.join(str(found[result]) for result in _RESULTS)} |")
    return lines


def page(kept: Mapping[str, Any]) -> str:
    """The page "Which models"."""
    rows, made = kept["types"], kept["versions"]
    found = counts(rows.values())
    lines = [
        "# Which models",
        "",
        f"All {len(rows)} model types of transformers {made['transformers']} that have a model, each built tiny with",
        "random weights from its own config; position embeddings and gates that a fresh model has at zero are not zero",
        "here, as after a training. A plan that removes nothing must leave the model what it is. Of each stack of",
        "blocks a middle one, the last and every second one are removed (and those that a config counts as one); the",
        "result must compute what the original computes with these blocks replaced by identities, be saved, and come",
        "back from a load in another process with equal outputs, to the bit (generated text with a cache too).",
        "`python -m tests.census` makes this page; a test fails where a row changes.",
        "",
        "| what | types | meaning |",
        "| --- | ---: | --- |",
    ]
    order = [*_ORDER, *sorted(found.keys() - set(_ORDER))]
    lines += [f"| {what} | {found[what]} | {_MEANING.get(what, 'a fault')} |" for what in order if found[what]]
    lines += ["", *_uses(rows.values())]
    lines += ["", "| type | class | what | stacks (blocks) | why not all |", "| --- | --- | --- | --- | --- |"]
    for kind, row in rows.items():
        stacks = row.get("stacks", {})
        names = "; ".join(f"{name} ({stack['blocks']})" for name, stack in list(stacks.items())[:4])
        names += f"; {len(stacks) - 4} more" if len(stacks) > 4 else ""
        why = row.get("reason") or next((stack["why"] for stack in stacks.values() if "why" in stack), "")
        lines.append(f"| `{kind}` | {row['model']} | {verdict(row)} | {md(names)} | {md(why)} |")
    return "\n".join(lines) + "\n" + timm_table.section(verdict, _uses)
