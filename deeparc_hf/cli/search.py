"""`deeparc search`: search for the best blocks to remove, for each number of them, and save the frontier."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from torch import nn

from ..checkpoint.record import check_record
from ..core.files import write_whole
from ..core.interrupts import work_begins
from ..errors import ConfigError, PlanError
from ..pruning.compare import check_settings
from ..pruning.config import MPruneConfig
from ..search.frontier import Frontier
from ..search.objectives import AnswerObjective, objectives
from ..search.search import search_blocks
from ..search.strategies import strategies
from .data import Job

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    strategies.get(args.search)
    if not issubclass(objectives.get(args.objective), AnswerObjective):
        raise ConfigError(
            f"--objective {args.objective} is what a function of yours measures: search_blocks(..., "
            f"objective={args.objective!r}, evaluate=...) in Python. Here take divergence, hidden or loss."
        )
    heal = None if args.heal == "none" else args.heal
    config = MPruneConfig(
        heal=heal, protect=tuple(args.protect), min_blocks=args.min_blocks, calibration_samples=args.samples
    )
    out = _output_file(args)

    def check(frame: nn.Module) -> None:
        check_record(frame, 1)
        check_settings(frame, config)

    job = Job.of(args, config, check)
    model = job.load()
    work_begins()
    frontier = search_blocks(
        model,
        job.batches or (),
        heal=heal,
        search=args.search,
        objective=args.objective,
        num_blocks=args.num_blocks,
        max_value=args.max_value,
        samples=args.samples,
        protect=config.protect,
        min_blocks=args.min_blocks,
        measure_times=args.times,
        journal=None if args.journal is None else Path(args.journal).expanduser(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, frontier.to_json() + "\n")
    if args.json:
        result = {name: getattr(args, name) for name in ("model", "data", "out")}
        print(json.dumps({**result, "frontier": frontier.to_dict()}, indent=1))
    else:
        print(frontier)
        print(f"written to {args.out}")
    return 0 if frontier.complete else 130


def _output_file(args: argparse.Namespace) -> Path:
    """Check where the frontier is to go before any work is done."""
    out = Path(args.out).expanduser().resolve()
    if out.is_dir():
        raise ConfigError(f"{args.out} is a folder. Give a file with -o.")
    if out.exists() and not args.overwrite:
        raise ConfigError(f"{args.out} exists. Give another file with -o, or --overwrite.")
    if out.exists():
        try:
            Frontier.from_json(out)
        except PlanError:
            raise ConfigError(
                f"{args.out} is not the frontier of a search, so it is not replaced. Give another file."
            ) from None
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "not to be written to" if parent.is_dir() else "a file"
        raise ConfigError(f"{args.out} cannot be made: {parent} is {reason}. Give another file with -o.")
    return out
