"""What a sparsification asked for and what was measured afterwards, matrix by matrix, and as a table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.checks import Entry
from ..core.markdown import table
from ..core.plain_text import plain
from ..core.tables import html_table
from .config import WandaConfig

__all__ = ["MatrixSparsity", "SparsityReport", "sparsity_table"]

_COLUMNS = ["stack", "map", "matrices", "weights", "asked (%)", "measured (%)"]
NOTE = (
    "Zeros are stored and multiplied like any other number: a checkpoint of this kind is neither smaller nor "
    "faster by them."
)


@dataclass(frozen=True)
class MatrixSparsity:
    """Zeros of one matrix: how many of its weights were to be zeroed, are zero, and are there at all."""

    asked: int
    zeros: int
    size: int
    stack: str
    role: str  # its path within the block


@dataclass(frozen=True)
class SparsityReport:
    """The result of `sparsify_model`. `str` gives a table.

    Attributes:
        config: the settings.
        matrices: by module path.
        samples: number of calibration samples; 0 where the method needs none.
    """

    config: WandaConfig
    matrices: Mapping[str, MatrixSparsity] = field(repr=False)
    samples: int = 0

    @property
    def asked(self) -> float:
        """Share of all weights that was to be zeroed; less than `config.sparsity` where rows do not divide evenly."""
        return sum(m.asked for m in self.matrices.values()) / self._size

    @property
    def measured(self) -> float:
        """Share of all weights of the matrices that is zero."""
        return sum(m.zeros for m in self.matrices.values()) / self._size

    @property
    def _size(self) -> int:
        return max(1, sum(m.size for m in self.matrices.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "config": self.config.to_dict(),
            "samples": self.samples,
            "asked": self.asked,
            "measured": self.measured,
            "matrices": {name: dataclasses.asdict(matrix) for name, matrix in self.matrices.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsityReport:
        """The inverse of `to_dict`.

        Raises:
            MalformedError: if the data is not a report.
        """
        entry, matrices = Entry(data), {}
        for name, matrix in entry["matrices"].entries(2**16).items():
            size, asked = matrix["size"].whole(), matrix["asked"].whole()
            names = plain(matrix["stack"].value), plain(matrix["role"].value)
            matrices[name] = MatrixSparsity(asked, matrix["zeros"].whole(0, size), size, *names)
        return cls(WandaConfig.from_dict(entry["config"].value), matrices, entry["samples"].whole())

    def to_json(self, path: str | Path) -> None:
        """Write to a file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")

    def to_markdown(self) -> str:
        """Heading, what was done, and the table."""
        return f"# Sparsity report\n\n{self._summary()}\n\n{sparsity_table(self.matrices.values())}\n\n{NOTE}\n"

    def _summary(self) -> str:
        c = self.config
        what = f"the {c.pattern} pattern" if c.pattern else f"{100 * c.sparsity:g} % of each output row"
        how = "block by block" if c.sequential else "in one pass of the dense model"
        data = f"inputs measured {how} on {self.samples} samples" if self.samples else "without data"
        more = " Zeros that were there before stay, and count." if self.measured > self.asked + 0.001 else ""
        return (
            f"{c.method}, {what}, {data}: {100 * self.asked:.2f} % asked and {100 * self.measured:.2f} % measured over "
            f"the weights of {len(self.matrices)} matrices.{more}"
        )

    def _repr_html_(self) -> str:
        return html_table(self._summary(), _COLUMNS, _rows(self.matrices.values()))

    def __str__(self) -> str:
        return f"{self._summary()}\n{sparsity_table(self.matrices.values())}"


def sparsity_table(matrices: Iterable[MatrixSparsity]) -> str:
    """The Markdown table: a row for each kind of map of each stack."""
    return table(_COLUMNS, _rows(matrices), left=(0, 1))


def _rows(matrices: Iterable[MatrixSparsity]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[MatrixSparsity]] = {}
    for matrix in matrices:
        groups.setdefault((matrix.stack, matrix.role), []).append(matrix)
    rows = []
    for (stack, role), members in groups.items():
        size, asked = sum(m.size for m in members), sum(m.asked for m in members)
        shares = sorted(100 * m.zeros / m.size for m in members)
        low, high = f"{shares[0]:.2f}", f"{shares[-1]:.2f}"
        measured = low if low == high else f"{low} to {high}"
        rows.append([stack, role, str(len(members)), f"{size:,}", f"{100 * asked / size:.2f}", measured])
    return rows
