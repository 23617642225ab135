"""Weight sparsity in the life of a Trainer: zero the weights, train on, and keep the zeros."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..architectures import describe
from ..architectures.adapters import is_adapted
from ..checkpoint.record import check_record
from ..errors import ConfigError, UnsupportedModelError
from ..observe.training_calibration import calibration_of
from ..sparsity.config import WandaConfig
from ..sparsity.methods import methods
from ..sparsity.report import SparsityReport
from ..sparsity.sparsify import matrices_for
from .callback import SessionCallback
from .link import Link
from .session import Session
from .sharded import is_sharded
from .sparsity_run import SparsityProgress, SparsityRun

__all__ = ["WandaCallback"]


class WandaCallback(SessionCallback):
    """Zeroes the weights that matter least while a Trainer trains, and keeps them zero for the rest of the training.

    After `start_epoch` epochs (0: when the training begins) the inputs of the linear maps are measured on
    `calibration_samples` samples of the training data, chosen at random with the config's seed, and weights are zeroed
    as by `sparsify_model`; the training itself is not disturbed. With start_epoch of 1 or more, where the Trainer
    evaluates at all, it does so right before and right after, and the report shows both. Afterwards the zeros are
    restored after each step of the optimizer, whatever it is, and checked at the end of every epoch. Masks take one
    byte for each weight of the matrices.

    On a model whose record lists zeros (a sparse checkpoint that was downloaded) these are kept from the first step on,
    and `WandaCallback()` without settings does just that.

    With `MPruneCallback` beside it, in either order, each does its own by its own start_epoch; in the same epoch
    zeroing comes first (with start_epoch=0 the one that is listed first). Where a pruning may still be taken back
    (max_drop), zeroing waits for the last verdict, without an evaluation of its own, and the training then goes on to
    its end.

    `resume_from_checkpoint` works from any checkpoint. The output folder gets `sparsity_report.json` and `.md`; the
    record goes into the model's config, and so into every checkpoint.

    Args:
        config: the settings.
        calibration: other data to measure the inputs on: whatever the Trainer takes as train_dataset (collated as the
            training data is, without columns that the Trainer would leave out), or an iterable of batches. It is needed
            where the training data can be read once only, or where its batches are not what the model's forward takes.
            Never the data that you evaluate on.
        settings: settings by keyword, instead of `config` or on top of it: `WandaCallback(sparsity=0.3)`.

    Attributes:
        report: what was asked for and measured when the weights were zeroed in the last run; None before.

    Raises:
        UnsupportedModelError: when the Trainer is made, if the weights of its model cannot be zeroed one by one.
        ConfigError: when training begins, if it does not reach start_epoch.
        CalibrationError: when training begins, if the calibration data cannot serve: one batch is tried.
        RecordError: when training begins, if the record lists zeros that the model does not have.
        SparsityError: at the end of an epoch, and at every evaluation, if zeroed weights are not zero any more.
    """

    _run: SparsityRun | None

    def __init__(
        self,
        config: WandaConfig | None = None,
        *,
        calibration: Dataset[Any] | Iterable[Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(calibration)
        self.config = WandaConfig.from_settings(config, settings)
        self.report: SparsityReport | None = None
        self.asked = config is not None or bool(settings.keys() - {"keep_zeros"})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback, in trainer_state.json."""
        progress = None if self._run is None else self._run.saved()
        return {"args": self.config.to_dict(), "attributes": {"asked": self.asked, "saved_progress": progress}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> WandaCallback:
        """The callback that a checkpoint kept (`restore_callback_states_from_checkpoint`), without calibration data."""
        callback = cls(WandaConfig.from_dict(state["args"]))
        callback.asked = bool(state["attributes"].get("asked", True))
        callback.saved_progress = state["attributes"].get("saved_progress")
        return callback

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._run = self.session = None  # an interrupted run of another Trainer may have left them
        model = kwargs.get("model")
        if Link.of_environment() is not None:
            raise ConfigError(
                "Weights are zeroed after a chain of trainings, not in its links: leave WandaCallback out, and run "
                "deeparc sparsify on the model that the chain ends with."
            )
        if is_sharded(args):
            raise UnsupportedModelError(
                "The parameters of this run will be sharded (FSDP, DeepSpeed), and no process would see whole rows of "
                "a matrix. Train in DistributedDataParallel, or without WandaCallback and call sparsify_model "
                "afterwards."
            )
        if model is None:
            return
        if is_adapted(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} carries PEFT adapters: the matrices beneath them are not trained, so their "
                "zeros stay without this callback. Leave it out, and merge the adapters with "
                "deeparc_hf.sparsity.adapters.merge_keeping_zeros(model) afterwards."
            )
        subject = describe(model)
        check_record(subject, 0)
        if self.asked or not (subject.host.record() or {}).get("sparsity"):
            matrices_for(subject, self.config)  # what is not supported is refused before any work is done

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            raise ConfigError(
                "There is more than one WandaCallback in this Trainer. Leave one, or call sparsify_model before the "
                "training."
            )
        progress, began_with = SparsityProgress(), None
        if state.global_step > 0:
            settings, saved = self._saved(state)
            if saved:
                progress, began_with = SparsityProgress.from_dict(saved), settings
        elif self._run is not None and not self._run.ended and self._run.session.model is kwargs["model"]:
            # auto_find_batch_size begins the same run again, with weights that may be zeroed already
            progress = replace(self._run.progress, evaluations=[], measured=[])
            if progress.step is not None:
                progress.step, progress.epoch = 0, 0.0
        self.session = session = Session.of(state) or Session(args, state, control, kwargs)
        calibration = None
        if methods.get(self.config.method).needs_inputs:
            calibration = calibration_of(self.calibration, self.config, args, state, kwargs)
        run = SparsityRun(self.config, self.asked, calibration, session, progress)
        run.begin(began_with)
        session.members.append(run)
        self._run, self.report = run, run.report

    def _publish(self) -> None:
        if self._run is not None:
            self.report = self._run.report or self.report
