"""`deeparc inspect`: what a model consists of (its stacks, pinned blocks, parameters), and what was done to it."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..architectures import describe
from ..checkpoint.record import PrunedConfig
from ..core.plain_text import plain, plain_lines
from ..core.tables import spans
from ..pruning.rebuild import inexpressible
from .sources import find_source, skeleton

__all__ = ["count_parameters", "description_of", "description_text", "run"]

_LONGEST_LINE = 20_000  # the numbers of the blocks that are left, 4096 at most


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    description = description_of(skeleton(find_source(args.model), args.auto_class))
    print(json.dumps({"model": args.model, **description}, indent=1) if args.json else description_text(description))
    return 0


def description_of(model: nn.Module) -> dict[str, Any]:
    """A description of a model, on the meta device too, in plain JSON types."""
    subject = describe(model)
    host = subject.host
    refused = inexpressible(subject)
    return {
        "class": type(host.root).__name__,
        "type": host.kind,
        "library": host.library,
        "parameters": count_parameters(model),
        "stacks": {
            name: {
                "blocks": len(stack),
                "counted_by": None if stack.count is None else str(stack.count),
                "pinned": {str(index): reason for index, reason in stack.pinned.items()},
                "beyond_settings": {str(index): reason for index, reason in refused.get(name, {}).items()},
                "parameters": [count_parameters(block) for block in stack.blocks],
                "per_block": [tensor.path for tensor in stack.per_block],
            }
            for name, stack in subject.stacks.items()
        },
        "droppable": host.can_drop,
        "record": None if host.record() is None else PrunedConfig.from_model(subject).to_dict(),
    }


def _beyond_settings(stack: Mapping[str, Any], droppable: bool) -> list[str]:
    """Of which blocks no setting can tell that they are gone."""
    reasons = stack["beyond_settings"]
    if not reasons:
        return []
    free = stack["blocks"] - len(stack["pinned"])
    which = "any block" if len(reasons) == free else f"block {spans(sorted(map(int, reasons)))}"
    way = "; where deeparc_hf is installed, such a checkpoint can be loaded all the same" if droppable else ""
    return [f"  no setting leaves out {which} alone{way} ({plain(next(iter(reasons.values())))})"]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _short(count: int) -> str:
    """A number of parameters in short: 7.09 M."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def description_text(description: Mapping[str, Any]) -> str:
    """The description for people, as visible text: a downloaded config may hold what steers a terminal."""
    return plain_lines("\n".join(_lines(description)), _LONGEST_LINE, _LONGEST_LINE**2)


def _lines(description: Mapping[str, Any]) -> list[str]:
    total = description["parameters"]
    kind = f"{description['class']} ({description['type']}, {description['library']})"
    lines = [f"{kind}: {total:,} parameters ({_short(total)})", ""]
    inside = 0
    for name, stack in description["stacks"].items():
        inside += sum(stack["parameters"])
        lines.append(f"{plain(name)}: {stack['blocks']} blocks, {_short(sum(stack['parameters']))}")
        first = 0
        for count, group in itertools.groupby(stack["parameters"]):
            last = first + len(list(group)) - 1
            alike = (
                f"blocks {first}-{last}: {_short(count)} each" if last > first else f"block {first}: {_short(count)}"
            )
            lines.append(f"  {alike}")
            first = last + 1
        lines += [f"  block {index} is pinned: {plain(reason)}" for index, reason in stack["pinned"].items()]
        lines += _beyond_settings(stack, description["droppable"])
        lines += [f"  a block takes its part of {plain(path)} with it" for path in stack["per_block"]]
    lines += [f"outside the stacks: {_short(max(0, total - inside))}", ""]
    record = description["record"]
    if record is None:
        return [*lines, "not pruned before (no pruning record)"]
    base = plain(record["base_model"] or "") or "a checkpoint that is not on the Hub"
    if record["stacks"] or record["iterations"]:
        lines.append(f"pruned {len(record['iterations'])} time(s), loaded from {base} before that:")
    elif record["sparsity"] is None:
        lines.append(f"nothing was removed or zeroed since {base} was loaded")
    else:
        lines.append(f"no blocks were removed; weights were zeroed after loading {base}:")
    for name, stack in record["stacks"].items():
        kept = stack["kept"]
        lines.append(f"  {plain(name)}: {len(kept)} of {stack['length']} blocks are left: {' '.join(map(str, kept))}")
    matrices = (record["sparsity"] or {}).get("matrices", {})
    if matrices:
        zeros, size = (sum(entry[key] for entry in matrices.values()) for key in ("zeros", "size"))
        lines.append(
            f"  zeros by the record: {100 * zeros / max(1, size):.2f} % of {_short(size)} weights in "
            f"{len(matrices)} matrices"
        )
    return lines
