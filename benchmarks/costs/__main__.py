r"""Measure what the package costs and saves; a table and JSON go to benchmarks/results/costs.md and .json.

    make bench                                    installs the peers beside the project, and runs all
    python -m benchmarks.costs --parts analysis --rounds 5
    python -m benchmarks.costs --parts gpu        in bfloat16, to costs_gpu.md and .json

Each part is a process of its own, and every figure is a ratio within one process. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.files import finite, write_whole
from deeparc_hf.core.markdown import table

from ..measuring import THREADS
from .rows import Row

PARTS = ("results", "training", "healing", "sparsity", "large", "analysis")
ON_REQUEST = ("gpu",)
PEERS = ("torch_cka", "pytorch-cka", "optipfair", "torchao", "llmcompressor")
RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=(*PARTS, *ON_REQUEST))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--quick", action="store_true", help="little of it, to see that it works; the figures mean nothing"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for costs.md and costs.json")
    parser.add_argument("--json", action="store_true", help="measure one part in this process, and print JSON")
    given = parser.parse_args()
    if given.json:
        for row in _part(given.parts[0], given.rounds, given.quick):
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        return
    rows: list[Row] = []
    failed = False
    for part in given.parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.costs", "--json", "--parts", part, "--rounds", str(given.rounds)]
        done = subprocess.run([*command, *(["--quick"] if given.quick else [])], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"part"')]
        rows += [Row(**json.loads(line)) for line in lines]
        if done.returncode != 0:
            failed = True
            print(f"{part} failed:\n{done.stderr[-4000:]}", file=sys.stderr, flush=True)
        print(_table(rows[-len(lines) :] if lines else []), flush=True)
    _write(given.output / ("costs_gpu" if given.parts == ["gpu"] else "costs"), rows, given.rounds)
    sys.exit(failed)


def _part(part: str, rounds: int, quick: bool) -> Iterator[Row]:
    torch.set_num_threads(THREADS)
    found: Iterator[Row] = importlib.import_module(f"benchmarks.costs.{part}").measure(rounds, quick)
    return found


def _peers() -> dict[str, str]:
    found = {}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _table(rows: list[Row]) -> str:
    lines: list[list[str]] = []
    for row in rows:
        interval = "" if row.low is None else f" ({row.low:.3f} .. {row.high:.3f})"
        value = "-" if math.isnan(row.value) else f"{row.value:.3f}{interval}"
        verdict = {None: "", True: "yes", False: "no"}[row.met]
        lines.append([row.part, row.what, value, str(row.n), row.target or "", verdict, row.note])
    return table(["part", "what", "value (95 % interval)", "n", "target", "met", "on what"], lines, left=(0, 1, 6))


def _write(path: Path, rows: list[Row], rounds: int) -> None:
    told: dict[str, Any] = {**hardware(), "threads": THREADS, **package_versions(), **_peers()}
    entries = [{**dataclasses.asdict(row), "met": row.met} for row in rows]
    data = {"rounds": rounds, "date": time.strftime("%Y-%m-%d"), "made with": told, "rows": entries}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path.with_suffix(".json"), json.dumps(finite(data), indent=1, allow_nan=False) + "\n")
    made = "\n".join(f"- {name}: {value}" for name, value in told.items())
    text = (
        f"# What it costs and saves\n\nMade by `python -m benchmarks.costs --rounds {rounds}` (`make bench`). Ratios "
        "within one process, medians of n rounds in turn after one that warms up, with bootstrap intervals; single "
        "readings where there is no interval. Profiles are of one more run, in units of what the ratio is to; being "
        "watched, plain Python is slower in them than it is.\n\n"
        f"{_table(rows)}\n\n## Made with\n\n{made}\n"
    )
    write_whole(path.with_suffix(".md"), text)


if __name__ == "__main__":
    main()
