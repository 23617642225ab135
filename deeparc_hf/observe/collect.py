"""What calibration passes found out about each stack, over all processes; refused where it is too little to rely on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..architectures import Host
from ..core.caller import warn_caller
from ..errors import CalibrationError, CalibrationWarning
from ..similarity import BlockMetric
from ..similarity.base import add_to
from .batches import batch_size
from .calibration import Calibration
from .forward import evaluating

__all__ = ["Observed", "Observer", "collect", "note_first", "require_finite"]

_FEW_SAMPLES = 32


@dataclass(frozen=True)
class Observed:
    """What one process saw of one stack; what several saw can be put together.

    Attributes:
        sums: the metric's sums (`BlockMetric.finish`), on the CPU.
        count: number of rows.
        constant: blocks (by index) or outputs of the model (by name) whose rows were all equal, with that row (shape
            (D,)).
        unmasked: whether padding was compared.
        obstacle: why the stack could not be compared; None if it could.
        batch: samples of the largest batch, where the sums depend on the batch size; else 0.
    """

    sums: Mapping[str, Tensor]
    count: int
    constant: Mapping[int | str, Tensor]
    unmasked: bool = False
    obstacle: str | None = None
    batch: int = 0

    @staticmethod
    def merged(parts: Sequence[Observed]) -> Observed:
        """The sum of several; what is constant put out one and the same row in all of them."""
        obstacle = next((part.obstacle for part in parts if part.obstacle is not None), None)
        if obstacle is not None:
            return Observed({}, 0, {}, obstacle=obstacle)
        parts = [part for part in parts if part.count] or list(parts[:1])
        sums: dict[str, Tensor] = {}
        for part in parts:
            add_to(sums, part.sums)
        first = parts[0].constant
        constant = {
            i: row
            for i, row in first.items()
            if all(i in p.constant and torch.equal(p.constant[i], row) for p in parts)
        }
        count, unmasked = sum(part.count for part in parts), any(part.unmasked for part in parts)
        return Observed(sums, count, constant, unmasked, batch=max(part.batch for part in parts))


class Observer(Protocol):
    """What looks at one stack, or at several together, in calibration passes, for a metric.

    Attributes:
        name: of the stack, or of the stacks.
        metric: takes what is seen.
    """

    name: str
    metric: BlockMetric

    def label(self, key: int | str) -> str:
        """What a key of `Observed.constant` stands for, as messages begin with it."""

    def observed(self) -> Observed:
        """What was seen."""


def collect(
    host: Host,
    observers: Sequence[Observer],
    calibration: Calibration,
    passes: Callable[[], Generator[Mapping[str, Any]]],
    title: str,
    progress: bool,
) -> tuple[int, list[Observed]]:
    """Look at calibration data in every process, and put together what they saw.

    Args:
        observers: one a stack.
        passes: shows the data of this process to the observers, and gives each batch once that is done.
        title: of the progress bar.

    Returns:
        The number of samples, and what was seen of each stack, over all processes.

    Raises:
        CalibrationError: if that is too little, or something put out the same for every sample.
    """

    def look() -> tuple[int, list[Observed]]:
        seen = 0
        # closed at once, whatever happens: its hooks must not wait for a traceback to be forgotten
        with evaluating(host.root), calibration.bar(title, progress) as advance, closing(passes()) as batches:
            for inputs in batches:
                seen += batch_size(inputs)
                advance(batch_size(inputs))
        return seen, [observer.observed() for observer in observers]

    parts = calibration.together(look)
    seen = sum(part[0] for part in parts)
    found = [Observed.merged([part[1][i] for part in parts]) for i in range(len(observers))]
    # processes with fewer rows each than the metric needs have no sums, however many rows they have together
    rows = [
        sum(part[1][i].count for part in parts if part[1][i].sums or len(parts) == 1) for i in range(len(observers))
    ]
    _require_enough(observers, found, rows, seen)
    return seen, found


def note_first(first: dict[Any, Tensor | None], key: int | str, rows: Tensor) -> None:
    """Keep the first row that a block or an output gives, as long as all others are equal to it; then None."""
    row = first.setdefault(key, rows[0].clone()) if len(rows) else None
    if row is not None and bool((rows != row).any()):
        first[key] = None


def require_finite(values: Tensor, who: str, dtype: torch.dtype, what: str) -> None:
    """Refuse NaN and infinity among what `who` puts out; `what` names the dtype, and whose it is."""
    if not bool(torch.isfinite(values).all()):
        hint = "Load it in float32 or bfloat16." if dtype == torch.float16 else "Check its weights and the inputs."
        raise CalibrationError(f"{who} puts out NaN or infinity on the calibration data ({what}). {hint}")


def _require_enough(observers: Sequence[Observer], found: list[Observed], rows: list[int], seen: int) -> None:
    if seen == 0:
        raise CalibrationError(
            "The calibration data gave no samples. Give a dataloader that is not empty; an iterator can be used only "
            "once."
        )
    if seen == 1:
        raise CalibrationError(
            "There is only 1 calibration sample, and what is alike on one need not be alike on others. Give some "
            "hundreds of samples."
        )
    if all(observed.obstacle is not None for observed in found):
        raise CalibrationError(
            f"The blocks of {observers[0].name} cannot be compared: {found[0].obstacle}. Name the blocks to "
            "remove yourself, with remove_blocks, or take similarity='effect', which looks at what the model puts out."
        )
    for observer, observed, count in zip(observers, found, rows, strict=True):
        if observed.obstacle is not None:
            continue
        constant, stack, least = sorted(observed.constant), observer.name, observer.metric.min_rows
        if 0 < observed.batch < least:
            raise CalibrationError(
                f"The calibration batches have at most {observed.batch} sample(s), and rows='flat' compares blocks "
                f"within each batch: {observer.metric.name} needs at least {least} in one. Give batches of 64, say."
            )
        if count < least:
            raise CalibrationError(
                f"{seen} calibration samples gave {count} row(s) for {stack}; {observer.metric.name} needs at least "
                f"{least}, and some hundreds for a result to rely on. Give more samples."
            )
        if constant:
            raise CalibrationError(
                f"{observer.label(constant[0])} puts out the same for every calibration sample, so it cannot be "
                "compared. Check that the samples differ and that the weights are loaded."
            )
        if observed.unmasked:
            warn_caller(
                f"Which positions of {stack} are padding cannot be told from the attention_mask, so padding was "
                "compared like the rest. Give calibration samples of equal length.",
                CalibrationWarning,
            )
    if seen < _FEW_SAMPLES:
        warn_caller(
            f"Blocks were compared on only {seen} samples: the similarities are rough. Give some hundreds of samples.",
            CalibrationWarning,
        )
