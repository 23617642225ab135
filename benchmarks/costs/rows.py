"""One figure of the table, and calls that are timed in turn."""

from __future__ import annotations

import cProfile
import math
import pstats
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..measuring import interval

__all__ = ["Row", "in_turn", "median_of", "peak_memory", "profile", "row_of", "that_run"]


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        part: of the table.
        what: was measured, on what.
        value, low, high: a median with its 95 % bootstrap interval; low and high are None where it is one reading.
        n: readings behind it.
        target: a bound, as "<= 1.10"; None where there is none.
        note: what else is to be known.
    """

    part: str
    what: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 1
    target: str | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value keeps the bound; None where there is none."""
        if self.target is None:
            return None
        sign, bound = self.target.split()
        return self.value <= float(bound) if sign == "<=" else self.value >= float(bound)


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each call, shape (rounds,): all once to warm up, then in turn, so that a slow spell hits all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = _now()
            call()
            if turn:
                seconds[name].append(_now() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def _now() -> float:
    """The time, once a GPU has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def that_run(part: str, calls: dict[str, Callable[[], Any]]) -> Iterator[Row]:
    """Try each call once; those that fail are taken out of the dict, and told."""
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:
            del calls[name]
            yield Row(part, f"{name}: could not run", math.nan, note=f"{type(error).__name__}: {error}"[:160])


def row_of(part: str, what: str, values: np.ndarray, target: str | None = None, note: str = "") -> Row:
    """A row of readings."""
    low, high = interval(values)
    return Row(part, what, median_of(values), low, high, len(values), target, note)


def median_of(values: np.ndarray) -> float:
    return float(np.median(values))


def profile(call: Callable[[], Any], parts: Mapping[str, Iterable[Callable[..., Any]]], one: float) -> str:
    """What takes a call's time, in units of `one` second: of each part, the time of its functions and what they call.
    They must not call each other. Watching slows plain Python down, so many small calls look larger than they are. A
    GPU works while Python goes on, so there it tells nothing.
    """
    if torch.cuda.is_available():
        return "not profiled"
    watch = cProfile.Profile()
    watch.runcall(call)
    seconds = {
        key: times[3]
        for key, times in pstats.Stats(watch).stats.items()  # type: ignore[attr-defined]
    }
    found = {}
    for part, functions in parts.items():
        codes = [function.__code__ for function in functions]  # type: ignore[attr-defined]
        found[part] = sum(seconds.get((code.co_filename, code.co_firstlineno, code.co_name), 0.0) for code in codes)
    return "profiled: " + ", ".join(f"{part} {value / one:.3f}" for part, value in found.items())


def peak_memory(code: str) -> int:
    """The most memory in bytes that a process of its own takes for some code, as the kernel tells."""
    told = '\nimport re\nprint("PEAK", re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])\n'
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code + told], cwd=root, capture_output=True, text=True, check=True)
    found = re.search(r"PEAK (\d+)", done.stdout)
    assert found is not None
    return 1024 * int(found[1])
