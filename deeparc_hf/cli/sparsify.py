"""`deeparc sparsify`: zero the weights of a model that matter least and save the checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import nn

from ..architectures import describe
from ..checkpoint.record import check_record
from ..core.environment import hardware, package_versions
from ..core.files import whole_folder
from ..core.markdown import made_with
from ..errors import ConfigError
from ..sparsity.config import WandaConfig
from ..sparsity.methods import methods
from ..sparsity.report import SparsityReport
from ..sparsity.sparsify import matrices_for, sparsify_model
from .common import SPARSITY_FILE, output_folder, public_names, say
from .data import Job
from .options import given_settings

__all__ = ["run"]

FORMAT_VERSION = 1


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    config = WandaConfig(**given_settings(args))
    _settle_data(args, config)
    out = output_folder(args)

    def check(frame: nn.Module) -> None:
        check_record(frame)
        matrices_for(describe(frame), config)

    job = Job.of(args, config, check)
    model = job.load()
    report = sparsify_model(model, job.batches, config)
    if not args.json:
        print(report)
    with whole_folder(out, args.overwrite) as folder:
        job.save(model, folder)
        _write_report(folder, report, job)
        files = sorted(path.name for path in folder.iterdir())
    if args.json:
        result = {"model": args.model, "data": args.data, "out": args.out, "files": files, "sparsity": report.to_dict()}
        print(json.dumps(result, indent=1))
    else:
        shares = f"{100 * report.asked:.2f} % asked, {100 * report.measured:.2f} % measured"
        print(f"sparsity: {shares} in {len(report.matrices)} matrices")
        print(f"written to {args.out}: {', '.join(files)}")
    return 0


def _settle_data(args: argparse.Namespace, config: WandaConfig) -> None:
    """Refuse data that is missing, and leave data alone that is not needed."""
    if methods.get(config.method).needs_inputs:
        if args.data is None:
            without = [f"--method {method.name}" for method in methods if not method.needs_inputs]
            other = f", or a method that needs none: {', '.join(without)}" if without else ""
            raise ConfigError(
                f"The method {config.method!r} needs calibration data. Give training data with --data{other}."
            )
    elif args.data is not None:
        say(f"info: the method {config.method!r} needs no data, so --data is not read.")
        args.data = None


def _write_report(folder: Path, report: SparsityReport, job: Job) -> None:
    """The report, as JSON and as Markdown, with what it was made from and with."""
    names, machine, versions = public_names(job.args), hardware(job.device), package_versions()
    data = {"format_version": FORMAT_VERSION, **report.to_dict(), "versions": versions, "hardware": machine}
    (folder / SPARSITY_FILE).write_text(json.dumps({**data, "extra": names}, indent=1) + "\n", "utf-8")
    text = f"{report.to_markdown()}\n{made_with(names, machine, versions)}\n"
    (folder / SPARSITY_FILE).with_suffix(".md").write_text(text, "utf-8")
