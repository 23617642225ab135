"""Where figures come from: data and settings of a training, fit to be published (no paths, no tokens)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["TIMES", "VALIDATION", "origin_of", "same_data", "training_settings"]

VALIDATION = "validation"  # the use of data that was evaluated on while the model was trained

# how the Trainer ends the names of metrics that are times, and say nothing of the model
TIMES = ("_runtime", "_per_second", "_compilation_time", "_preparation_time")

# how the datasets library names a file of a data set on the Hub, with the commit
_ON_THE_HUB = re.compile(r"^hf://datasets/(?P<id>[\w.\-]+(?:/[\w.\-]+)?)@(?P<revision>[0-9a-f]{40})/")


def origin_of(dataset: Any) -> dict[str, Any]:
    """What a data set of the datasets library knows of itself: id and revision on the Hub, config, split, rows."""
    origin: dict[str, Any] = {}
    info = getattr(dataset, "info", None)
    for source in getattr(info, "download_checksums", None) or {}:
        match = _ON_THE_HUB.match(str(source))
        if match is not None:
            origin.update(match.groupdict())
            if getattr(info, "config_name", None):
                origin["config"] = str(info.config_name)
            break
    split = getattr(dataset, "split", None)
    with contextlib.suppress(TypeError):  # a stream
        origin["rows"] = len(dataset)
    if "id" in origin and split is not None:  # of a local file the split's name says nothing
        known = getattr(info, "splits", None)
        whole = getattr(known.get(str(split)), "num_examples", None) if isinstance(known, Mapping) else None
        part = whole and origin.get("rows", whole) < whole  # chosen, or held out: not what the split's name promises
        origin["split"] = f"{split}, {origin['rows']:,} of {whole:,} rows" if part else str(split)
    return origin


def same_data(dataset: Any) -> Any:
    """What is equal for the same rows: the Trainer makes a new data set without unused columns for each evaluation."""
    return getattr(dataset, "_fingerprint", None) or id(dataset)


def training_settings(args: TrainingArguments) -> dict[str, Any]:
    """The settings of a training that its figures depend on."""
    precision = "bfloat16, mixed" if args.bf16 else "float16, mixed" if args.fp16 else "as the model's"
    settings: Mapping[str, Any] = {
        "learning_rate": args.learning_rate,
        "optimizer": getattr(args.optim, "value", args.optim),
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "weight_decay": args.weight_decay,
        "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "steps": args.max_steps if args.max_steps > 0 else None,
        "training_batch": args.train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "evaluation_batch": args.eval_batch_size,
        "processes": args.world_size,
        "precision": precision,
        "seed": args.seed,
    }
    return {key: value for key, value in settings.items() if value is not None}
