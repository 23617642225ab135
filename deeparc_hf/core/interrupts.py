"""Ctrl-C while libraries are being imported, which takes seconds.

There it cannot be left to KeyboardInterrupt: some libraries lose one that reaches them in the middle of their import,
and others make an error of another kind of it. Nothing is at stake yet, so the process ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["exit_while_importing", "work_begins"]

EXIT_CODE = 130


def exit_while_importing(message: str) -> None:
    """Until `work_begins`, Ctrl-C in the middle of an import ends the process with exit code 130 and a line on stderr.

    Elsewhere Ctrl-C raises KeyboardInterrupt as ever. Nothing is changed where a process ignores Ctrl-C or handles it
    in its own way, and in another thread than the main one.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                sys.stderr.write(f"{message}\n")
                sys.stderr.flush()
                os._exit(EXIT_CODE)
            frame = frame.f_back
        raise KeyboardInterrupt

    handle.ends_imports = True  # type: ignore[attr-defined]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        try:
            signal.signal(signal.SIGINT, handle)
        except ValueError:  # not the main thread
            return


def work_begins() -> None:
    """From here on something is to be cleaned up after Ctrl-C,
    which raises KeyboardInterrupt again wherever it comes.
    """
    if getattr(signal.getsignal(signal.SIGINT), "ends_imports", False):
        signal.signal(signal.SIGINT, signal.default_int_handler)
