"""Similarity pruning in the life of a Trainer: fine-tune, prune, retrain, judge, and prune again or take it back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..checkpoint.record import PrunedConfig, check_record, same_structure
from ..core.compat import calling_trainer
from ..errors import ConfigError, DeepArcWarning, SurgeryError
from ..observe.calibration import calibration_of
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..reports.phases import FINISHED, RETRAINING
from .follow_checkpoint import guard, guard_successors, record_of, thaw_noted
from .gate import check_measured, pruned_untrained
from .model_copies import refuse_copies, warn_of_copies
from .pruning_run import PruningRun
from .schedule import Progress, needed_epochs
from .session import companions_on, meet_companions
from .sharded import is_sharded, prune_before_sharding
from .write_card import tell_to_keep_card, write_card

__all__ = ["MPruneCallback"]


class MPruneCallback(TrainerCallback, ExportableState):
    """Removes redundant blocks while a Trainer trains: the whole algorithm in one `trainer.train()`.

    After `start_epoch` epochs the blocks are compared on `calibration_samples` samples of the training data, chosen at
    random with the config's seed, and the redundant ones are removed; the training itself is not disturbed (random
    states, data order, modes and what the data set, the collator and the sampler keep are restored), and the optimizer
    follows. `retrain_epochs` epochs later the pruning is accepted, and the next of `iterations` follows. With
    `max_drop` it is judged first: if the metric got worse by more, the weights from before the pruning come back, bit
    for bit, and the next larger stride up to `k_max` is tried (with a threshold it removes less, with a target as many
    blocks, but others). The training ends on the last accepted model, and says what was lost and won.

    Prunings happen when an epoch begins, after the last evaluation and checkpoint of the old structure.
    `resume_from_checkpoint` works from any checkpoint, with the model built as it was when the run began (with
    `keep_snapshots` also where the run has ended well and the checkpoint needs a snapshot). The output folder gets
    `pruning_plan.json` (the last plan) and the run's report, `pruning_report.json` and `.md`; the record goes into the
    model's config, and so into every checkpoint.

    Several processes (DistributedDataParallel) share the calibration and take one decision. Where parameters are
    sharded (FSDP, DeepSpeed), one pruning is possible, when the Trainer is made: give `calibration`, and leave
    start_epoch, iterations and max_drop alone.

    Args:
        config: the settings.
        calibration: other data to compare blocks on: whatever the Trainer takes as train_dataset (collated as the
            training data is, without columns that the Trainer would leave out), or an iterable of batches. Needed where
            the training data can be read once only, or where its batches are not what the model's forward takes. Never
            the data that you evaluate on.
        settings: settings by keyword, instead of `config` or on top of it: `MPruneCallback(threshold=0.98)`.

    Attributes:
        plan: the last plan that was carried out in the last run and not taken back; None before.
        record: the record of the model after it, earlier prunings included; None if it carries none.
        attempts: the figures of the report, one entry for the model before the first pruning and for each pruning.

    Raises:
        UnsupportedModelError: when the Trainer is made, if its model cannot be pruned.
        ConfigError: when training begins, if it is too short for the schedule (the message says how long it must be),
            if the gate cannot measure its metric, or if another callback keeps a copy of the model in step; at the
            first evaluation, if the metric is not among what it measures.
        CalibrationError: when training begins, if the calibration data cannot serve: one batch is tried.
        PlanError: when training begins, if a name in the settings matches nothing, or a target cannot be reached with
            the blocks that the model's settings allow to remove.
        SurgeryError: when training begins, if the settings of the model allow no removal at all, on a sharded model,
            and where a checkpoint is resumed that does not fit.
    """

    def __init__(
        self,
        config: MPruneConfig | None = None,
        *,
        calibration: Dataset[Any] | Iterable[Any] | None = None,
        **settings: Any,
    ) -> None:
        self.config = MPruneConfig.from_settings(config, settings)
        self.calibration = calibration
        self.plan: PruningPlan | None = None
        self.record: PrunedConfig | None = None
        self.saved_progress: dict[str, Any] | None = None  # as a checkpoint keeps it
        self._run: PruningRun | None = None
        self._others: list[TrainerCallback] = []  # in the same Trainer
        self._sharded: Progress | None = None  # what was done before parameters were sharded

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of the settings, not of a training."""
        return {**self.__dict__, "_run": None, "_others": []}

    @property
    def attempts(self) -> list[dict[str, Any]]:
        progress = self._run.progress if self._run is not None else None
        return [] if progress is None else progress.attempts

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback, in trainer_state.json."""
        if self._run is not None:
            self._run.operations.note_zeros()
        now = self._sharded if self._run is None else self._run.progress
        progress = None if now is None else now.to_dict()
        return {"args": self.config.to_dict(), "attributes": {"saved_progress": progress}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> MPruneCallback:
        """The callback that a checkpoint kept (`restore_callback_states_from_checkpoint`); calibration data is not
        among it.
        """
        callback = cls(MPruneConfig.from_dict(state["args"]))
        callback.saved_progress = state["attributes"].get("saved_progress")
        return callback

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._run = None  # an interrupted run of another Trainer may have left it
        model = kwargs.get("model")
        if model is None:
            return
        check_record(model, self.config.iterations)  # what is not supported is refused before any work is done
        trainer = calling_trainer()
        if trainer is not None:
            guard(model, args.output_dir, kwargs.get("optimizer"), trainer)
            if getattr(trainer, "model_init", None) is not None:
                guard_successors(model, trainer, args.output_dir)
        thaw_noted(model)  # what an earlier training of this model froze: the optimizer is made before this one begins
        if is_sharded(args) and self.calibration is not None:
            doubt = pruned_untrained(self.config, model)
            if doubt is not None:
                warnings.warn(doubt, DeepArcWarning, stacklevel=2)
            self.plan = prune_before_sharding(
                model, self.config, self.calibration, args, kwargs.get("processing_class")
            )
            self.record = record_of(model)
            record = None if self.record is None else self.record.to_dict()
            self._sharded = Progress(k=self.config.k, phase=FINISHED, accepted=1, record=record)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_sharded(args):
            if self._sharded is None:
                raise SurgeryError(
                    "The parameters of this run are sharded (FSDP or DeepSpeed) when training begins, and blocks "
                    "cannot be taken out then. Give MPruneCallback(calibration=...), so that it prunes when the "
                    "Trainer is made, or call prune_model(model, dataloader, config) before the Trainer is made and "
                    "leave the callback out."
                )
            if state.global_step > 0 and self._saved(state).record != self._sharded.record:
                raise SurgeryError(
                    "The model was pruned otherwise than the one in the checkpoint that is resumed. Make the Trainer "
                    "with the model, the calibration data and the settings that the run began with."
                )
            return
        if isinstance(state.stateful_callbacks.get(type(self).__name__), list):
            raise ConfigError(
                "There is more than one MPruneCallback in this Trainer. One does all iterations: give it iterations=..."
            )
        trainer = calling_trainer()
        self._others = []
        if trainer is not None:
            # the optimizer stays when this Trainer trains again
            guard(kwargs["model"], args.output_dir, kwargs.get("optimizer"), trainer)
            self._others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
            refuse_copies(self._others)
            check_measured(self.config, args, trainer)
        companions = meet_companions(kwargs["model"], state)
        companions.prunes = True
        if self.config.gated:
            companions.pruning_starts, companions.judged_after = self.config.start_epoch, needed_epochs(self.config)
        calibration = calibration_of(self.calibration, self.config, args, state, kwargs)
        before = self._run
        progress = self._progress(kwargs["model"], state)
        self._run = None  # until the new one has begun
        if before is not None:
            before.operations.teaching.stop()
        run = PruningRun(self.config, calibration, args, kwargs, progress)
        if state.global_step > 0:
            run.resume(state, control, self._saved_state(state).get("args", {}))
        else:
            run.begin(state, before if before is not None and before.progress is progress else None)
        self._run = run
        self._publish()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            if (
                self._others
                and self._run.progress.phase != FINISHED
                and warn_of_copies(self._others, self._run.operations.subject)
            ):
                self._others = []  # they have been told of
            self._run.epoch_begin(state, control)
            self._publish()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.step_begin()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.operations.teaching.check()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.step_end(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.epoch_end(state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._run is None:
            return
        loader, metrics = kwargs.get("eval_dataloader"), kwargs.get("metrics") or {}
        if not self._run.ended:
            self._run.stages.notice(loader, metrics)
            self._run.journal.facts.notice(metrics, loader)
            self._run.evaluated(state, control, metrics, loader)
            self._publish()
        elif kwargs.get("model") is self._run.model:
            self._run.journal.conclude_with(metrics, loader)
            self._publish()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            write_card(args, state, control, kwargs.get("model"), kwargs.get("processing_class"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._run is not None:
            self._run.end(state, control)
            self._publish()
            tell_to_keep_card(args, self._run.model)

    def _progress(self, model: Any, state: TrainerState) -> Progress:
        """Where the run stands: at its beginning, where a checkpoint says, or where auto_find_batch_size begins it
        again.
        """
        if state.global_step > 0:
            return self._saved(state)
        run = self._run
        if run is not None and not run.ended and run.model is model and run.progress.phase == RETRAINING:
            then = None if run.progress.record is None else PrunedConfig.from_dict(run.progress.record)
            if same_structure(record_of(run.operations.subject), then):
                return run.progress
        return Progress(k=self.config.k)

    def _saved(self, state: TrainerState) -> Progress:
        """Where the run stood when the checkpoint was saved."""
        attributes = self._saved_state(state).get("attributes", {})
        if not attributes.get("saved_progress"):
            raise SurgeryError(
                "The run that is resumed began without MPruneCallback, so it is not known what was pruned when. Load "
                "the model from the checkpoint's folder and start a new run with the callback, or resume without it."
            )
        return Progress.from_dict(attributes["saved_progress"])

    def _saved_state(self, state: TrainerState) -> dict[str, Any]:
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        return saved if isinstance(saved, dict) else {}

    def _publish(self) -> None:
        if self._run is not None:
            self.plan = self._run.operations.plan
            record = self._run.progress.record
            self.record = None if record is None else PrunedConfig.from_dict(record)
            companions_on(self._run.model).may_be_taken_back = self._run.may_be_taken_back
