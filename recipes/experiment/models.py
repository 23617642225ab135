"""Loading a model for an experiment: a checkpoint, a folder with a config alone, or a GGUF file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from deeparc_hf.errors import ConfigError

from .arguments import DataArguments, PruningArguments
from .labels import classes_of, label_settings

__all__ = ["load_model", "loader", "named_classes"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_OF_CHECKPOINTS = ("ignore_mismatched_sizes",)


def named_classes(data: DataArguments, pruning: PruningArguments) -> list[str] | None:
    """The classes of a model that is fine-tuned already, which have their numbers; None where it is trained first."""
    if pruning.finetune_epochs > 0:
        return None
    return classes_of(AutoConfig.from_pretrained(data.model, revision=data.model_revision))


def loader(
    auto_class: Any,
    data: DataArguments,
    pruning: PruningArguments,
    *,
    labels: Sequence[str] | None = None,
    gguf_file: str | None = None,
) -> Callable[[str], Any]:
    """How an experiment loads the model that it begins with (whole, unless it is fine-tuned first), and those that it
    saved. Where `labels` are given, a head of another task is replaced by a new one to fine-tune.
    """

    def load(name: str) -> Any:
        first = name == data.model
        fresh = first and pruning.finetune_epochs > 0
        settings: dict[str, Any] = {"revision": data.model_revision, "gguf_file": gguf_file} if first else {}
        if labels is not None:
            settings |= {**label_settings(labels), "ignore_mismatched_sizes": fresh}
        return load_model(auto_class, name, whole=not fresh, **settings)

    return load


def load_model(
    auto_class: Any,
    name: str,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    whole: bool = False,
    **settings: Any,
) -> Any:
    """Load a model by Hub id or folder.

    A folder with a config.json and no weights gives a model from scratch. `whole` refuses a checkpoint that lacks
    weights (of its head, say), which would be drawn at random. `settings` are of the config.

    Raises:
        ConfigError: if a folder holds no model, or not a whole one.
    """
    folder = Path(name)
    configured = (folder / "config.json").is_file()
    if folder.is_dir() and gguf_file is None and not configured:
        raise ConfigError(
            f"{name} holds no config.json, so there is no model in it. Give the folder of a checkpoint, or a Hub id."
        )
    if gguf_file is not None:
        return _of_gguf(auto_class, name, revision=revision, gguf_file=gguf_file, **settings)
    if not configured or any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        model, info = auto_class.from_pretrained(name, revision=revision, output_loading_info=True, **settings)
        if whole and info["missing_keys"]:
            raise ConfigError(
                f"{name} has no weights for {min(info['missing_keys'])}: it is not fine-tuned for this task, and they "
                "would be drawn at random. Give finetune_epochs, or a fine-tuned model."
            )
    elif whole:
        raise ConfigError(
            f"There are no weights in {name}, and nothing is going to be trained first. Give finetune_epochs, or a "
            "fine-tuned model."
        )
    else:
        known = {key: value for key, value in settings.items() if key not in _OF_CHECKPOINTS}
        model = auto_class.from_config(AutoConfig.from_pretrained(name, **known))
    if "id2label" in settings and hasattr(model.config, "label_names"):
        # the wrapper of timm models would save the names that were there before
        model.config.label_names = list(settings["id2label"].values())
    return model


def _of_gguf(auto_class: Any, name: str, **settings: Any) -> Any:
    """A copy, in a fresh model of its config: the one that transformers makes refuses to be saved."""
    loaded = auto_class.from_pretrained(name, dtype=torch.float32, **settings)
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):  # its weights are dequantized
        del config.quantization_config
    fresh = auto_class.from_config(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    return fresh
