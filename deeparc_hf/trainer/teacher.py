"""The teacher in the life of a run: the model from before the first pruning, which teaches the smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..architectures import Layout
from ..checkpoint.record import PrunedConfig
from ..distillation.fused import is_sft
from ..distillation.loss import Distillation, make_teacher
from ..errors import ConfigError, SurgeryError
from ..healing.sites import sites_of
from ..pruning.config import MPruneConfig
from .machine import Progress
from .session import Session
from .snapshots import restore_weights

__all__ = ["Teaching", "removed_since"]


class Teaching:
    """Does nothing where the settings ask for no teacher."""

    def __init__(self, config: MPruneConfig, session: Session, progress: Progress) -> None:
        args = session.args
        self._config = config.distill
        self._session = session
        self._progress = progress
        self._teacher: nn.Module | None = None
        self._at_work: Distillation | None = None
        self._fused_head = self._config is not None and is_sft(args)
        if self._config is not None and args.label_smoothing_factor:
            raise ConfigError(
                "With label_smoothing_factor the Trainer computes the loss outside of the model, where the teacher's "
                "term cannot be added. Leave it out (the teacher's softened outputs do what it does), or leave distill "
                "out."
            )
        if self._config is not None and args.n_gpu > 1:
            raise ConfigError(
                f"One process with {args.n_gpu} GPUs copies the model for each step (DataParallel), which a teacher "
                "cannot follow. Start one process for each GPU (torchrun or accelerate launch), or leave distill out."
            )

    def begin(self, save: Callable[[], str]) -> None:
        """Have the model as it is before the first pruning teach from then on; `save` makes a snapshot, by its name."""
        if self._config is not None and self._progress.teacher is None:
            self._progress.teacher = save()
            self._teacher = make_teacher(self._session.model, self._config.dtype)

    def wake(self) -> None:
        """Make the teacher again, for a resumed run. The model has the structure that the run began with."""
        if self._config is None or self._progress.teacher is None:
            return
        teacher = make_teacher(self._session.model)
        restore_weights(self._session.folder, self._progress.teacher, teacher)
        self._teacher = make_teacher(teacher, self._config.dtype) if self._config.dtype else teacher

    def follow(self) -> None:
        """Teach the model as it is now; where nothing is missing there is nothing to teach."""
        self.stop()
        p = self._progress
        if self._config is None or p.teacher is None or p.record is None:
            return
        if self._teacher is None:
            raise SurgeryError(
                "The unpruned model teaches in this run, and the model was loaded in its smaller structure, from which "
                "the teacher cannot be made. Build the model as it was built when the run began, then resume."
            )
        step = removed_since(p.start, p.record)
        if step.removed:
            sites = [(site, step.places({site.stack: [site.kept]})[site.stack][0]) for site in sites_of(step.removed)]
            known = {"fused_head": self._fused_head}
            self._at_work = Distillation(self._session.model, self._teacher, self._config, sites, **known)

    def check(self) -> None:
        """Check, before each step of the optimizer, that the teacher's term has reached the weights."""
        if self._at_work is None:
            return
        if not self._at_work.reached:
            raise ConfigError(
                "The teacher's term has not reached the weights: this training does not learn from the loss that the "
                "model puts out (a compute_loss_func, an overridden compute_loss, or a batch without labels). Have it "
                "use the model's loss, or leave distill out."
            )
        self._at_work.reached = False

    def stop(self) -> None:
        """Leave the model as it was."""
        if self._at_work is not None:
            self._at_work.stop()
            self._at_work = None

    def forget(self) -> None:
        """Leave the model as it was, and let the teacher go."""
        self.stop()
        self._teacher = None


def removed_since(start: Mapping[str, Any] | None, now: Mapping[str, Any]) -> Layout:
    """Which blocks of the model that a run began with are left, by the records (None: it carried none)."""
    before = Layout({}, {}) if start is None else PrunedConfig.from_dict(start).layout
    return PrunedConfig.from_dict(now).layout.since(before)
