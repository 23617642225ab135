"""Files of figures: JSON that every reader takes; files and folders that are there whole or not at all."""

from __future__ import annotations

import glob
import math
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .interrupts import work_begins

__all__ = ["finite", "whole_folder", "write_whole"]

_HOST = re.sub(r"\W", "-", socket.gethostname())  # of several with the same disk


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Write a file: it is there whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, "utf-8")
    draft.replace(path)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and is gone otherwise. What a process that was
    killed has left of one goes too.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work_begins()
    _clear(out)
    new, old = (out.parent / f".{out.name}.{_HOST}.{os.getpid()}.{end}" for end in ("new", "old"))
    new.mkdir()
    try:
        yield new
        try:
            if out.exists():
                out.rename(old)
            new.rename(out)
        except BaseException:
            if old.exists() and not out.exists():
                old.rename(out)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _clear(out: Path) -> None:
    """Remove what killed processes have left; where one was killed between two renamings, the folder that was there
    before comes back.
    """
    for left in sorted(out.parent.glob(f".{glob.escape(out.name)}.*")):
        found = re.fullmatch(rf"\.{re.escape(out.name)}\.{_HOST}\.(\d+)\.(new|old)", left.name)
        if found is None or _runs(int(found[1])):
            continue
        if found[2] == "old" and not out.exists():
            left.rename(out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether there is another process of this number."""
    if process == os.getpid():  # numbers come again, in containers soon
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of somebody else
        pass
    return True
