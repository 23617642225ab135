"""A recipe as a command: what the user should read goes to stderr in one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ..errors import DeepArcError

__all__ = ["run"]


def run(main: Callable[[], Any]) -> NoReturn:
    """Run a recipe's main and exit: with 0; 2 after an error of this package or of a file, a model or the Hub; 130 after Ctrl-C.

    Other errors keep their traceback.
    """
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write(
            "Stopped. What was written so far stays; a fine-tuned original in it can be given as --model, with another output_dir.\n"
        )
        sys.exit(130)
    except (DeepArcError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.exit(0)
