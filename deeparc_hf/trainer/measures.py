"""What each step of a pruning does to the model's loss. The Trainer cannot be asked to evaluate between two steps, so
the callback measures: on evaluation data where the Trainer has evaluated, else on training data that no calibration
looks at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    """Measures of one run, on as many samples as a calibration takes; those of the retraining are noted at the pruning
    at hand in its progress.
    """

    def __init__(self, config: MPruneConfig, session: Session, progress: Progress) -> None:
        self._config = config
        self._session = session
        self._progress = progress
        self._data = TRAINING  # which data the entries of the pruning at hand are of
        self._found: dict[str, Any] = {}

    def begin(self, step: int) -> None:
        """Measure the model before a pruning; where it has been measured as it is now, on the same data,
        that counts.
        """
        self._data = self._best_data()
        attempt = self._progress.attempts[-1]
        back = attempt.is_taken_back
        last = attempt.stages.get("before" if back else "retrained")
        same = last is not None and (back or last["step"] == step) and last["data"] == self._data
        same = same and self._session.zeroed_at != step  # zeroed since, it may be
        self._found = {"before": last} if same else {}
        if not same:
            self.measure("before", step)

    def after(self, known: Mapping[str, Any], stage: str, step: int) -> dict[str, Any]:
        """What was measured before a pruning, with a measure of the model that it has made, on the same data."""
        if known:
            self._data, self._found = known["before"]["data"], dict(known)
            self.measure(stage, step)
        return self.take() if known else {}

    def known_before(self) -> dict[str, Any]:
        """What was measured before the pruning that was taken back last."""
        stages = self._progress.attempts[-1].stages
        return {"before": stages["before"]} if "before" in stages else {}

    def measure(self, stage: str, step: int) -> None:
        """Measure the model as it is now."""
        session, loader, skipped = self._session, self._session.evaluations.loader, 0
        if self._data == TRAINING:
            loader, skipped = session.loader, self._config.calibration_samples
        if loader is None:
            return
        size = session.args.eval_batch_size
        source = TrainingCalibration(None, loader, size, self._config, skipped, model=session.model)
        if self._data == TRAINING and (not source.chooses or len(loader.dataset) - skipped < _LEAST):
            return
        with source.reading():
            found = measure_quality(session.model, source, _BARS[stage] if shows_bars(session.args) else None)
        if found is not None:
            self._found[stage] = {**found, "data": self._data, "step": step}

    def end(self, step: int) -> None:
        """Measure the model after its retraining, once a step."""
        stages = self._progress.attempts[-1].stages
        if stages.get("retrained", {}).get("step") == step:
            return
        known = [value["data"] for value in stages.values()]
        self._data, self._found = known[0] if known else self._best_data(), {}
        self.measure("retrained", step)
        stages.update(self._found)

    def take(self) -> dict[str, Any]:
        """What was measured since `begin`."""
        return dict(self._found)

    def _best_data(self) -> str:
        return TRAINING if self._session.evaluations.loader is None else EVALUATION
