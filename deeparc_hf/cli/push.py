"""`deeparc push`: publish a checkpoint on the Hub, with its card, in one commit."""

from __future__ import annotations

import argparse

from ..core.hub_help import notes_of
from ..errors import ConfigError, DeepArcError
from ..publish.push import push_to_hub
from .options import card_options, given_card

__all__ = ["add"]


def add(parser: argparse.ArgumentParser) -> None:
    """Give a parser the command's options."""
    parser.description = (
        "Publish the checkpoint in a folder on the Hub: weights, config, tokenizer, reports and a model card made of "
        "them, in one commit. A README.md that somebody wrote or edited stays, unless --overwrite is given. Log in "
        "first: hf auth login, or set HF_TOKEN."
    )
    parser.set_defaults(run=_push)
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
    card_options(parser)


def _push(args: argparse.Namespace) -> int:
    settings = {name: getattr(args, name) for name in ("private", "revision", "create_pr", "overwrite")}
    try:
        done = push_to_hub(args.path, args.repo_id, commit_message=args.message, **settings, **given_card(args))
    except DeepArcError:
        raise
    except ValueError as error:  # a name or metadata that the Hub would not take
        raise ConfigError(str(error)) from error
    except Exception as error:
        if isinstance(error, OSError) or not notes_of(error):
            raise
        said = str(error).rstrip(".") or type(error).__name__
        raise ConnectionError(
            f"{said}. {notes_of(error)} Nothing was committed; the local files are as they were."
        ) from error
    if done is not None:
        print(done.pr_url or done.commit_url)
    return 0
