"""How an experiment was asked for, as it may be published: its command, its settings and its data, without places of
one machine or tokens.

What is told is listed here: an argument that is on no list (a run's name, a logging folder, a token) is left out.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .arguments import DataArguments, PruningArguments
from .splits import Splits

__all__ = ["provenance", "published_command"]

_PLACES = (
    *("model", "dataset", "train_file", "validation_file", "test_file", "gguf_file", "evaluate_scripts"),
    *("harness_folder", "prompts_file", "chat_template_path"),
)  # a Hub id, folder or file
_NOT_OURS = ("repo_id", "repo_private")
# of TrainingArguments: what figures depend on
_TRAINING = {
    *("adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate", "lr_scheduler_type", "max_grad_norm", "optim"),
    *("warmup_ratio", "warmup_steps", "weight_decay"),
    *("gradient_accumulation_steps", "per_device_eval_batch_size", "per_device_train_batch_size"),
    *("data_seed", "seed", "train_sampling_strategy"),
    *("eval_strategy", "save_strategy"),
    *("label_smoothing_factor", "neftune_noise_alpha"),
    *("bf16", "fp16", "tf32", "torch_compile", "use_cpu"),
    # of TRL's SFTConfig
    *("assistant_only_loss", "chat_template_path", "completion_only_loss", "loss_type", "max_length", "packing"),
    *("packing_strategy", "truncation_mode"),
}
_TOKEN = re.compile(r"hf_[A-Za-z0-9]+")
_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


def provenance(
    recipe: str,
    argv: Sequence[str] | None,
    data: DataArguments,
    own: Any,
    training: TrainingArguments,
    splits: Splits,
    metrics: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The facts for the report, of a recipe's file, its arguments (default: those of the process), its own settings (a
    dataclass) and the Trainer's, of which those are told that figures depend on, and what computes its metrics.
    """
    words = sys.argv[1:] if argv is None else argv
    settings = {**_changed(data), **dataclasses.asdict(own)}
    trainer = {name: value for name, value in _changed(training).items() if name in _TRAINING}
    return {
        "recipe": Path(recipe).name,
        "command": published_command(Path(recipe), words, [spec.name for spec in dataclasses.fields(own)]),
        "settings": {name: _told(name, value) for name, value in settings.items() if name not in _NOT_OURS},
        "trainer": {name: getattr(value, "value", value) for name, value in trainer.items()},
        "data": {use: dict(facts) for use, facts in splits.sources.items()},
        **({} if metrics is None else {"metrics": dict(metrics)}),
    }


def published_command(recipe: Path, argv: Sequence[str], own: Sequence[str] = ()) -> str:
    """The command as others may type it: files by their names, FOLDER for folders; arguments that are neither on a list
    nor the recipe's own are left out. Configs that lie beside the recipe are told with their place.
    """
    ours = {spec.name for cls in (DataArguments, PruningArguments) for spec in dataclasses.fields(cls)} - set(_NOT_OURS)
    listed = {"config", *ours, *own, *_TRAINING}
    words: list[str] = []
    name = ""
    for word in argv:
        if word.startswith("--"):
            option, sign, value = word.partition("=")
            name = option[2:].replace("-", "_")  # both spellings are the same to the parser
            if name in listed:
                words.append(f"--{name}{sign}{_shown(name, value, recipe) if sign else ''}")
        elif name in listed:
            words.append(_shown(name, word, recipe))
    return f"{_launcher()} recipes/{recipe.name} {shlex.join(words)}".strip()


def _launcher() -> str:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes == 1:
        return "python"
    return f"torchrun {f'--nnodes {processes // here} ' if here != processes else ''}--nproc_per_node {here}"


def _shown(name: str, value: str, recipe: Path) -> str:
    """A word of the command; a config file with its place where it is one of the recipes' own, unchanged."""
    if name != "config":
        return str(_told(name, value))
    path = Path(value)
    shipped = recipe.resolve().parent / "configs" / path.name
    try:
        same = shipped.read_bytes() == path.read_bytes()
    except OSError:
        same = False
    return f"recipes/configs/{path.name}" if same else path.name


def _told(name: str, value: Any) -> Any:
    """A setting's value without what is only on this machine."""
    if not isinstance(value, str):
        return value
    if name in _PLACES:
        try:
            path = Path(value).expanduser()
            if path.is_dir():
                value = "FOLDER"
            elif path.is_file() or not _HUB_ID.fullmatch(value):
                value = path.name
        except (OSError, RuntimeError, ValueError):  # too long for a name, or of no user
            value = "FOLDER"
    return _TOKEN.sub("TOKEN", value)


def _changed(settings: Any) -> dict[str, Any]:
    """The settings that are not the defaults."""
    given = {spec: getattr(settings, spec.name) for spec in dataclasses.fields(settings) if spec.init}
    return {spec.name: value for spec, value in given.items() if value != spec.default}
