"""Figures of prunings in the Trainer's own logs: its log history, and the trackers of `report_to`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import default_logdir, get_reporting_integration_callbacks

__all__ = ["Trackers"]


class Trackers:
    """Logs figures as `Trainer.log` does.

    A callback cannot call `Trainer.log`, so the trackers are met through transformers' own reporting callbacks, which
    join the run that is open.
    """

    def __init__(self) -> None:
        self._callbacks: list[TrainerCallback] | None = None

    def log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        figures: Mapping[str, float],
    ) -> None:
        """Add figures to the log history, and send them to every tracker."""
        logs: dict[str, Any] = dict(figures)
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        if self._callbacks is None:
            self._callbacks = [cls() for cls in get_reporting_integration_callbacks(args.report_to)]
            for callback in self._callbacks:
                if getattr(callback, "logging_dir", "") is None:
                    callback.logging_dir = _logging_dir(args)  # type: ignore[attr-defined]
        for callback in self._callbacks:
            callback.on_log(args, state, control, model=model, logs=dict(logs))

    def close(self) -> None:
        """Have what was logged written to the disk."""
        for callback in self._callbacks or ():
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.close()


def _logging_dir(args: TrainingArguments) -> str:
    """TensorBoard's folder of this training: the one that the Trainer's own callback has made when the training
    began.
    """
    made = sorted(Path(args.output_dir, Path(default_logdir()).parent).glob("*"), key=lambda path: path.stat().st_mtime)
    return str(made[-1]) if made else str(Path(args.output_dir, default_logdir()))
