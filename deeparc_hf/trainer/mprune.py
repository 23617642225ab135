"""Similarity pruning in the life of a Trainer: fine-tune, prune, retrain, judge, and prune again or take it back."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..checkpoint.record import PrunedConfig, check_record, same_structure
from ..core.caller import warn_caller
from ..core.compat import calling_trainer
from ..errors import ConfigError, SurgeryError
from ..observe.training_calibration import calibration_of
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..search.search import check_search
from .callback import SessionCallback
from .follow_adapters import note_structure
from .follow_checkpoint import guard, guard_successors, record_of, thaw_noted
from .gate import check_measured
from .link import Link
from .linked_run import LinkedRun, prepare_link
from .machine import Phase, Progress
from .model_copies import refuse_copies, warn_of_copies
from .pruning_run import PruningRun
from .session import Session
from .sharded import is_sharded, prune_before_sharding
from .untrained import pruned_untrained

__all__ = ["MPruneCallback"]


class MPruneCallback(SessionCallback):
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
    sharded (FSDP2, DeepSpeed), `deeparc run` launches the script as a chain of trainings, and prunes in between.
    Without it one pruning is possible, when the Trainer is made: give `calibration`, and leave start_epoch, iterations
    and max_drop alone.

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

    _run: PruningRun | None
    _link: Link | None = None  # of a chain of trainings, which this process was launched for
    _doubt: str | None = None

    def __init__(
        self,
        config: MPruneConfig | None = None,
        *,
        calibration: Dataset[Any] | Iterable[Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(calibration)
        self.config = MPruneConfig.from_settings(config, settings)
        if self.config.search is not None:
            check_search(self.config)
        self.plan: PruningPlan | None = None
        self.record: PrunedConfig | None = None
        self._sharded: Progress | None = None  # what was done before parameters were sharded

    @property
    def attempts(self) -> list[dict[str, Any]]:
        attempts = [] if self._run is None else self._run.progress.attempts
        return [attempt.to_dict() for attempt in attempts]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback, in trainer_state.json."""
        if self._run is not None:
            self._run.operations.note_zeros()
        now = self._sharded if self._run is None else self._run.progress
        attributes = {"saved_progress": None if now is None else now.to_dict()}
        return {"args": self.config.to_dict(), "attributes": attributes}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> MPruneCallback:
        """The callback that a checkpoint kept (`restore_callback_states_from_checkpoint`), without calibration data."""
        callback = cls(MPruneConfig.from_dict(state["args"]))
        callback.saved_progress = state["attributes"].get("saved_progress")
        return callback

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._run is not None:  # an interrupted run of another Trainer may have left it
            self._run.operations.teaching.forget()
        self._run = self.session = None
        self._link = Link.of_environment()
        model = kwargs.get("model")
        if model is None:
            return
        if self._link is not None:
            self._doubt = prepare_link(self._link, self.config, calling_trainer())
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
                warn_caller(doubt)
            collating = kwargs.get("processing_class")
            self.plan = prune_before_sharding(model, self.config, self.calibration, args, collating)
            self.record = record_of(model)
            record = None if self.record is None else self.record.to_dict()
            self._sharded = Progress(k=self.config.k, phase=Phase.DONE, goes_on=False, accepted=1, record=record)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if is_sharded(args) and self._link is None:
            if self._sharded is None:
                raise SurgeryError(
                    "The parameters of this run are sharded (FSDP or DeepSpeed) when training begins, and blocks "
                    "cannot be taken out then. Have `deeparc run` launch this script, which carries the prunings out "
                    "between trainings; or give MPruneCallback(calibration=...), so that it prunes once, when the "
                    "Trainer is made; or call prune_model(model, dataloader, config) before the Trainer is made and "
                    "leave the callback out."
                )
            if state.global_step > 0 and self._saved_progress(state).record != self._sharded.record:
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
        self._others = ()
        if trainer is not None:
            if self._link is None:  # the optimizer stays when this Trainer trains again
                guard(kwargs["model"], args.output_dir, kwargs.get("optimizer"), trainer)
            self._others = [callback for callback in trainer.callback_handler.callbacks if callback is not self]
            refuse_copies(self._others)
            check_measured(self.config, args, trainer)
        self.session = session = Session.of(state) or Session(args, state, control, kwargs)
        again = self.config.iterations > 1 or self.config.heal is not None
        calibration = calibration_of(self.calibration, self.config, args, state, kwargs, again)
        before = self._run
        progress = self._progress(kwargs["model"], state)
        self._run = None  # until the new one has begun
        if before is not None:
            before.operations.teaching.stop()
        if self._link is None:
            run = PruningRun(self.config, calibration, session, progress)
        else:
            run = LinkedRun(self.config, calibration, session, progress, self._link, trainer, self._doubt)
        if state.global_step > 0:
            run.resume(self._saved(state)[0])
        else:
            run.begin(before if before is not None and before.progress is progress else None)
        session.members.append(run)
        self._run = run
        self._publish()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run = self._run
        waits = run is not None and not run.progress.is_over
        if waits and self._others and warn_of_copies(self._others, run.session.subject):
            self._others = ()  # they have been told of
        super().on_epoch_begin(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if isinstance(self._run, LinkedRun):
            self._run.checkpoint_saved()
        elif self.session is not None and args.should_save:
            note_structure(self.session.subject, Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def _progress(self, model: Any, state: TrainerState) -> Progress:
        """Where the run stands: at its beginning, as a checkpoint says, or as auto_find_batch_size begins it again."""
        if state.global_step > 0:
            return self._saved_progress(state)
        if self._link is not None and self._link.standing.progress is not None:
            return Progress.from_dict(self._link.standing.progress)
        run = self._run
        if run is not None and not run.ended and run.session.model is model and run.progress.in_retraining:
            then = None if run.progress.record is None else PrunedConfig.from_dict(run.progress.record)
            if same_structure(record_of(run.session.subject), then):
                return run.progress
        return Progress(k=self.config.k)

    def _saved_progress(self, state: TrainerState) -> Progress:
        """Where the run stood when the checkpoint was saved."""
        progress = self._saved(state)[1]
        if not progress:
            raise SurgeryError(
                "The run that is resumed began without MPruneCallback, so it is not known what was pruned when. Load "
                "the model from the checkpoint's folder and start a new run with the callback, or resume without it."
            )
        return Progress.from_dict(progress)

    def _publish(self) -> None:
        if self._run is not None:
            self.plan, record = self._run.operations.plan, self._run.progress.record
            self.record = None if record is None else PrunedConfig.from_dict(record)
