"""Writing that survives a kill at any moment: a file is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes, incoming: Path) -> None:
    """Write beside the data, then rename over the place where it is looked for."""
    draft = incoming / uuid.uuid4().hex
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    move_in(draft, path)


def write_json(path: Path, value: Mapping[str, Any], incoming: Path) -> None:
    write_whole(path, json.dumps(value, indent=1).encode(), incoming)


def move_in(draft: Path, path: Path) -> None:
    """Give a finished file or folder its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft.rename(path)
    sync_folder(path.parent)


def remove_whole(folder: Path, incoming: Path) -> None:
    """A folder is gone by one rename; only then is it emptied."""
    doomed = incoming / uuid.uuid4().hex
    folder.rename(doomed)
    sync_folder(folder.parent)
    shutil.rmtree(doomed)
