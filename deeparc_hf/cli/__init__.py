"""The command `deeparc`: inspect, search, prune, sparsify or publish a model. Results go to stdout, everything else to
stderr.

Exit codes: 0 done, 2 an error (one line on stderr; --debug shows where it came from), 130 interrupted. Output folders
appear whole or not at all. What takes seconds to import is imported by the command that needs it, when it needs it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import DeepArcError
from .common import plain_warnings, say
from .options import OPTIONS

__all__ = ["main"]

_COMMANDS = {  # each is carried out by the module of this name
    "inspect": "show stacks, pinned blocks, parameters and the pruning record of a model",
    "search": "search for the best blocks to remove, for each number of them",
    "prune": "remove redundant blocks of a model and save the smaller checkpoint",
    "remove": "write a checkpoint without some of its blocks, from file to file",
    "sparsify": "zero the weights of a model that matter least and save the checkpoint",
    "run": "train, prune, train on in a chain of launches, where parameters are sharded",
    "card": "make the model card of a checkpoint from its record and reports",
    "push": "publish a checkpoint on the Hub, with its card",
    "families": "show which kinds of models are known",
    "env": "show versions and hardware",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = None
    try:
        parser = make_parser(argv)
        if not argv:
            parser.print_help()
            return 0
        args = parser.parse_args(argv)
        with plain_warnings():
            return importlib.import_module(f"{__name__}.{args.command}").run(args)
    except KeyboardInterrupt:
        say("interrupted: nothing was written")
        return 130
    except BrokenPipeError:  # the reader of stdout (head, say) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (DeepArcError, OSError) as error:
        if args is None or args.debug:
            raise
        notes = getattr(error, "__notes__", ())  # help on errors of the Hub
        say(f"error: {' '.join(' '.join([str(error), *notes]).split())}")
        return 2


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands; of the one that `argv` names, with its options."""
    parser = argparse.ArgumentParser(
        prog="deeparc", description="Make trained models smaller by layer similarity, or zero their weights."
    )
    parser.add_argument("--version", action="version", version=f"deeparc_hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, help=what)
        if argv[:1] == [name]:
            OPTIONS[name](command)
    return parser
