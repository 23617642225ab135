"""`deeparc families`: the kinds of models that are known, and those that are refused."""

from __future__ import annotations

import argparse
import json

from ..architectures import families

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    known = sorted(
        (families.get(name) for name in families.names()), key=lambda family: (-family.priority, family.name)
    )
    if args.json:
        print(json.dumps({family.name: family.summary for family in known}, indent=1))
        return 0
    width = max(len(family.name) for family in known)
    print("\n".join(f"{family.name:<{width}}  {family.summary}" for family in known))
    print("\nThe first that knows a model describes it. `deeparc inspect MODEL` tells what is found in one.")
    return 0
