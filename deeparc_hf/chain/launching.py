"""Launching a script by accelerate."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..trainer.link import LINK_VARIABLE

__all__ = ["launch"]

_PATIENCE = 30  # seconds for a script to end after Ctrl-C


def launch(options: Sequence[str], script: str, arguments: Sequence[str], link: Path, lock: Any) -> int:
    """Launch a script for a link, and wait for its end; its exit code. It stops with this process; if that is killed,
    it holds the lock as long as it lives.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, script, *arguments]
    held = {} if lock is None else {"pass_fds": (lock.fileno(),)}
    environment = {**os.environ, LINK_VARIABLE: str(link)}
    # a session of its own: what it starts in turn can be ended with it
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, **held)
    try:
        return process.wait()
    except BaseException:
        _end(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
        _end(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
        raise


def _end(process: subprocess.Popen[bytes], how: int) -> None:
    """Send a signal to a process and to all of its session."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, how)
        else:  # Windows
            process.terminate()
