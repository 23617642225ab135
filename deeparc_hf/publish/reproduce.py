"""How to make a model, or its structure, again: its settings, and code or a command that gives them."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from typing import Any

from ..core.markdown import fenced, folded, json_block, plain, shared
from ..core.settings import Settings
from ..pruning.config import MPruneConfig
from ..sparsity.config import WandaConfig
from .content import CardContent
from .usage import task_of

__all__ = ["reproduce"]


def reproduce(content: CardContent, repo_id: str) -> str:
    """The settings, and the ways to make the model, or its structure, again."""
    parts = []
    if content.told.command:
        parts += ["Made by:", fenced(content.told.command, "bash")]
    if content.removed and not content.compared:
        chosen = {name: list(blocks) for name, blocks in content.record.removed.items() if blocks}
        by_hand = f"from deeparc_hf import remove_blocks\n\nremove_blocks(model, {_python(chosen)})"
        parts.append("The blocks were chosen by hand, not found by comparing them. On the original model:")
        parts.append(fenced(by_hand, "python"))
    elif content.config is not None:
        parts += _pruning(content)
    if content.sparsity is not None:
        zeroing = _of_use(WandaConfig, content.sparsity.config.to_dict(), content.zeroed_in_training)
        parts += ["Settings of the zeroing:", json_block(_changed(WandaConfig, zeroing)), _all_of(zeroing)]
    if content.training:
        settings = {key.replace("_", " "): value for key, value in content.training.items()}
        parts.append(f"The training: {shared(settings)}.")
    auto_class = task_of(content)[1]
    if content.removed and content.base and auto_class:
        again = (
            f"from deeparc_hf import PrunedConfig, load_pruned\nfrom transformers import {auto_class}\n\n"
            f"record = PrunedConfig.from_pretrained({json.dumps(repo_id)})\n"
            f"model = load_pruned({auto_class}, {json.dumps(content.base)}, record)"
        )
        parts += ["The same blocks of the base model, with the base's weights:", fenced(again, "python")]
    return "\n\n".join(parts) or "How the model was made was not noted."


def _pruning(content: CardContent) -> list[str]:
    """The settings of the last pruning, and the lines that give them; what only a training uses is left out where there
    was none.
    """
    in_training = content.from_run or bool({"stages", "metrics"} & set(content.last_pruning))
    noted = content.config or {}
    ours = True
    try:
        config = MPruneConfig.from_dict(noted).to_dict()
    except (TypeError, ValueError):  # of a record of another kind: as far as the names are known
        ours = False
        config = {spec.name: noted[spec.name] for spec in dataclasses.fields(MPruneConfig) if spec.name in noted}
    config = _of_use(MPruneConfig, config, in_training)
    changed = _changed(MPruneConfig, config)
    parts = ["All settings are the defaults."]
    if changed:
        parts = ["Settings of the pruning that are not the defaults:", json_block(changed)]
    parts.append(_all_of(config))
    if content.from_run:
        settings = ", ".join(f"{key}={_python(value)}" for key, value in changed.items())
        callback = f"from deeparc_hf import MPruneCallback\n\ncallback = MPruneCallback({settings})"
        return [*parts, "In a Trainer:", fenced(callback, "python")]
    if in_training or not ours or not {"similarity", "calibration_samples"} <= set(noted):
        return parts
    several = len(content.record.iterations) > 1
    command = fenced(_command(changed, None if several else content.base), "bash")
    title = "The last pruning, of the model that the one before it left:" if several else "Without a Trainer:"
    return [*parts, title, command]


def _all_of(config: Mapping[str, Any]) -> str:
    return folded("All settings", json_block(config))


def _of_use(settings: type[Settings], config: Mapping[str, Any], in_training: bool) -> dict[str, Any]:
    for_trainers = {spec.name for spec in dataclasses.fields(settings) if spec.metadata.get("trainer")}
    return {key: value for key, value in config.items() if in_training or key not in for_trainers}


def _changed(settings: type[Settings], config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(settings)}
    return {key: value for key, value in config.items() if value not in (defaults.get(key), None, [], ())}


def _python(value: Any) -> str:
    """A value of JSON types as Python writes it; texts are shortened."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_python(key)}: {_python(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_python, value)) + "]"
    return json.dumps(plain(value)) if isinstance(value, str) else repr(value)


def _command(settings: Mapping[str, Any], base: str | None) -> str:
    """The command line that removes the same blocks."""
    words = ["deeparc", "prune", base or "MODEL", "--data", "TRAINING_DATA"]
    for key, value in settings.items():
        option = f"--{key.replace('_', '-')}"
        if isinstance(value, Mapping):
            words += [word for name, count in value.items() for word in (option, f"{name}={count}")]
        elif isinstance(value, (list, tuple)):
            words += [word for entry in value for word in (option, str(entry))]
        else:
            words += [option, str(value)]
    return shlex.join([*map(plain, words), "-o", "pruned"])
