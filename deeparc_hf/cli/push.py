"""`deeparc push`: publish a checkpoint on the Hub, with its card, in one commit."""

from __future__ import annotations

import argparse

from ..core.hub_help import notes_of
from ..errors import ConfigError, DeepArcError
from ..publish.push import push_to_hub
from .options import given_card

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
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
