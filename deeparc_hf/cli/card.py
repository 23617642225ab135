"""`deeparc card`: make the model card of a checkpoint anew, from its record and its reports."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ..errors import ConfigError
from ..publish.card import CARD_FILE, create_model_card
from ..publish.encoders import kind_of_folder, may_add
from ..publish.merging import may_replace
from .common import say
from .options import given_card

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    folder = Path(args.path).expanduser()
    if not folder.is_dir():
        hint = (
            f" To make the card of a checkpoint on the Hub, fetch it first: hf download {args.path} --local-dir FOLDER."
            * (args.path.count("/") == 1)
        )
        raise ConfigError(f"There is no folder {args.path}.{hint}")
    out = folder / CARD_FILE if args.out in (None, "-") else Path(args.out).expanduser()
    theirs = out == folder / CARD_FILE and kind_of_folder(folder) is not None and may_add(out)
    if args.out != "-" and not args.overwrite and not may_replace(out) and not theirs:
        raise ConfigError(
            f"{out} was written or edited by somebody, so it is not replaced. Give another file with -o, or "
            "--overwrite."
        )
    settings = {"repo_id": args.repo_id, **given_card(args)}
    if args.out == "-":
        with tempfile.TemporaryDirectory() as scratch:
            print(create_model_card(folder, Path(scratch, CARD_FILE), **settings), end="")
    else:
        create_model_card(folder, out, overwrite=args.overwrite, **settings)
        say(f"written: {out}")
    return 0
