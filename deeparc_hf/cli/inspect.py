"""`deeparc inspect`: what a model consists of, and what was done to it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from .options import common_options

__all__ = ["add"]


def add(commands: Any, argv: Sequence[str]) -> None:
    """Add the command to the parser of all commands."""
    parser = commands.add_parser(
        "inspect",
        help="show stacks, pinned blocks, parameters and the pruning record of a model",
        description="Show the stacks of a model, its pinned blocks, its parameters and its pruning record. Reads no "
        "weights.",
    )
    parser.set_defaults(run=_inspect)
    common_options(parser)


def _inspect(args: argparse.Namespace) -> int:
    from .inspection import facts_of, facts_text
    from .sources import find_source, skeleton

    facts = facts_of(skeleton(find_source(args.model), args.auto_class))
    print(json.dumps({"model": args.model, **facts}, indent=1) if args.json else facts_text(facts))
    return 0
