"""Ctrl-C where it would do harm.

While libraries are being imported some lose a KeyboardInterrupt or make another error of it: the process ends at once,
as nothing is at stake yet. Between steps that must be made together it waits.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["exit_while_importing", "uninterrupted", "work_begins"]

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


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, Ctrl-C waits for the end: for a few quick steps that must be made together."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield  # Python hands signals to the main thread alone; or Ctrl-C is ignored, or not handled by Python
        return
    pressed: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pressed:
            handler(*pressed[-1])
