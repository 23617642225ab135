"""Ctrl-C while libraries are being imported, where some lose a KeyboardInterrupt or make another error of it: the
process ends at once, as nothing is at stake yet.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

__all__ = ["exit_while_importing", "work_begins"]

EXIT_CODE = 130


def exit_while_importing(message: str) -> None:
    """Until `work_begins`, Ctrl-C in the middle of an import ends the process with exit code 130 and a line on stderr;
    not where the process ignores Ctrl-C or handles it in its own way.
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
    """From here on something is to be cleaned up after Ctrl-C: it raises KeyboardInterrupt again wherever it comes."""
    if getattr(signal.getsignal(signal.SIGINT), "ends_imports", False):
        signal.signal(signal.SIGINT, signal.default_int_handler)
