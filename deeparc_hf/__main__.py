"""The command `deeparc`, also `python -m deeparc_hf`. Nothing else is imported before Ctrl-C is taken care of."""

from __future__ import annotations

import sys

from .core.interrupts import EXIT_CODE, exit_while_importing, work_begins

__all__ = ["main"]

INTERRUPTED = "interrupted: nothing was written"


def main() -> int:
    """Run the command line; Ctrl-C while libraries are imported ends it in one line too.

    Returns:
        The exit code.
    """
    try:
        exit_while_importing(INTERRUPTED)
        from .cli import main as command

        return command()
    except KeyboardInterrupt:
        sys.stderr.write(f"{INTERRUPTED}\n")
        return EXIT_CODE
    finally:
        work_begins()


if __name__ == "__main__":
    sys.exit(main())
