"""Where a training with weights zeroed in it stands: all that a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import RecordError
from ..sparsity.report import SparsityReport
from .saved import Saved

__all__ = ["KEPT", "SPARSE", "WAITING", "SparsityProgress"]

WAITING, KEPT, SPARSE = "waiting", "kept", "sparse"


@dataclass
class SparsityProgress(Saved):
    """Where a run stands: all that a resumed run needs. JSON types only; lives in the Trainer's trainer_state.json.

    Attributes:
        phase: WAITING for its epoch, KEPT (the zeros of the checkpoint that training began with are kept), or SPARSE.
        step, epoch: when the weights were zeroed.
        sparsity: what the model's record says of zeroed weights.
        report: what was asked for and measured when they were zeroed (`SparsityReport.to_dict`).
        asked: whether a sparsification was asked for; None: not settled yet.
        evaluations: step, epoch, whether the weights were zeroed, and metrics.
        measured: step, epoch and share of zeros at the end of each epoch since.
    """

    phase: str = WAITING
    step: int | None = None
    epoch: float | None = None
    sparsity: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    asked: bool | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Any) -> SparsityProgress:
        """The inverse of `to_dict`.

        Raises:
            RecordError: if the data is not a progress, or was written by another version of this package.
        """
        fields = cls.fields_of(data)
        if fields is None or not _sound(fields):
            raise RecordError(
                "The checkpoint's trainer_state.json does not tell what was zeroed, or another version of deeparc_hf "
                "wrote it. Resume with the version that wrote it, or start a new run from the checkpoint's model."
            )
        return cls(**fields)


def _sound(fields: Mapping[str, Any]) -> bool:
    """Whether the fields hold what they are to hold."""
    lists = all(isinstance(fields[name], list) for name in ("evaluations", "measured"))
    if fields["phase"] not in (WAITING, KEPT, SPARSE) or not lists:
        return False
    try:
        return fields["report"] is None or SparsityReport.from_dict(fields["report"]) is not None
    except (KeyError, TypeError, ValueError, AttributeError):
        return False
