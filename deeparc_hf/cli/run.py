"""`deeparc run`: a chain of trainings, which prunes where parameters are sharded."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..chain.chain import Chain
from ..chain.settings import ChainSettings
from ..core.interrupts import EXIT_CODE
from .common import say

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    chain = Chain(ChainSettings.from_yaml(Path(args.config).expanduser()), say)
    try:
        model = chain.run()
    except KeyboardInterrupt:
        say("Stopped. What is done stays; the same command goes on from there.")
        return EXIT_CODE
    print(f"model, report and card: {model}")
    return 0
