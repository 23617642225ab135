# /// script
# requires-python = ">=3.11"
# dependencies = ["deeparc_hf[recipes]"]
# ///
r"""Run a grid of settings of a recipe, and print our figures beside those of the first experiments.

    python recipes/sweep.py recipes/grids/bert_base_emotion.yaml --output runs/sweep_emotion
    python recipes/sweep.py recipes/grids/bert_base_emotion.yaml --output runs/sweep_emotion -- \
        --max_train_samples 2000 --retrain_epochs 1

Each cell of the grid runs as a process of its own. The original is fine-tuned once, in the first cell, and the others
take it from there. Start the same command again after a crash, a kill or Ctrl-C: cells that are done stay, the one that
was at work goes on where it stood. A cell whose arguments have changed is run again. What follows -- goes to every
cell; the values of the grid win over it.

Exit code: 0, 1 if a cell failed (the others are run all the same), 2 if the sweep file makes no sense, 130 if it was
stopped.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import signal
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the sweep."""
    from deeparc_hf.core.interrupts import work_begins
    from experiment.sweep import Sweep, SweepFile

    argv = sys.argv[1:] if argv is None else argv
    own, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", type=Path, help="the sweep file, such as those in recipes/grids")
    parser.add_argument("--output", type=Path, help="folder of the cells and the table; default: runs/sweep_NAME")
    parser.add_argument("--recipe-config", type=Path, help="config of the recipe, instead of the sweep file's own")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(own)
    sweep = Sweep(
        SweepFile.read(args.config, args.recipe_config),
        args.output or Path("runs", f"sweep_{args.config.stem}"),
        extra,
        say=functools.partial(print, flush=True),
    )
    if args.dry_run:
        for name, command in sweep.commands():
            print(f"# {name}\n{shlex.join(command)}")
        return 0
    work_begins()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    code = sweep.run()
    print(f"{sweep.write()}\nThis table: {sweep.table}. The models and their cards: {sweep.output / 'cells'}")
    return code


if __name__ == "__main__":
    from experiment.command import run

    run(main, "Stopped. The same command goes on from here; what is done stands in sweep.md in the output folder.")
