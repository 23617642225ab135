"""`deeparc env`: versions and hardware, for a report of a fault."""

from __future__ import annotations

import argparse
import json
import platform

from ..core.environment import hardware, package_versions

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give a parser the command's options."""
    parser.description = "Show versions and hardware, for a report of a fault."
    parser.set_defaults(run=_env)
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _env(args: argparse.Namespace) -> int:
    facts = {**package_versions(), "platform": platform.platform(), **hardware()}
    print(json.dumps(facts, indent=1) if args.json else "\n".join(f"{key}: {value}" for key, value in facts.items()))
    return 0
