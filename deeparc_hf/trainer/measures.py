"""What each step of a pruning does to the model: its loss before, right after the removal, after healing, and after the
retraining.

The Trainer cannot be asked to evaluate between two steps, so the callback measures by itself: always on the same
samples, of the evaluation data where the Trainer has evaluated in this run, else of training data that no calibration
looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from ..core.progress_bars import shows_bars
from ..observe.quality import measure_quality
from ..observe.training_calibration import TrainingCalibration
from ..pruning.config import MPruneConfig
from .machine import Progress
from .session import Session

__all__ = ["Stages"]

EVALUATION, TRAINING = "evaluation data", "training data outside the calibration samples"
_BARS = {
    "before": "Measuring before the removal",
    "removed": "Measuring after the removal",
    "healed": "Measuring after the healing",
    "retrained": "Measuring after the training",
}
_LEAST = 32  # fewer samples tell nothing


class Stages:
    """Measures of one run; they are noted in the entry of the pruning at hand in its progress.

    Args:
        config: the settings; as many samples are taken as for a calibration.
        session: the training.
        progress: where the run stands.

    Attributes:
        evaluation: the Trainer's data loader of its first evaluation in this run; None before.
    """

    def __init__(self, config: MPruneConfig, session: Session, progress: Progress) -> None:
        self.evaluation: DataLoader | None = None
        self._config = config
        self._session = session
        self._size = session.args.eval_batch_size
        self._progress = progress
        self._bars = shows_bars(session.args)
        self._data = TRAINING  # which data the entries of the pruning at hand are of
        self._found: dict[str, Any] = {}

    def notice(self, loader: DataLoader | None, metrics: Mapping[str, Any]) -> None:
        """Take note of an evaluation. Those with a prefix of their own are of other data (a test set, say)."""
        if self.evaluation is None and any(key.startswith("eval_") for key in metrics):
            self.evaluation = loader

    def begin(self, step: int) -> None:
        """Measure the model before a pruning; where it has been measured as it is now, on the same data,
        that counts.
        """
        self._data = EVALUATION if self.evaluation is not None else TRAINING
        attempt = self._progress.attempts[-1]
        back = attempt.is_taken_back
        last = attempt.stages.get("before" if back else "retrained")
        same = last is not None and (back or last["step"] == step) and last["data"] == self._data
        same = same and self._session.zeroed_at != step  # zeroed since, it may be
        self._found = {"before": last} if same else {}
        if not same:
            self.measure("before", step)

    def measure(self, stage: str, step: int) -> None:
        """Measure the model as it is now."""
        source = self._source()
        if source is None:
            return
        bar = _BARS[stage] if self._bars else None
        with source.reading():
            found = measure_quality(self._session.model, source, bar)
        if found is not None:
            self._found[stage] = {**found, "data": self._data, "step": step}

    def end(self, step: int) -> None:
        """Measure the model after its retraining, once a step."""
        stages = self._progress.attempts[-1].stages
        if stages.get("retrained", {}).get("step") == step:
            return
        known = [value["data"] for value in stages.values()]
        self._data = known[0] if known else EVALUATION if self.evaluation is not None else TRAINING
        self._found = {}
        self.measure("retrained", step)
        stages.update(self._found)

    def take(self) -> dict[str, Any]:
        """What was measured since `begin`."""
        return dict(self._found)

    def _source(self) -> TrainingCalibration | None:
        if self._data == EVALUATION:
            return None if self.evaluation is None else self._samples_of(self.evaluation, 0)
        training, used = self._session.loader, self._config.calibration_samples
        source = None if training is None else self._samples_of(training, used)
        if source is None or not source.chooses or len(training.dataset) - used < _LEAST:
            return None
        return source

    def _samples_of(self, loader: DataLoader, skipped: int) -> TrainingCalibration:
        return TrainingCalibration(None, loader, self._size, self._config, skipped, model=self._session.model)
