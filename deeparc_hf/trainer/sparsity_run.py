"""One training with weights zeroed in it: when, by what, and that they stay zero."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..architectures import Subject, describe
from ..checkpoint.record import PrunedConfig, current_record
from ..checkpoint.weights_mark import mark_of_model
from ..core.distributed import gather
from ..core.environment import package_versions
from ..core.files import finite, write_whole
from ..core.progress_bars import shows_bars
from ..errors import ConfigError, DeepArcWarning, RecordError, SparsityError
from ..observe.calibration import Calibration
from ..sparsity.config import WandaConfig
from ..sparsity.keep_zeros import Zeros
from ..sparsity.report import SparsityReport
from ..sparsity.sparsify import recorded_mask, recorded_matrices, sparsify
from .ending import NEXT, last_evaluation, metrics_of, value_text
from .gate import steps_per_epoch
from .rehearsal import rehearse
from .run_facts import RunFacts
from .session import meet_companions
from .sparsity_progress import KEPT, SPARSE, WAITING, SparsityProgress
from .sparsity_reporter import SPARSITY_REPORT, run_markdown
from .trackers import Trackers

__all__ = ["SparsityRun"]


class SparsityRun:
    """The sparsification of one training.

    Args:
        config: the settings.
        asked: whether a sparsification was asked for; otherwise a model that is sparse already is only kept so.
        calibration: where the calibration batches come from; None where none are needed.
        args: the Trainer's arguments.
        event: what the Trainer hands to a callback: model, train_dataloader.
        progress: where the run stands.
        state: the Trainer's state.
    """

    def __init__(
        self,
        config: WandaConfig,
        asked: bool,
        calibration: Calibration | None,
        args: TrainingArguments,
        event: Mapping[str, Any],
        progress: SparsityProgress,
        state: TrainerState,
    ) -> None:
        self.config = config
        self.args = args
        self.model: nn.Module = event["model"]
        self._subject = describe(self.model)
        self.progress = progress
        self.report = None if progress.report is None else SparsityReport.from_dict(progress.report)
        self.ended = False
        self._calibration = calibration
        self._steps_per_epoch = steps_per_epoch(event.get("train_dataloader"), args)
        self._zeros = Zeros()
        self._trackers = Trackers()
        self.facts = RunFacts(args, event.get("train_dataloader"))
        if progress.asked is None:
            progress.asked = asked or self._record().sparsity is None
        self._seen_back = 0  # prunings that had been taken back when the masks were made
        self._save_later = False
        self._keeping = False
        self._companions = meet_companions(self.model, state)
        self._companions.sparsity_to_come = self.to_come
        self._companions.keeps_zeros = config.keep_zeros

    @property
    def to_come(self) -> bool:
        """Whether weights are still to be zeroed."""
        return self.progress.phase == WAITING and bool(self.progress.asked)

    # ---- events ----

    def begin(self, state: TrainerState, optimizer: Any, began_with: Mapping[str, Any] | None = None) -> None:
        """Check that the training reaches the epoch in which the weights are to be zeroed, rehearse it, and keep what
        is zero already.

        Args:
            began_with: the settings that the checkpoint notes, of a run that is resumed.
        """
        self._check_epochs(state)
        self._check_optimizer(optimizer)
        if began_with is not None:
            self._warn_of_changes(began_with)
        self._keep_recorded(resumed=began_with is not None)
        if self.to_come and self._calibration is not None:
            rehearse(self.subject, self._calibration, "WandaCallback")

    def begin_again(self) -> None:
        """The Trainer begins the run anew (auto_find_batch_size), with weights that may be zeroed already."""
        p = self.progress
        p.evaluations, p.measured = [], []
        if p.phase == SPARSE:
            p.step, p.epoch = 0, 0.0

    def _check_optimizer(self, optimizer: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        if self.config.keep_zeros and callable(getattr(inner, "eval", None)):
            raise ConfigError(
                f"{type(inner).__name__} trains one set of weights, and evaluates and saves another that it makes of "
                f"them (schedule-free optimizers do so): zeros would not be in what is saved. Use another optimizer, "
                f"or call sparsify_model after the training."
            )

    def _warn_of_changes(self, began_with: Mapping[str, Any]) -> None:
        now = self.config.to_dict()
        changed = {
            key: f"{began_with[key]} -> {now[key]}" for key in now if key in began_with and began_with[key] != now[key]
        }
        if changed:
            shown = ", ".join(f"{name} {change}" for name, change in changed.items())
            rule = "they count from here on" if self.progress.phase == WAITING else "what was zeroed stays as it is"
            self._warn(f"The run is resumed with other settings of sparsity than it began with ({shown}): {rule}.")

    def _check_epochs(self, state: TrainerState) -> None:
        start = self.config.start_epoch
        if self._steps_per_epoch is None:
            if start > 0:
                raise ConfigError(
                    "The training data has no length, so it is not known where an epoch ends: weights can be zeroed at "
                    f"the start only (start_epoch=0), found start_epoch={start}."
                )
            return
        epochs = state.max_steps / self._steps_per_epoch
        if self.to_come and start > epochs:
            raise ConfigError(
                f"Weights are to be zeroed after {start} epochs, but the training has {epochs:g} (of "
                f"{self._steps_per_epoch} steps each). Lower start_epoch, or train for longer: num_train_epochs (or "
                f"max_steps) for start_epoch and for retraining."
            )

    def epoch_begin(self, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step == 0:
            self._outline(state)
        if self._due(state):
            self._sparsify(state, control)

    def _outline(self, state: TrainerState) -> None:
        """Tell what is going to happen, so that a mistake is seen at once.

        Raises:
            ConfigError: if zeroing would wait for verdicts until the training is over.
        """
        if not self.to_come or self._steps_per_epoch is None:
            return
        c, epochs = self._companions, state.max_steps / self._steps_per_epoch
        start = self.config.start_epoch
        waits = c.judged_after is not None and start > (c.pruning_starts or 0)
        if waits and c.judged_after >= epochs:
            raise ConfigError(
                f"Weights are zeroed when no pruning can be taken back any more (max_drop), which is after "
                f"{c.judged_after} epochs at the earliest, and the training has {epochs:g}. Train for longer, or set "
                f"start_epoch to {c.pruning_starts} or less: zeroing then comes before the first pruning."
            )
        when = (
            f"after {c.judged_after} epochs at the earliest, when prunings are judged"
            if waits
            else f"after {start} epochs"
        )
        retraining = "" if start < epochs else ", at its end: nothing is retrained"
        what = self.config.pattern or f"{100 * self.config.sparsity:g} %"
        self._say(f"Zeroing: {self.config.method}, {what}, {when} (of the training's {epochs:g}){retraining}.")

    def step_begin(self, state: TrainerState, control: TrainerControl) -> None:
        """After everything that happens when an epoch begins: blocks may have come back, and what was waited for may
        have happened.
        """
        self._follow_back()
        if self._due(state):
            self._sparsify(state, control)

    def optimizer_step(self) -> None:
        self._zeros.apply()

    def step_end(self, state: TrainerState, control: TrainerControl) -> None:
        """At the step after which the weights are zeroed: measure the model as it is before."""
        if not (self._at_epoch_end(state) and self._due(state)):
            return
        control.should_evaluate = control.should_evaluate or self._evaluates
        # what is saved now would be a dense model, which the evaluation of the sparse one would be taken for
        self._save_later, control.should_save = control.should_save, False

    def epoch_end(self, state: TrainerState, control: TrainerControl) -> None:
        control.should_save = control.should_save or self._save_later
        self._save_later = False
        if self._due(state):
            self._sparsify(state, control)
            control.should_evaluate = control.should_evaluate or self._evaluates
        else:
            self.check(state)

    def evaluated(self, state: TrainerState, metrics: Mapping[str, Any], loader: Any = None) -> None:
        self.check(state, note=False)
        facts = {"step": state.global_step, "epoch": state.epoch or 0.0, "sparse": self.progress.phase != WAITING}
        facts["blocks"] = sum(self.subject.lengths.values())
        self.progress.evaluations.append({**facts, **self.facts.evaluation(self.model, metrics, loader)})
        self._write()

    def conclude_with(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Note an evaluation after the training's end: it is of the model that is left."""
        self.facts.conclude(self.model, metrics, loader)
        self._write()

    def end(self, state: TrainerState) -> None:
        """Check a last time: the best checkpoint may have been loaded."""
        self.check(state)
        if self.to_come:
            early = "it ended early" if state.global_step < state.max_steps else "a pruning was judged too late"
            why = "a pruning could still be taken back" if self._companions.may_be_taken_back else early
            self._warn(
                f"The training ended before the weights were zeroed ({why}). Call sparsify_model, or train for more "
                f"epochs."
            )
        self.ended = True
        self._companions.sparsity_to_come = False
        self._write()
        self._trackers.close()
        if self.progress.phase != WAITING:
            kept = f"kept in {len(self._zeros)} matrices" if self._keeping else "not kept (keep_zeros=False)"
            self._say(f"Zeros are {kept}. Report: {Path(self.args.output_dir, SPARSITY_REPORT)}.md")
            self._tell_end(state.best_global_step if self.args.load_best_model_at_end else None)

    def _tell_end(self, best: int | None) -> None:
        """Tell what the zeros cost, and what to do next. The model is that of the best step, where the Trainer has
        loaded it.
        """
        evaluations = self.progress.evaluations
        dense = last_evaluation([e for e in evaluations if not e["sparse"]])
        sparse = last_evaluation([e for e in evaluations if e["sparse"]], best)
        if dense is not None and sparse is not None and dense["blocks"] == sparse["blocks"]:
            for name, found in metrics_of(dense, sparse, self.args.metric_for_best_model).items():
                self._say(
                    f"  {name}: {value_text(found['before'])} before the zeroing, {value_text(found['after'])} now"
                )
        if not self._companions.prunes:
            self._say(NEXT)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps. Blocks may have been removed since the weights were zeroed."""
        self.progress.sparsity = _copy(self._record().sparsity)
        return self.progress.to_dict()

    def check(self, state: TrainerState, note: bool = True) -> None:
        """Check that what was zeroed is zero, and note how much that is.

        Raises:
            SparsityError: if it is not.
        """
        if not self._keeping:
            return
        self._follow_back()
        self._zeros.check(self.model)
        try:
            matrices = recorded_matrices(self.subject, self._record())
        except RecordError as error:
            raise SparsityError(f"Zeroed weights were lost: {error}") from error
        lost = [name for name, (matrix, _) in matrices.items() if not self._zeros.holds(matrix.weight)]
        if lost:
            raise SparsityError(
                f"The weight of {lost[0]} is another parameter than the one whose zeros were kept: something has put "
                f"it there since. Change weights in place, or call sparsify_model afterwards."
            )
        zeros, size = sum(zeros for _, zeros in matrices.values()), sum(m.weight.numel() for m, _ in matrices.values())
        if size and note:
            earlier = [entry for entry in self.progress.measured if entry["step"] != state.global_step]
            self.progress.measured = [
                *earlier,
                {"step": state.global_step, "epoch": state.epoch or 0.0, "share": zeros / size},
            ]
            self._write()

    # ---- actions ----

    def _keep_recorded(self, resumed: bool) -> None:
        """Keep the zeros that the model came with, or those of the checkpoint that is resumed.

        Its weights are loaded. They may not be in their places yet (MPruneCallback sees to that), but they are the
        parameters that stay.
        """
        host = self.subject.host
        if resumed and (self.progress.sparsity is not None or host.record() is not None):
            # whatever the model in memory was, its weights are now those of the checkpoint
            record = self._record()
            versions = record.versions or package_versions()
            host.set_record(dataclasses.replace(record, sparsity=self.progress.sparsity, versions=versions).to_dict())
        if self._record().sparsity is None:
            return
        if not self.config.keep_zeros:
            self._forget()
            return
        self._add_recorded()
        if self.progress.phase == WAITING and not self.progress.asked:
            self.progress.phase = KEPT
            self._say(
                f"WandaCallback keeps the zeros that the checkpoint's record lists, in {len(self._zeros)} matrices."
            )

    def _follow_back(self) -> None:
        """Keep the zeros of blocks that came back."""
        if self._companions.taken_back != self._seen_back:
            self._seen_back = self._companions.taken_back
            self._add_recorded()

    def _add_recorded(self) -> None:
        """Keep the zeros that the record lists, where they are not kept yet."""
        if not self.config.keep_zeros:
            return
        record = self._record()
        for name, (matrix, _) in recorded_matrices(self.subject, record).items():
            self._keeping = True
            if not self._zeros.holds(matrix.weight):
                self._zeros.add(matrix.weight, recorded_mask(matrix, record.sparsity["matrices"][name]["zeros"]))

    def _due(self, state: TrainerState) -> bool:
        if not self.to_come or self._companions.may_be_taken_back:
            return False
        return (state.epoch or 0.0) >= self.config.start_epoch - 1e-9

    def _at_epoch_end(self, state: TrainerState) -> bool:
        return self._steps_per_epoch is not None and state.global_step % self._steps_per_epoch == 0

    @property
    def _evaluates(self) -> bool:
        return str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no"

    def _sparsify(self, state: TrainerState, control: TrainerControl) -> None:
        p = self.progress
        calibration = self._calibration
        with nullcontext() if calibration is None else calibration.reading():
            self.report, masks = sparsify(
                self.subject,
                calibration,
                self.config,
                progress=shows_bars(self.args),
                gather=gather,
                max_samples=None if calibration is None else calibration.samples,
            )
        if self.config.keep_zeros:
            self._keeping = True
            host = self.subject.host
            for name, mask in masks.items():
                self._zeros.add(host.root.get_submodule(name).weight, mask)
        else:
            self._forget()
        p.phase, p.step, p.epoch, p.report = SPARSE, state.global_step, state.epoch or 0.0, self.report.to_dict()
        p.sparsity = _copy(self._record().sparsity)
        # a checkpoint without the zeros must not be the best
        state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._companions.sparsity_to_come, self._companions.sparsified_at = False, state.global_step
        figures = {"sparsity_asked": self.report.asked, "sparsity_measured": self.report.measured}
        self._trackers.log(self.args, state, control, self.model, figures)
        self._say(f"Weights are zeroed at step {state.global_step} (epoch {p.epoch:g}).\n{self.report}")
        self._write()

    def _forget(self) -> None:
        """Zeros that are not kept are not in the record."""
        self.subject.host.set_record(dataclasses.replace(self._record(), sparsity=None).to_dict())

    def _record(self) -> PrunedConfig:
        return current_record(self.subject)

    @property
    def subject(self) -> Subject:
        """The model as it is now, described."""
        self._subject = describe(self._subject)
        return self._subject

    def _write(self) -> None:
        p = self.progress
        if self.args.process_index != 0 or p.phase == WAITING:
            return
        config = self.config.to_dict() if p.report is None else p.report["config"]
        data = {
            "config": config,
            **finite({**{k: v for k, v in p.to_dict().items() if k != "sparsity"}, **self.facts.to_dict()}),
        }
        data |= {"weights": mark_of_model(self.model) if self.ended else None, "versions": package_versions()}
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"{SPARSITY_REPORT}.json", json.dumps(data, indent=1) + "\n")
        write_whole(folder / f"{SPARSITY_REPORT}.md", run_markdown(data))

    def _say(self, text: str) -> None:
        if self.args.process_index == 0:
            tqdm.write(text)

    def _warn(self, text: str) -> None:
        if self.args.process_index == 0:
            warnings.warn(text, DeepArcWarning, stacklevel=4)


def _copy(value: Any) -> Any:
    return json.loads(json.dumps(value))
