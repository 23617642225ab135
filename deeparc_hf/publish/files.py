"""Which files make up a checkpoint that may be published, and which of an earlier one go when it is replaced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..core.sentence_encoders import module_folders
from ..errors import ConfigError

__all__ = ["REPORTS", "checkpoint_files", "checkpoints_in", "outdated"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"
_SAFETENSORS = r"model\.safetensors(\.index\.json)?|model-\d{5}-of-\d{5}\.safetensors"
_TOKENIZER = (
    r"tokenizer[\w.\-]*\.(json|model)|[\w\-]*\.(spm|tiktoken|model)|chat_template\.jinja"
    r"|(vocab|added_tokens|special_tokens_map|normalizer|chat_template|merges)[\w.\-]*\.(json|txt|bpe|jinja)"
)
_REPORTS_OF_OLD = r"(pruning|sparsity)_report\.(json|md)|(pruning_plan|evaluations)\.json"
REPORTS = re.compile(rf"{_REPORTS_OF_OLD}|report\.(json|md)|(similarity|quality)\.png")
# by name: nothing that runs code when it is read (pickles), and nothing that lies beside a checkpoint by chance
_CHECKPOINT = re.compile(
    rf"{_SAFETENSORS}|{_TOKENIZER}|{REPORTS.pattern}|([\w.\-]*_)?config\.json|modules\.json|config_sentence_transformers\.json|preprocessor\w*\.json"
    r"|README\.md|LICEN[CS]E[\w.\-]*|NOTICE[\w.\-]*|results\.(json|md)|scores\.md|heatmap\.png"
)
# weights that a loader would take instead of the new ones, the Trainer's pickle of its arguments, and reports
_OUTDATED = re.compile(
    rf"{_SAFETENSORS}|pytorch_model(-\d{{5}}-of-\d{{5}})?\.bin|pytorch_model\.bin\.index\.json|tf_model\.h5"
    rf"|flax_model\.msgpack|adapter_config\.json|adapter_model\.(safetensors|bin)|training_args\.bin|modules\.json|\d+_[A-Z]\w*/.+|{_REPORTS_OF_OLD}"
)
_OUTDATED_TOKENIZER = re.compile(rf"{_TOKENIZER}|{_TEMPLATES}/.+")


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """The files of a whole checkpoint in a folder, by their names in a repository.

    Raises:
        ConfigError: if it is not whole, is of a kind with several parts, or holds a link to somewhere else.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            "This is a PEFT adapter, not a whole model. Merge it (model.merge_and_unload()) and publish the result."
        )
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and _CHECKPOINT.fullmatch(path.name)]
    files = {path.name: path for path in found}
    for name in module_folders(str(folder)) or ():
        files |= _module_files(folder, name)
    files |= {f"{_TEMPLATES}/{path.name}": path for path in sorted((folder / _TEMPLATES).glob("*.jinja"))}
    whole = folder.resolve()
    for name, path in files.items():
        target = path.resolve()
        # huggingface_hub's cache is made of links
        in_cache = whole.parent.name == "snapshots" and target.parent.name == "blobs"
        if not target.is_relative_to(whole) and not in_cache:
            raise ConfigError(
                f"{name} in the folder is a link to a file elsewhere, which is not published. Put the file itself "
                "there."
            )
    _check_whole(files)
    return files


def _module_files(folder: Path, name: str) -> dict[str, Path]:
    """The files of a module of a sentence encoder, by their names in a repository.

    Raises:
        ConfigError: if its weights are pickled.
    """
    paths = [path for path in sorted((folder / name).glob("*")) if path.is_file()]
    pickled = [path.name for path in paths if path.suffix == ".bin"]
    if pickled and not any(path.suffix == ".safetensors" for path in paths):
        raise ConfigError(
            f"{name}/{pickled[0]} is a pickle, which is not published. Load the model by sentence-transformers and "
            "save it anew (model.save_pretrained(FOLDER)): that writes safetensors."
        )
    return {f"{name}/{path.name}": path for path in paths if _CHECKPOINT.fullmatch(path.name)}


def outdated(there: Iterable[str], files: Mapping[str, Path]) -> list[str]:
    """The files of a repository that this checkpoint does not replace, and that must go with the one before it."""
    patterns = [_OUTDATED, _OUTDATED_TOKENIZER] if "tokenizer_config.json" in files else [_OUTDATED]
    return [name for name in there if name not in files and any(pattern.fullmatch(name) for pattern in patterns)]


def _check_whole(files: Mapping[str, Path]) -> None:
    how = "Save the model there by save_pretrained, trainer.save_model or deeparc_hf.save_pruned."
    if "config.json" not in files:
        raise ConfigError(f"This is no whole checkpoint: it has no config.json. {how}")
    weights: Iterable[str] = [WEIGHTS] if WEIGHTS in files else []
    if not weights and INDEX in files:
        try:
            weights = sorted(map(str, set(json.loads(files[INDEX].read_text("utf-8"))["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"This is no whole checkpoint: {INDEX} is damaged ({type(error).__name__}).") from error
    if not weights:
        raise ConfigError(f"This is no whole checkpoint: it needs {WEIGHTS}, or {INDEX} with its shards. {how}")
    for name in weights:
        try:
            with safe_open(files[name], "pt") as stored:
                stored.keys()
        except (SafetensorError, OSError, KeyError) as error:
            raise ConfigError(
                f"This is no whole checkpoint: {name} is not there, or is damaged ({error}). {how}"
            ) from error


def checkpoints_in(output: Path) -> list[Path]:
    """The folders of a Trainer's checkpoints, those of the trials of a hyperparameter search too."""
    return [path for pattern in ("checkpoint-*", "*/checkpoint-*") for path in output.glob(pattern) if path.is_dir()]
