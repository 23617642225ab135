"""The options of all commands. Those of settings are made from the fields of their dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.settings import Settings

__all__ = ["OPTIONS", "given_card", "given_settings"]

_MODEL_HELP = "a folder, a Hub id, timm:NAME, or timm's hf-hub:ORG/NAME and local-dir:FOLDER"
_PREFIX = "config_"
_CARD_HELP = {
    "model-name": "default: the name of the repository, or of the folder",
    "license": "licence of the model, by its id on the Hub; default: that of the base model, where the Hub tells it",
    "language": "language of the model, as a code (en)",
    "dataset": "Hub id of the data, where the reports do not know it",
    "base-model": "Hub id of the model that was pruned, where the record does not know it",
    "tag": "one more tag",
    "made-by": "the command or the steps by which the model was made",
}


def _common_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes."""
    parser.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    parser.add_argument(
        "--auto-class",
        metavar="CLASS",
        help="class of transformers to load; default: the one that saved the checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _card_options(parser: argparse.ArgumentParser) -> None:
    """What only the person who publishes a model can tell."""
    card = parser.add_argument_group("card")
    for name, what in _CARD_HELP.items():
        several = name in ("language", "dataset", "tag")
        card.add_argument(
            f"--{name}", action="append" if several else "store", help=f"{what}{'; may be repeated' if several else ''}"
        )


def given_card(args: argparse.Namespace) -> dict[str, Any]:
    """The card's settings that were given, as `create_model_card` names them."""
    names = {"dataset": "dataset_tags", "tag": "tags", "base_model": "finetuned_from", "made_by": "command"}
    given = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in _CARD_HELP}
    return {names.get(name, name): value for name, value in given.items() if value is not None}


def _data_options(parser: argparse.ArgumentParser, *, required: bool, note: str = "") -> None:
    """The calibration data and how it is read; the note is added to the help of --data."""
    data = parser.add_argument_group("data")
    files = ".csv, .tsv, .json, .jsonl, .parquet or .txt file, a folder (of images, say), or a Hub id"
    data.add_argument("--data", required=required, help=f"{files}{note}")
    data.add_argument("--subset", help="configuration of a Hub data set")
    data.add_argument("--split", help="default: train, or the only one")
    for name, what in {
        "text": "texts; guessed if one column is obvious",
        "text-pair": "second texts, where the model takes pairs",
        "target": "what an encoder-decoder model is to write",
        "image": "images, or paths of image files; guessed if one column is obvious",
    }.items():
        data.add_argument(f"--{name}-column", metavar="COLUMN", help=f"column of {what}")
    data.add_argument(
        "--max-length",
        type=_positive,
        metavar="TOKENS",
        help="longest text; default: what the model allows, at most 512",
    )
    data.add_argument(
        "--batch-size", type=_positive, default=16, metavar="N", help="samples of a forward pass (default 16)"
    )


def _output_options(parser: argparse.ArgumentParser, out: str, *, required: bool) -> Any:
    """Where the output goes; the group, for more options."""
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", metavar="OUT", required=required, help=out)
    group.add_argument("--overwrite", action="store_true", help="replace OUT if it is the output of an earlier run")
    group.add_argument("--device", help="default: the accelerator if there is one, else cpu")
    return group


def _setting_options(group: Any, settings: type[Settings], names: Mapping[str, Sequence[str]]) -> None:
    """One option for each setting that is of use without a training; the settings validate them. Names are the choices
    of settings that name an entry of a registry.
    """
    hints = typing.get_type_hints(settings)
    for spec in dataclasses.fields(settings):
        if spec.metadata.get("trainer"):
            continue
        option = f"--{spec.name.replace('_', '-')}"
        extra, more = _taken(hints[spec.name], names.get(spec.name) or spec.metadata.get("choices"))
        default = spec.default
        if isinstance(default, bool):
            default = option if default else option.replace("--", "--no-", 1)
        more += f" Default: {default}." if isinstance(default, (int, float, str)) else ""
        text = f"{spec.metadata.get('cli', spec.metadata['help'])}{more}"
        group.add_argument(option, dest=f"{_PREFIX}{spec.name}", default=None, help=text.replace("%", "%%"), **extra)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    given = {name: value for name, value in vars(args).items() if name.startswith(_PREFIX) and value is not None}
    return {name.removeprefix(_PREFIX): value for name, value in given.items()}


