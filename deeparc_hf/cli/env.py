"""`deeparc env`: versions and hardware, for a report of a fault."""

from __future__ import annotations

import argparse
import json
import platform

from ..core.environment import hardware, package_versions

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    environment = {**package_versions(), "platform": platform.platform(), **hardware()}
    lines = [f"{key}: {value}" for key, value in environment.items()]
    print(json.dumps(environment, indent=1) if args.json else "\n".join(lines))
    return 0
