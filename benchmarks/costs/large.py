"""Checkpoints and models that memory should not have to hold: blocks taken out of files, and a model that accelerate
keeps on the disk, each in a process of its own.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .. import offloaded
from ..disk_surgery import copy_of, surgery, write_checkpoint
from .rows import Row

__all__ = ["measure"]

PART = "large"


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield from _surgery(Path(folder), 0.5 if quick else 8.0)
    with tempfile.TemporaryDirectory() as folder:
        yield from _offloaded(Path(folder), 0.3 if quick else 4.0)


def _surgery(folder: Path, gigabytes: float) -> Iterator[Row]:
    source = folder / "whole"
    blocks = write_checkpoint(source, gigabytes, 4)
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    os.sync()  # what has just been written must not go to the disk while others are timed
    copied = copy_of(source)
    os.sync()
    seconds, peak = surgery(source, folder / "smaller", blocks)
    bound = 1.5 * max(sizes) + 300e6
    told = f"{sum(sizes) / 1e9:.1f} GB in files of at most {max(sizes) / 1e9:.2f} GB, verified: {peak / 1e9:.2f} GB"
    what = "blocks taken out of files: peak memory / (1.5 times the largest file + 300 MB)"
    yield Row(PART, what, peak / bound, target="<= 1.00", note=told)
    yield Row(
        PART,
        "blocks taken out of files: time / a copy of the files",
        seconds / copied,
        note=f"{seconds:.0f} s, the start of the process included",
    )


def _offloaded(folder: Path, gigabytes: float) -> Iterator[Row]:
    offloaded.write_checkpoint(folder / "whole", gigabytes)
    os.sync()
    start = time.perf_counter()
    found = {way: offloaded.run(folder, way) for way in ("disk", "memory")}
    same = "equal" if offloaded.alike(folder) else "DIFFERENT"
    told = f"{gigabytes:.1f} GB of weights, {time.perf_counter() - start:.0f} s for both ways; results {same}"
    for what in ("compared", "pruned with repairs", "zeroed"):
        (seconds, peak), (plain, most) = found["disk"][what], found["memory"][what]
        note = f"{told}; at most {peak / 1e9:.2f} GB, in memory {most / 1e9:.2f} GB"
        yield Row(PART, f"on the disk, {what}: time / in memory", seconds / plain, note=note)
    ratio = found["disk"]["zeroed"][1] / found["memory"]["zeroed"][1]
    yield Row(PART, "on the disk, all of it: peak memory / in memory", ratio, note=told)
