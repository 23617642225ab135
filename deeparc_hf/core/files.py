"""Files of figures: JSON that every reader takes; files and folders that are there whole or not at all."""

from __future__ import annotations

import glob
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..errors import ConfigError
from .interrupts import work_begins

__all__ = ["alone", "drafted", "finite", "whole_folder", "write_whole"]

try:
    import fcntl
except ImportError:  # Windows, where what is left stays
    fcntl = None  # type: ignore[assignment]


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a file: it is there whole or not at all."""
    with drafted(path) as draft:
        draft.write_text(text, "utf-8")


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when all went well, and is gone otherwise.

    A Trainer uploads its output folder in the background: a draft that it had listed and that is gone breaks the whole
    upload off, without a word. It leaves out what begins with "_".
    """
    draft = path.with_name(f"_{path.name}.{os.getpid()}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def alone(file: Path, waits: Callable[[], None]) -> Iterator[Any]:
    """Hold a lock on a file, which is made, as an open file that processes may inherit; None where there are no locks.

    Args:
        waits: called where somebody else holds it, before it is waited for.
    """
    if fcntl is None:
        yield None
        return
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def whole_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and is gone otherwise. What a process that was
    killed has left of one goes too.

    Args:
        replace: whether a folder that holds something may be replaced.

    Raises:
        ConfigError: if there is one that may not, now or at the end.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work_begins()
    _clear(out)
    if not replace:
        _require_free(out)
    new = out.parent / f".{out.name}.{uuid4().hex}.new"
    old = new.with_suffix(".old")
    new.mkdir()
    with ExitStack() as locks:
        locks.enter_context(_in_use(new))
        try:
            yield new
            if not replace:
                _require_free(out)
            try:
                if replace and out.exists():
                    locks.enter_context(_in_use(out))
                    out.rename(old)
                new.rename(out)
            except BaseException:
                if old.exists() and not out.exists():
                    old.rename(out)
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)


def _require_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out.name} exists and is not an empty folder. Give another place for the output.")


def _clear(out: Path) -> None:
    """Remove what killed processes have left; where one was killed between two renamings, the folder that was there
    before comes back.
    """
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        if not re.fullmatch(rf"\.{re.escape(out.name)}\.\w+\.(new|old)", left.name) or not left.is_dir():
            continue
        with _in_use(left) as ours:
            if ours and left.suffix == ".old" and not out.exists():
                left.rename(out)
            elif ours:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _in_use(folder: Path) -> Iterator[bool]:
    """Within, a folder is marked as in use; the mark goes with the process. Gives whether nobody else had it."""
    if fcntl is None:
        yield False
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(number)
