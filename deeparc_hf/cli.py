"""The command `deeparc`: inspect a model, prune a model. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 2 an error (one line on stderr; --debug shows where it came from), 130 interrupted. Output folders appear whole or
not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import shutil
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import ConfigError, DeepArcError, DeepArcWarning, MissingDependencyError

if TYPE_CHECKING:
    from torch import nn

    from .config import MPruneConfig
    from .plan import PruningPlan

__all__ = ["main"]

PLAN_FILE = "pruning_plan.json"
# what --overwrite may replace: a checkpoint's files and the findings, never a folder of a training run
_OWN_FILE = re.compile(
    r"[\w.\-]*(config|token|vocab|merges|spiece|template)[\w.\-]*|model[\w.\-]*|pruning_plan.json|report\.(json|md)|heatmap.png"
)
HEATMAP_FILE = "heatmap.png"
_MODEL_HELP = "a folder, a Hub id, timm:NAME, or timm's hf-hub:ORG/NAME and local-dir:FOLDER"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; default: those of the process.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parser(argv).parse_args(argv)
    try:
        with _plain_warnings():
            return args.run(args)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (DeepArcError, OSError) as error:
        if args.debug:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deeparc", description="Make trained models smaller by layer similarity.")
    parser.add_argument("--version", action="version", version=f"deeparc_hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    inspect = commands.add_parser(
        "inspect",
        help="show stacks, pinned blocks, parameters and the pruning record of a model",
        description="Show the stacks of a model, its pinned blocks, its parameters and its pruning record. Reads no weights.",
    )
    inspect.set_defaults(run=_inspect)
    _common(inspect)

    prune = commands.add_parser(
        "prune",
        help="remove redundant blocks of a model and save the smaller checkpoint",
        description="Compare the blocks of a model on data, remove redundant ones, and save a checkpoint that stock libraries load. Use "
        "training data, never the data that you evaluate on.",
    )
    prune.set_defaults(run=_prune)
    _common(prune)
    if "prune" in argv:  # the settings live beside the mathematics, which take seconds to import
        _prune_arguments(prune)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument("--auto-class", metavar="CLASS", help="class of transformers to load; default: the one that saved the checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _prune_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", required=True, help=".csv, .tsv, .json, .jsonl, .parquet or .txt file, a folder (of images, say), or a Hub id"
    )
    data.add_argument("--subset", help="configuration of a Hub data set")
    data.add_argument("--split", help="default: train, or the only one")
    for name, what in {
        "text": "texts; guessed if one column is obvious",
        "text-pair": "second texts, where the model takes pairs",
        "target": "what an encoder-decoder model is to write",
        "image": "images, or paths of image files; guessed if one column is obvious",
    }.items():
        data.add_argument(f"--{name}-column", metavar="COLUMN", help=f"column of {what}")
    data.add_argument("--max-length", type=_positive, metavar="TOKENS", help="longest text; default: what the model allows, at most 512")
    data.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="samples of a forward pass (default 16)")
    _config_arguments(parser.add_argument_group("pruning"))
    output = parser.add_argument_group("output")
    output.add_argument("-o", "--out", metavar="OUT", help="folder for checkpoint, plan, report and heatmap; required without --dry-run")
    output.add_argument("--dry-run", action="store_true", help="write no checkpoint; with -o the plan, the report and the heatmap only")
    output.add_argument("--overwrite", action="store_true", help="replace OUT if it is the output of an earlier run")
    output.add_argument("--device", help="default: the accelerator if there is one, else cpu")


def _config_arguments(group: Any) -> None:
    """One option for each setting of `MPruneConfig` that is of use without a training; the config validates them."""
    from .config import MPruneConfig
    from .similarity import metrics

    hints = typing.get_type_hints(MPruneConfig)
    for spec in dataclasses.fields(MPruneConfig):
        if spec.metadata.get("trainer"):
            continue
        option = f"--{spec.name.replace('_', '-')}"
        settings: dict[str, Any] = {"dest": f"config_{spec.name}", "default": None, "help": spec.metadata["help"].replace("%", "%%")}
        choices = metrics.names() if spec.name == "similarity" else spec.metadata.get("choices")
        kinds = [kind for kind in (float, int, str) if kind in (hints[spec.name], *typing.get_args(hints[spec.name]))]
        if spec.name == "num_blocks":
            settings.update(action="append", metavar="N|STACK=N")
            settings["help"] += " Repeat STACK=N for several stacks."
        elif spec.name == "protect":
            settings.update(action="append", metavar="PATTERN")
            settings["help"] += " May be repeated."
        else:
            settings.update(type=kinds[0], metavar=f"{{{','.join(choices)}}}" if choices else kinds[0].__name__.upper())
        if isinstance(spec.default, (int, str)) and not isinstance(spec.default, bool):
            settings["help"] += f" Default: {spec.default}."
        group.add_argument(option, **settings)


def _config(args: argparse.Namespace) -> MPruneConfig:
    from .config import MPruneConfig

    given = {name.removeprefix("config_"): value for name, value in vars(args).items() if name.startswith("config_") and value is not None}
    if "num_blocks" in given:
        given["num_blocks"] = _num_blocks(given["num_blocks"])
    return MPruneConfig(**given)


def _num_blocks(given: Sequence[str]) -> int | dict[str, int]:
    if len(given) == 1 and given[0].strip().isdigit():
        return int(given[0])
    counts: dict[str, int] = {}
    for entry in given:
        name, sign, number = entry.rpartition("=")
        if not sign or not name or not number.strip().isdigit():
            raise ConfigError(f"--num-blocks takes a whole number, or STACK=N once for each stack, found {' '.join(given)!r}.")
        if name in counts:
            raise ConfigError(f"--num-blocks names the stack {name!r} twice.")
        counts[name] = int(number)
    return counts


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


def _inspect(args: argparse.Namespace) -> int:
    from .inspection import facts_of, facts_text
    from .sources import find_source, skeleton

    facts = facts_of(skeleton(find_source(args.model), args.auto_class))
    print(json.dumps({"model": args.model, **facts}, indent=1) if args.json else facts_text(facts))
    return 0


def _prune(args: argparse.Namespace) -> int:
    config = _config(args)
    out = _output_folder(args)
    from .architectures import describe
    from .data import Columns, load_rows, make_batches
    from .inspection import count_parameters
    from .pruning import analyze
    from .record import PrunedConfig
    from .sources import find_source, load_model, skeleton
    from .surgery import apply_plan

    # what can be refused is refused before the weights are read
    source = find_source(args.model)
    frame = skeleton(source, args.auto_class)
    host = describe(frame)[0]
    if host.record() is not None:
        PrunedConfig.from_model(frame)
    device = _device(args.device)
    batches, processor = make_batches(
        source,
        frame,
        load_rows(args.data, args.split, args.subset),
        Columns(args.text_column, args.text_pair_column, args.target_column, args.image_column),
        samples=config.calibration_samples,
        seed=config.seed,
        batch_size=args.batch_size,
        max_length=args.max_length,
    )
    model = load_model(source, args.auto_class).to(device)
    before = count_parameters(model)
    plan = analyze(model, batches, config)
    if not args.json:
        print(plan)
    if not plan.removed:
        _say(_nothing_to_remove(plan))
    removed = sum(stack.facts.parameters[i] for stack in plan.stacks.values() for i in stack.removed)
    after = before - removed
    if plan.removed and not args.dry_run:
        apply_plan(model, plan, example=next(iter(batches)))
        after = count_parameters(model)
    files: list[str] = []
    if out is not None:
        with _whole_folder(out) as folder:
            if not args.dry_run:
                _save(model, processor, folder)
            _write_findings(folder, plan, args, before, after, device)
            files = sorted(path.name for path in folder.iterdir())
    result = {
        "model": args.model,
        "data": args.data,
        "dry_run": args.dry_run,
        "out": None if out is None else str(args.out),
        "files": files,
        "parameters": {"before": before, "after": after},
        "plan": plan.to_dict(),
    }
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"parameters: {before:,} -> {after:,} ({100 * (after - before) / before:+.1f} %)")
        print(f"written to {args.out}: {', '.join(files)}" if files else "dry run: nothing was written")
    return 0


def _save(model: nn.Module, processor: Any, folder: Path) -> None:
    from .loading import save_pruned

    save_pruned(model, folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _write_findings(folder: Path, plan: PruningPlan, args: argparse.Namespace, before: int, after: int, device: Any) -> None:
    """The plan, the report, and the heatmap where matplotlib is installed."""
    from .report import Measurement, save_heatmap, write_report

    thresholds = {stack.threshold for stack in plan.stacks.values()}
    rows = [
        Measurement("original", blocks=plan.num_blocks, parameters=before),
        Measurement(
            "pruned, if carried out" if args.dry_run else "pruned",
            blocks=plan.num_kept,
            parameters=after,
            frozen=plan.num_frozen,
            threshold=thresholds.pop() if len(thresholds) == 1 else None,
            k=plan.config.k,
        ),
    ]
    plan.to_json(folder / PLAN_FILE)
    write_report(folder, plan, rows, _public_names(args), device=device)
    try:
        save_heatmap(plan, folder / HEATMAP_FILE)
    except MissingDependencyError as error:
        _say(f"info: no heatmap. {error}")


def _public_names(args: argparse.Namespace) -> dict[str, str]:
    """Model and data for the report, which may be published: of a local path the last part only."""
    names = {"model": args.model, "data": args.data}
    return {key: Path(name).name if Path(name).expanduser().exists() else name for key, name in names.items()}


def _nothing_to_remove(plan: PruningPlan) -> str:
    message = "info: nothing to remove, the model stays as it is."
    from .plan import first_threshold

    first = first_threshold(plan)
    if first is None:
        return f"{message} Its pinned and protected blocks allow no removal."
    return f"{message} The first block would go at threshold {first:.4f}: lower --threshold, or give --num-blocks or --keep-ratio."


def _output_folder(args: argparse.Namespace) -> Path | None:
    """Check where the output is to go before any work is done."""
    if args.out is None:
        if args.dry_run:
            return None
        raise ConfigError("Give the folder for the pruned checkpoint with -o OUT, or --dry-run to see the plan only.")
    out = Path(args.out).expanduser().resolve()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{args.out} is a file. Give another folder with -o.")
    if out.is_dir() and any(out.iterdir()):
        if not args.overwrite:
            raise ConfigError(f"{args.out} exists and is not empty. Give another folder with -o, or --overwrite.")
        foreign = sorted(path.name for path in out.iterdir() if path.is_dir() or not _OWN_FILE.fullmatch(path.name))
        if foreign:
            raise ConfigError(
                f"{args.out} holds {foreign[0]!r}, which this command did not write, so it is not replaced. Give another folder."
            )
        if not (out / PLAN_FILE).is_file():
            raise ConfigError(
                f"{args.out} holds files but no {PLAN_FILE}: no earlier run wrote it, so it is not replaced. Give another folder."
            )
    return out


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and is gone otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out.parent / f".{out.name}.{os.getpid()}.{end}" for end in ("new", "old"))
    new.mkdir()
    try:
        yield new
        try:
            if out.exists():
                out.rename(old)
            new.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _device(name: str | None) -> Any:
    """The device that was asked for, tried out."""
    import torch

    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show this package's own warnings as one line each."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def plain(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, DeepArcWarning):
                _say(f"warning: {message}")
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = plain
        yield


def _say(message: str) -> None:
    print(message, file=sys.stderr)
