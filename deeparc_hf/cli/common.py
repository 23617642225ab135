"""What the commands share: lines on stderr, checks of an output folder, plain warnings."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.checks import Entry, MalformedError, read_json
from ..core.plain_text import plain_lines
from ..core.sentence_encoders import MODULES, module_folders
from ..errors import ConfigError, DeepArcWarning

__all__ = ["PLAN_FILE", "SPARSITY_FILE", "output_folder", "plain_warnings", "public_names", "say"]

_LONGEST_LINE = 4000
PLAN_FILE = "pruning_plan.json"
SPARSITY_FILE = "sparsity_report.json"
# what --overwrite may replace: a checkpoint's files and the findings, never a folder of a training run
_OWN_FILE = re.compile(
    r"[\w.\-]*(config|token|vocab|merges|spiece|template)[\w.\-]*|model[\w.\-]*|pruning_plan\.json|(sparsity_)?report\.(json|md)|heatmap\.png"
)


def say(message: str) -> None:
    """A line on stderr, as visible text: a message may quote what was downloaded."""
    print(plain_lines(message, _LONGEST_LINE), file=sys.stderr)


def public_names(args: argparse.Namespace) -> dict[str, str]:
    """Model and data for a report, which may be published: of a local path the last part only."""
    names = {key: name for key, name in (("model", args.model), ("data", args.data)) if name is not None}
    return {key: Path(name).name if Path(name).expanduser().exists() else name for key, name in names.items()}


def output_folder(args: argparse.Namespace) -> Path:
    """Check where the output is to go before any work is done."""
    out = Path(args.out).expanduser().resolve()
    if out == Path(args.model).expanduser().resolve():
        raise ConfigError(f"{args.out} is the model itself. Give another folder with -o.")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{args.out} is a file. Give another folder with -o.")
    if out.is_dir() and any(out.iterdir()):
        if not args.overwrite:
            raise ConfigError(f"{args.out} exists and is not empty. Give another folder with -o, or --overwrite.")
        modules = {MODULES, *((module_folders(str(out)) or ()) if (out / MODULES).is_file() else ())}
        foreign = sorted(
            path.name
            for path in out.iterdir()
            if path.name not in modules and (path.is_dir() or not _OWN_FILE.fullmatch(path.name))
        )
        if foreign:
            raise ConfigError(
                f"{args.out} holds {foreign[0]!r}, which this command did not write, so it is not replaced. Give "
                "another folder."
            )
        try:
            ours = (out / PLAN_FILE).is_file() or "matrices" in Entry(read_json(out / SPARSITY_FILE)).mapping()
        except (OSError, MalformedError):  # a training writes a sparsity report too, of another form
            ours = False
        if not ours:
            raise ConfigError(
                f"{args.out} holds files but neither {PLAN_FILE} nor {SPARSITY_FILE} as this command writes them: no "
                "earlier run wrote it, so it is not replaced. Give another folder."
            )
    parent = next(path for path in out.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "not to be written to" if parent.is_dir() else "a file"
        raise ConfigError(f"{args.out} cannot be made: {parent} is {reason}. Give another folder with -o.")
    return out


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show this package's own warnings as one line each."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def plain(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, DeepArcWarning):
                say(f"warning: {message}")
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = plain
        yield
