"""A recipe as a command: what the user should read goes to stderr in one line, without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

from deeparc_hf.core.interrupts import EXIT_CODE, exit_while_importing, work_begins
from deeparc_hf.errors import DeepArcError

__all__ = ["run"]


STOPPED = (
    "Stopped. What was written so far stays; the same command with --resume_from_checkpoint true goes on from there."
)


def run(main: Callable[[], Any], stopped: str = STOPPED) -> NoReturn:
    """Run a recipe's main and exit: with its exit code, if it gives a number, else 0; 2 after an error of this package
    or of a file, a model or the Hub; 130 after Ctrl-C, also while libraries are being imported.

    Other errors keep their traceback.

    Args:
        main: the work.
        stopped: what to say after Ctrl-C.
    """
    try:
        exit_while_importing(stopped)
        code = main()
    except KeyboardInterrupt:
        sys.stderr.write(f"{stopped}\n")
        sys.exit(EXIT_CODE)
    except (DeepArcError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    finally:
        work_begins()
    sys.exit(code if isinstance(code, int) else 0)
