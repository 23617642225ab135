"""How an experiment was asked for, as it may be published: its command without local paths and tokens, its settings, its data."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .splits import Splits

__all__ = ["asked_for", "command_of"]

_LEFT_OUT = ("--output_dir", "--repo_id", "--repo_private", "--hub_token", "--push_to_hub_token", "--hub_model_id")


def asked_for(recipe: str, argv: Sequence[str] | None, own: Any, splits: Splits) -> dict[str, Any]:
    """The facts for the report.

    Args:
        recipe: name of its file.
        argv: the arguments; default: those of the process.
        own: the recipe's own settings, a dataclass.
        splits: the data.
    """
    return {
        "recipe": recipe,
        "command": command_of(recipe, sys.argv[1:] if argv is None else argv),
        "settings": dataclasses.asdict(own),
        "data": {use: dict(facts) for use, facts in splits.sources.items()},
    }


def command_of(recipe: str, argv: Sequence[str]) -> str:
    """The command as others may type it: files by their names, FOLDER for folders, without the places of results and without tokens."""
    words: list[str] = []
    left_out = False
    for word in argv:
        option, sign, value = word.partition("=")
        if word.startswith("--"):
            left_out = option in _LEFT_OUT
            if not left_out:
                words.append(f"{option}{sign}{_public(value)}")
        elif not left_out:
            words.append(_public(word))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    return f"{launcher} recipes/{recipe} {shlex.join(words)}".strip()


def _public(word: str) -> str:
    """A value without what is only on this machine."""
    if not word:
        return ""
    if word.startswith("hf_"):
        return "TOKEN"
    path = Path(word).expanduser()
    if path.suffix in (".yaml", ".yml") and path.parent.name == "configs":
        return f"recipes/configs/{path.name}"
    if path.is_dir():
        return "FOLDER"
    return path.name if path.is_file() or path.is_absolute() else word