def _taken(hint: Any, choices: Sequence[str] | None) -> tuple[dict[str, Any], str]:
    """How an option takes a setting of this type, and what its help says of that."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}, ""
    if any(typing.get_origin(kind) is dict for kind in kinds):
        return {"action": "append", "metavar": "N|STACK=N"}, " Repeat STACK=N for several stacks."
    kind = next((kind for kind in (float, int, str) if kind in kinds), None)
    if kind is None:  # a list of texts
        return {"action": "append", "metavar": "PATTERN"}, " May be repeated."
    return {"type": kind, "metavar": f"{{{','.join(choices)}}}" if choices else kind.__name__.upper()}, ""


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show the stacks of a model, its pinned blocks, its parameters and its pruning record. Reads no weights."
    )
    _common_options(parser)


def _search(parser: argparse.ArgumentParser) -> None:
    from ..search.objectives import AnswerObjective, objectives
    from ..search.strategies import strategies

    parser.description = (
        "Search for the best blocks to remove, for each number of them, by what the smaller and repaired model puts "
        "out; print the models that were found, and save them for deeparc prune --frontier. After Ctrl-C what was "
        "found so far is saved. Use training data, never the data that you evaluate on."
    )
    _common_options(parser)
    _data_options(parser, required=True)
    group = parser.add_argument_group("search")
    goals = [name for name in objectives.names() if issubclass(objectives.get(name), AnswerObjective)]
    for name, names, default, what in (
        ("search", strategies.names(), "greedy", "how sets of blocks are tried"),
        ("objective", goals, "divergence", "what is made small"),
    ):
        choices = f"{{{','.join(names)}}}"
        group.add_argument(f"--{name}", default=default, metavar=choices, help=f"{what} (default {default})")
    group.add_argument(
        "--heal",
        default="lstsq",
        metavar="{lstsq,none}",
        help="repair the kept block before each removal in closed form, or leave blocks as they are (default lstsq)",
    )
    group.add_argument(
        "--num-blocks", type=_positive, metavar="N", help="the fewest blocks that stay; default: half of them"
    )
    group.add_argument("--max-value", type=float, metavar="X", help="stop where the objective is larger than this")
    group.add_argument("--samples", type=_positive, default=1024, metavar="N", help="samples to use (default 1024)")
    group.add_argument(
        "--protect",
        action="append",
        default=[],
        metavar="PATTERN",
        help="pattern (fnmatch) of module paths of blocks that must stay; may be repeated",
    )
    group.add_argument(
        "--min-blocks", type=_positive, default=1, metavar="N", help="fewest blocks of each stack that stay (default 1)"
    )
    group.add_argument(
        "--no-times", dest="times", action="store_false", help="do not time the blocks and the smaller models"
    )
    group.add_argument("--journal", metavar="FILE", help="keep scores here; a search that was killed goes on with them")
    _output_options(parser, "file for the frontier", required=True)


def _budget_options(parser: argparse.ArgumentParser) -> None:
    """What chooses a model from a frontier, beside --num-blocks."""
    group = parser.add_argument_group("by a search")
    group.add_argument(
        "--frontier",
        metavar="FILE",
        help="what deeparc search saved: the blocks go that it found for one budget, --speedup, --parameters, "
        "--max-value or --num-blocks, and the kept ones are repaired if it repaired them",
    )
    group.add_argument("--parameters", type=float, metavar="N", help="at most so many parameters (60e6, say)")
    group.add_argument("--max-value", type=float, metavar="X", help="the smallest model with no larger value")


def _disk_options(group: Any) -> None:
    """How a checkpoint is rewritten that is not loaded."""
    group.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="leave out the forward pass that shows that the smaller model computes what it should",
    )
    group.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="of a weights file, as in 5GB, where the model is not loaded; default: as large as they are",
    )


def _remove(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a checkpoint without some of its blocks. The model is not loaded: its tensors are copied from file to "
        "file, so that it may be larger than the memory. Of a checkpoint on the Hub only those files are downloaded "
        "that hold what stays, with --no-verify."
    )
    _common_options(parser)
    parser.add_argument(
        "--blocks",
        action="append",
        required=True,
        metavar="STACK=NUMBERS",
        help="blocks that go, as in model.layers=20-27 or bert.encoder.layer=3,7, names with braces in quotes; may be "
        "repeated",
    )
    parser.add_argument(
        "--freeze",
        default="none",
        metavar="{none,partial}",
        help="partial: the record says that blocks away from the gaps need no retraining (default none)",
    )
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--out", metavar="OUT", required=True, help="folder for the checkpoint")
    _disk_options(group)


def _prune(parser: argparse.ArgumentParser) -> None:
    # settings stand beside the mathematics, which take seconds to import
    from ..pruning.config import MPruneConfig
    from ..similarity import metrics

    parser.description = (
        "Compare the blocks of a model on data, remove redundant ones, and save a checkpoint that stock libraries "
        "load. Use training data, never the data that you evaluate on. A plan that is made already and repairs nothing "
        "needs no data, and is carried out from file to file."
    )
    _common_options(parser)
    _data_options(parser, required=False, note="; not needed with a plan that repairs nothing")
    parser.add_argument(
        "--plan", metavar="FILE", help="carry out this plan, a file that an earlier run wrote (with --dry-run, say)"
    )
    _setting_options(parser.add_argument_group("pruning"), MPruneConfig, {"similarity": metrics.names()})
    _budget_options(parser)
    output = _output_options(
        parser, "folder for checkpoint, plan, report and heatmap; required without --dry-run", required=False
    )
    output.add_argument(
        "--dry-run", action="store_true", help="write no checkpoint; with -o the plan, the report and the heatmap only"
    )
    _disk_options(output)


def _sparsify(parser: argparse.ArgumentParser) -> None:
    from ..sparsity.config import WandaConfig
    from ..sparsity.methods import methods

    parser.description = (
        "Zero the weights that matter least in the linear maps of all blocks, and save a checkpoint that stock "
        "libraries load. Zeros are stored and multiplied like other numbers: the checkpoint is neither smaller nor "
        "faster by them. Use training data, never the data that you evaluate on."
    )
    _common_options(parser)
    no_data = [method.name for method in methods if not method.needs_inputs]
    _data_options(parser, required=False, note=f"; not needed with --method {' or '.join(no_data)}" if no_data else "")
    _setting_options(parser.add_argument_group("sparsity"), WandaConfig, {"method": methods.names()})
    _output_options(parser, "folder for checkpoint and report", required=True)


def _card(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make the model card of a checkpoint from the record in its config.json and the reports beside it. Reads no "
        "weights."
    )
    parser.add_argument("path", metavar="PATH", help="folder of the checkpoint")
    parser.add_argument("-o", "--out", help="file to write; default: README.md in the folder; - for stdout")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a README.md that somebody wrote or edited, too"
    )
    parser.add_argument("--repo-id", help="where the model will be on the Hub, for the code in the card")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    _card_options(parser)


def _push(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Publish the checkpoint in a folder on the Hub: weights, config, tokenizer, reports and a model card made of "
        "them, in one commit. A README.md that somebody wrote or edited stays, unless --overwrite is given. Log in "
        "first: hf auth login, or set HF_TOKEN."
    )
    parser.add_argument("path", metavar="PATH", help="folder of the checkpoint")
    parser.add_argument("repo_id", metavar="REPO", help="ORG/NAME, or NAME in your own namespace")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make the repository private, if it is made"
    )
    parser.add_argument("--revision", help="branch to commit to, made if there is none; default: main")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a README.md that somebody wrote or edited, here or on the Hub"
    )
    parser.add_argument("--message", help="title of the commit")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    _card_options(parser)


def _families(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show which kinds of models are known, and which are refused, each with a line on it."
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _env(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show versions and hardware, for a report of a fault."
    parser.add_argument("--json", action="store_true", help="print JSON on stdout, and nothing else there")
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file: model, output, script, arguments of the script with {model} and {output} in them, and "
        "launch, options of accelerate launch",
    )
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


OPTIONS: Mapping[str, Callable[[argparse.ArgumentParser], None]] = {
    "inspect": _inspect,
    "search": _search,
    "prune": _prune,
    "remove": _remove,
    "sparsify": _sparsify,
    "run": _run,
    "card": _card,
    "push": _push,
    "families": _families,
    "env": _env,
}
