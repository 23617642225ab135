"""`deeparc prune`: remove redundant blocks of a model and save the smaller checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..architectures import describe
from ..checkpoint.record import check_record
from ..core.files import whole_folder
from ..errors import ConfigError, MissingDependencyError
from ..healing.sites import Healing
from ..observe.calibration import Calibration
from ..pruning.compare import check_settings
from ..pruning.config import MPruneConfig
from ..pruning.heatmap import save_heatmap
from ..pruning.plan import PruningPlan, first_threshold
from ..pruning.surgery import require_fitting
from ..reports.plan_report import Measurement, write_report
from ..search.frontier import Frontier
from ..search.prune import analyze, apply_healed, take_example
from ..search.search import check_search
from .common import PLAN_FILE, output_folder, public_names, say
from .data import Job
from .inspect import count_parameters
from .options import given_settings
from .remove import parameters_text, written_smaller
from .sources import find_source, skeleton

__all__ = ["run"]

HEATMAP_FILE = "heatmap.png"
_BUDGETS = ("parameters", "max_value")  # of a frontier alone; the settings have others


def _num_blocks(given: Sequence[str]) -> int | dict[str, int]:
    if len(given) == 1 and given[0].strip().isdigit():
        return int(given[0])
    counts: dict[str, int] = {}
    for entry in given:
        name, sign, number = entry.rpartition("=")
        if not sign or not name or not number.strip().isdigit():
            raise ConfigError(
                f"--num-blocks takes a whole number, or STACK=N once for each stack, found {' '.join(given)!r}."
            )
        if name in counts:
            raise ConfigError(f"--num-blocks names the stack {name!r} twice.")
        counts[name] = int(number)
    return counts


def _given_plan(args: argparse.Namespace, given: dict[str, Any]) -> PruningPlan | None:
    """The plan to carry out: one from a file, or for a budget from the frontier of a search; None where it is still to
    be made.
    """
    if args.plan is None:
        return _from_frontier(args, given)
    odd = [name for name in ("frontier", *_BUDGETS) if getattr(args, name) is not None] + list(given)
    if odd:
        raise ConfigError(f"With --plan the plan has settled {_options(odd)}. Leave it out.")
    path = Path(args.plan).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"There is no file {args.plan}. deeparc prune writes one ({PLAN_FILE}), and plan.to_json(FILE) too."
        )
    return PruningPlan.from_json(path)


def _from_frontier(args: argparse.Namespace, given: dict[str, Any]) -> PruningPlan | None:
    budgets: dict[str, Any] = {name: getattr(args, name) for name in _BUDGETS if getattr(args, name) is not None}
    if args.frontier is None:
        if budgets:
            raise ConfigError(
                f"{_options(budgets)} chooses from what a search found. Give its file with --frontier (deeparc search "
                "makes one), or --num-blocks, --keep-ratio or --speedup."
            )
        return None
    budgets |= {name: given[name] for name in ("speedup", "num_blocks") if name in given}
    odd = [name for name in given if name not in (*budgets, "freeze")]
    if odd:
        raise ConfigError(f"With --frontier the search has settled {_options(odd)}. Leave it out.")
    if len(budgets) != 1:
        raise ConfigError(
            f"With --frontier exactly one of {_options(['speedup', *_BUDGETS, 'num_blocks'])} says which model is "
            f"wanted, found {_options(budgets) or 'none'}."
        )
    if isinstance(budgets.get("num_blocks"), dict):
        raise ConfigError("With --frontier --num-blocks counts the blocks of all stacks. Give a whole number.")
    path = Path(args.frontier).expanduser()
    if not path.is_file():
        raise ConfigError(f"There is no file {args.frontier}. deeparc search makes one.")
    return Frontier.from_json(path).choose(**budgets, freeze=given.get("freeze"))


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    given = given_settings(args)
    if "num_blocks" in given:
        given["num_blocks"] = _num_blocks(given["num_blocks"])
    chosen = _given_plan(args, given)
    config = MPruneConfig(**given) if chosen is None else chosen.config
    if args.out is None and not args.dry_run:
        raise ConfigError("Give the folder for the pruned checkpoint with -o OUT, or --dry-run to see the plan only.")
    out = None if args.out is None else output_folder(args)
    if args.data is None:
        return _without_data(args, chosen, out)

    def check(frame: nn.Module) -> None:
        check_record(frame, 1)
        if chosen is None:
            check_settings(frame, config)
        else:
            require_fitting(describe(frame), chosen)

    if config.search is not None:
        check_search(config)
    job = Job.of(args, config, check)
    model = job.load()
    before = count_parameters(model)
    calibration = Calibration(job.batches, config.calibration_samples)
    plan = analyze(model, calibration, config) if chosen is None else chosen
    if not args.json:
        print(plan)
    if not plan.removed:
        say(_nothing_to_remove(plan))
    after = before - sum(stack.compared.parameters[i] for stack in plan.stacks.values() for i in stack.removed)
    healings: Sequence[Healing] = ()
    if plan.removed and not args.dry_run:
        take_example(model, calibration)
        _, healings = apply_healed(model, plan, calibration, verify=args.verify)
        after = count_parameters(model)
    files: list[str] = []
    if out is not None:
        with whole_folder(out, args.overwrite) as folder:
            if not args.dry_run:
                job.save(model, folder)
            _write_findings(folder, args, plan, (before, after), healings, job.device)
            files = sorted(path.name for path in folder.iterdir())
    _tell(args, plan, (before, after), healings, files)
    return 0


def _without_data(args: argparse.Namespace, plan: PruningPlan | None, out: Path | None) -> int:
    """Carry out a plan that needs no data, from file to file."""
    if plan is None:
        raise ConfigError("Give the calibration data with --data, or a plan that is made already with --plan.")
    if not args.json:
        print(plan)
    if not plan.removed:
        raise ConfigError("The plan removes no block, so there is nothing to write. Use the checkpoint as it is.")
    if plan.config.heal is not None and not args.dry_run:
        raise ConfigError(
            f"The plan repairs the kept blocks (heal={plan.config.heal!r}), for which data are needed: give --data."
        )
    frame = skeleton(find_source(args.model), args.auto_class)
    require_fitting(describe(frame), plan)
    before = count_parameters(frame)
    after = before - sum(stack.compared.parameters[i] for stack in plan.stacks.values() for i in stack.removed)
    write = None if args.dry_run else written_smaller(args, plan)
    files: list[str] = []
    if out is not None:
        with whole_folder(out, args.overwrite) as folder:
            if write is not None:
                after = write(folder).iterations[-1]["parameters"]["after"]
            _write_findings(folder, args, plan, (before, after))
            files = sorted(path.name for path in folder.iterdir())
    _tell(args, plan, (before, after), (), files)
    return 0


def _tell(
    args: argparse.Namespace,
    plan: PruningPlan,
    parameters: tuple[int, int],
    healings: Sequence[Healing],
    files: Sequence[str],
) -> None:
    counts = {"before": parameters[0], "after": parameters[1]}
    if args.json:
        result = {
            **{name: getattr(args, name) for name in ("model", "data", "dry_run", "out")},
            "files": list(files),
            "parameters": counts,
            "plan": plan.to_dict(),
            "healing": [healing.to_dict() for healing in healings],
        }
        print(json.dumps(result, indent=1))
        return
    for healing in healings:
        print(f"Healing: {healing}")
    print(parameters_text(counts))
    print(f"written to {args.out}: {', '.join(files)}" if files else "dry run: nothing was written")


def _write_findings(
    folder: Path,
    args: argparse.Namespace,
    plan: PruningPlan,
    parameters: tuple[int, int],
    healings: Sequence[Healing] = (),
    device: torch.device | None = None,
) -> None:
    """The plan, the report, and the heatmap where matplotlib is installed."""
    thresholds = {stack.threshold for stack in plan.stacks.values()}
    threshold = thresholds.pop() if len(thresholds) == 1 else None
    settings = {"frozen": plan.num_frozen, "threshold": threshold, "k": plan.config.k}
    label = "pruned, if carried out" if args.dry_run else "pruned"
    rows = [
        Measurement("original", blocks=plan.num_blocks, parameters=parameters[0]),
        Measurement(label, blocks=plan.num_kept, parameters=parameters[1], **settings),
    ]
    plan.to_json(folder / PLAN_FILE)
    write_report(folder, plan, rows, public_names(args), healings=healings, device=device)
    try:
        save_heatmap(plan, folder / HEATMAP_FILE)
    except MissingDependencyError as error:
        say(f"info: no heatmap. {error}")


def _nothing_to_remove(plan: PruningPlan) -> str:
    message = "info: nothing to remove, the model stays as it is."
    if plan.choice is not None:
        return f"{message} The whole one meets this budget: ask for more."
    first = first_threshold(plan)
    if first is None:
        return f"{message} Its pinned and protected blocks allow no removal."
    if plan.config.target != "threshold":
        option, given = f"--{plan.config.target.replace('_', '-')}", getattr(plan.config, plan.config.target)
        asked = " ".join(f"{name}={n}" for name, n in given.items()) if isinstance(given, dict) else f"{given:g}"
        return f"{message} {option} {asked} keeps all of its {plan.num_blocks} blocks: give a smaller number."
    return (
        f"{message} The first block would go at threshold {first:.4f}: lower --threshold, or give --num-blocks or "
        "--keep-ratio."
    )
