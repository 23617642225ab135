"""`deeparc run`: a chain of trainings, which prunes where parameters are sharded."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..chain.chain import Chain
from ..chain.settings import ChainSettings
from .common import say

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    chain = Chain(ChainSettings.from_yaml(Path(args.config).expanduser()), say)
    model = chain.run()
    print(f"model, report and card: {model}")
    return 0
