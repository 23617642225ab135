"""How a search chose the blocks of a plan. Pure: no model, no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.checks import MAX_BLOCKS, Entry
from ..core.plain_text import plain

__all__ = ["Choice", "Lesser"]


@dataclass(frozen=True)
class Lesser:
    """A model on the way that the search went, with fewer blocks removed.

    Attributes:
        removed: by stack, the blocks that go.
        value: of the objective.
        speedup: how many times as fast the model becomes; None: not known.
    """

    removed: Mapping[str, tuple[int, ...]]
    value: float
    speedup: float | None = None

    @property
    def count(self) -> int:
        """Blocks that go."""
        return sum(map(len, self.removed.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        removed = {name: list(indices) for name, indices in self.removed.items()}
        return {"removed": removed, "value": self.value, "speedup": self.speedup}

    @classmethod
    def read(cls, entry: Entry) -> Lesser:
        """From outside."""
        removed = {name: indices.wholes() for name, indices in entry["removed"].named().items()}
        return cls(removed, entry["value"].number(), entry.optional("speedup", Entry.number))


@dataclass(frozen=True)
class Choice:
    """Why a search took these blocks.

    Attributes:
        search, objective: names of the strategy, and of what it made small.
        value: of the objective, with the blocks removed and healed.
        interval: 95 %, over the samples; None where there were too few.
        samples: number of samples that it was judged on; 0: on data of the user's own.
        speedup: how many times as fast the model becomes, by the times of its blocks; None: not known.
        measured: the same, measured on the smaller model.
        lesser: what the search found with fewer blocks removed, from the fewest on.
    """

    search: str
    objective: str
    value: float
    interval: tuple[float, float] | None = None
    samples: int = 0
    speedup: float | None = None
    measured: float | None = None
    lesser: tuple[Lesser, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        data = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        data["interval"] = None if self.interval is None else list(self.interval)
        return {**data, "lesser": [each.to_dict() for each in self.lesser]}

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
            tuple(map(Lesser.read, entry["lesser"].items(MAX_BLOCKS))),
        )

    @property
    def judged(self) -> str:
        """Its outcome in words, without times, which are never the same twice."""
        bounds = "" if self.interval is None else f" ({self.interval[0]:.3g} .. {self.interval[1]:.3g})"
        on = f" on {self.samples} samples" if self.samples else ""
        return f"{self.search} search: {self.objective} {self.value:.3g}{bounds}{on}"

    def __str__(self) -> str:
        faster = self.speedup if self.measured is None else self.measured
        told = "" if faster is None else f", {faster:.2f} times as fast"
        if self.measured is not None and self.speedup is not None:
            told += f" (by the times of its blocks {self.speedup:.2f})"
        return self.judged + told
