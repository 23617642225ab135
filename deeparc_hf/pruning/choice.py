"""How a search chose the blocks of a plan. Pure: no model, no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..core.checks import Entry
from ..core.plain_text import plain

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice:
    """Why a search took these blocks.

    Attributes:
        search, objective: names of the strategy, and of what it made small.
        value: of the objective, with the blocks removed and healed.
        interval: 95 %, over the samples; None where there were too few.
        samples: number of samples that it was judged on.
        speedup: how many times as fast the model becomes, by the times of its blocks; None: not known.
        measured: the same, measured on the smaller model.
    """

    search: str
    objective: str
    value: float
    interval: tuple[float, float] | None = None
    samples: int = 0
    speedup: float | None = None
    measured: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**dataclasses.asdict(self), "interval": None if self.interval is None else list(self.interval)}

    @classmethod
    def read(cls, entry: Entry) -> Choice:
        """From outside.

        Raises:
            MalformedError: naming what is wrong.
        """
        interval = entry.get("interval")
        low_high = None if interval is None else interval.numbers(2)
        return cls(
            plain(entry["search"].text()),
            plain(entry["objective"].text()),
            entry["value"].number(),
            None if low_high is None else (low_high[0], low_high[1]),
            entry["samples"].whole(),
            entry.optional("speedup", Entry.number),
            entry.optional("measured", Entry.number),
        )

    def __str__(self) -> str:
        bounds = "" if self.interval is None else f" ({self.interval[0]:.3g} .. {self.interval[1]:.3g})"
        faster = self.measured or self.speedup
        times = "" if faster is None else f", {faster:.2f} times as fast"
        return f"{self.search} search: {self.objective} {self.value:.3g}{bounds} on {self.samples} samples{times}"
