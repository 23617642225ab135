"""One training with prunings in it: what the schedule says at each event of the Trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core.distributed import agree
from ..observe.calibration import Calibration
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan, first_threshold
from ..reports.phases import BEFORE, FINISHED, RETRAINING
from .gate import check_gate, direction_is_doubtful, forget_best, metric_of, pruned_untrained, steps_per_epoch
from .learning_rate import LearningRate
from .measures import Stages
from .operations import Operations
from .reporter import Journal
from .schedule import Progress, Verdict, check_epochs, find_metric, judge, needed_epochs, refuse_changes
from .session import companions_on

__all__ = ["PruningRun"]


class PruningRun:
    """The prunings of one training.

    Args:
        config: the settings.
        calibration: where the calibration batches come from.
        args: the Trainer's arguments.
        event: what the Trainer hands to a callback: model, optimizer, lr_scheduler, train_dataloader.
        progress: where the run stands.
    """

    def __init__(
        self,
        config: MPruneConfig,
        calibration: Calibration,
        args: TrainingArguments,
        event: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self.config = config
        self.args = args
        self.model: nn.Module = event["model"]
        self.progress = progress
        self.metric, self.greater_is_better = metric_of(config, args)
        self.steps_per_epoch = steps_per_epoch(event.get("train_dataloader"), args)
        self._retraining = config.retrain_epochs * (self.steps_per_epoch or 0)  # optimizer steps
        self.stages = Stages(config, self.model, event.get("train_dataloader"), args, progress)
        self.operations = Operations(
            config, calibration, args, self.model, event.get("optimizer"), progress, self.stages
        )
        self.journal = Journal(
            config,
            args,
            self.model,
            progress,
            self.metric,
            lambda: self.operations.subject,
            event.get("train_dataloader"),
        )
        self.ended = False
        self._next: PruningPlan | None = None  # the plan that comes next, where it is known already
        self._seen_zeroed = -1  # step at which weights had been zeroed when that plan was made
        self._forced = -1  # step at which an evaluation was asked for before the end of its epoch
        self._over = False  # the training is over, but the Trainer makes one more step
        self._step_began = 0.0
        self._rate = LearningRate(config, event.get("lr_scheduler"), args, progress, self.journal.say)

    # ---- beginning ----

    def begin(self, state: TrainerState, before: PruningRun | None = None) -> None:
        """Begin a run.

        Args:
            before: the same run, where the Trainer begins it again in the middle of a retraining
                (auto_find_batch_size).
        """
        check_epochs(self.config, state.max_steps, self.steps_per_epoch, by_steps=self.args.max_steps > 0)
        check_gate(self.config, self.args)
        self._rate.begin(state.max_steps)
        p = self.progress
        p.steps_per_epoch = self.steps_per_epoch
        if before is not None:
            self.operations.continue_from(before.operations)
            p.pruned_at, p.decision, p.measured_at, p.value = 0, None, None, None
            self.journal.reopen()
            self._set_boundary(state, 0)
            return
        p.baseline = self.config.baseline
        p.boundary = self.config.start_epoch * (self.steps_per_epoch or 0)
        self.operations.begin()
        self.journal.open(state)
        self.journal.report()  # a folder that cannot be written to is told now
        self.journal.outline(
            self._length(state),
            direction_is_doubtful(self.config, self.args),
            pruned_untrained(self.config, self.model),
        )

    def resume(self, state: TrainerState, control: TrainerControl, began_with: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            began_with: the settings that the checkpoint notes.
        """
        p = self.progress
        changed = refuse_changes(began_with, self.config, p, self.steps_per_epoch)
        if not self.config.gated and p.phase != FINISHED:  # a gated run may end early, and says so
            check_epochs(self.config, state.max_steps, self.steps_per_epoch, by_steps=self.args.max_steps > 0)
        check_gate(self.config, self.args)
        if changed:
            rule = (
                "this run is finished, so they count no more"
                if p.phase == FINISHED
                else "they count from here on; what was done stays"
            )
            shown = ", ".join(f"{name} {change}" for name, change in changed.items())
            self.journal.warn(f"The run is resumed with other settings than it began with ({shown}): {rule}.")
        self._rate.begin(state.max_steps)
        over = p.stopped or state.global_step >= state.max_steps
        self.operations.resume(self.journal.read_plan(), over)
        if self._last and p.phase == RETRAINING:  # it lasts as long as the training, which may be longer now
            p.boundary = state.max_steps
            p.rewound = p.rewound and [p.rewound[0], state.max_steps - p.rewound[0], state.max_steps]
        self._rate.resume(state.global_step, state.max_steps)
        where = f"{p.phase}, {p.accepted} of {self.config.iterations} prunings accepted"
        self.journal.say(f"Resumed at step {state.global_step}: {where}.")
        if over:
            self._stop_after_a_step(control)

    def _length(self, state: TrainerState) -> str:
        if self.steps_per_epoch is None:
            return f"the training has {state.max_steps} steps"
        return f"{needed_epochs(self.config)} of the training's {state.max_steps / self.steps_per_epoch:g} epochs"

    @property
    def may_be_taken_back(self) -> bool:
        """Whether the pruning at hand is not judged yet, or is judged and the verdict not carried out."""
        return self.config.gated and (self.progress.phase == RETRAINING or self.progress.decision is not None)

    @property
    def _last(self) -> bool:
        """Whether the pruning at hand is the last one, and nobody judges it: its retraining lasts as long as the
        training.
        """
        return not self.config.gated and self.progress.accepted + 1 >= self.config.iterations

    # ---- events ----

    def epoch_begin(self, state: TrainerState, control: TrainerControl) -> None:
        """At a boundary: carry out the decision on the pruning at hand, and prune again."""
        p = self.progress
        if self._over:
            return
        self._warn_of_zeros()
        if p.phase == FINISHED:
            if p.decision is not None and not p.stopped:  # the training goes on for another callback
                self._carry_out(state, control)
                self._rate.rewind(state.global_step, state.max_steps - state.global_step, state.max_steps)
            return
        self.journal.check_metric()
        if state.global_step < p.boundary or (p.phase == RETRAINING and self._last):
            return
        if p.phase == RETRAINING:
            if self.config.gated and p.decision is None:
                raise self.journal.no_metric()  # what was not judged is not accepted
            if not self.config.gated and (
                self._next is None or companions_on(self.model).sparsified_at != self._seen_zeroed
            ):
                self._look_ahead(state, control)  # resumed just here, or weights were zeroed since
                if p.stopped:
                    self._stop_after_a_step(control)
                    return
            if p.decision == "reject" and self._next is None:
                self._next = self.operations.weaker()  # resumed just here; the verdict was that there is one
            self._carry_out(state, control)
        elif self.config.gated and p.baseline is None:
            raise self.journal.no_metric()
        plan = self._next or self.operations.compare(p.accepted, p.k)
        self._next = None
        if plan.removed:
            self._prune(state, control, plan)
        else:
            self.operations.plan = plan
            self._finish("nothing can be removed", control, stop=False)
            first = first_threshold(plan)
            why = (
                "its pinned and protected blocks allow no removal"
                if first is None
                else f"the first block would go at threshold {first:.4f}"
            )
            self.journal.say(f"{plan}\nNothing is removed ({why}); the training goes on as it would without pruning.")
            self.journal.write_plan(plan)

    def _warn_of_zeros(self) -> None:
        """Zeros that nobody keeps will be lost, so the record must not list them."""
        if not companions_on(self.model).keeps_zeros and self.operations.forget_zeros():
            self.journal.warn(
                "The model's record lists zeroed weights, and nothing in this training keeps them zero. They are left "
                "out of the record. To keep them, add WandaCallback() to the callbacks."
            )

    def step_begin(self) -> None:
        self.journal.check_metric()
        self._step_began = time.perf_counter()

    def step_end(self, state: TrainerState, control: TrainerControl) -> None:
        if self._over:
            self.operations.release()
            control.should_evaluate = control.should_save = False
            return
        self.journal.add_training_time(time.perf_counter() - self._step_began)
        # Saved and then evaluated, a checkpoint would not know the verdict, and a resumed run would lack the evaluation
        if control.should_save and (self._due(state) or self._evaluation_follows(state)):
            control.should_evaluate = True
            self._forced = state.global_step

    def epoch_end(self, state: TrainerState, control: TrainerControl) -> None:
        p = self.progress
        if self._over:
            control.should_evaluate = control.should_save = False
            return
        if self._forced == state.global_step:
            control.should_evaluate = companions_on(self.model).sparsified_at == state.global_step
        elif self._due(state):
            control.should_evaluate = True
        if p.phase == RETRAINING and not self.config.gated and not self._last and state.global_step >= p.boundary:
            self._look_ahead(state, control)

    def evaluated(
        self, state: TrainerState, control: TrainerControl, metrics: Mapping[str, Any], loader: Any = None
    ) -> None:
        """Note an evaluation; the one at a boundary decides."""
        p = self.progress
        if self._over:
            return
        if p.phase != FINISHED and state.global_step >= p.boundary:
            self.stages.end(state.global_step)
        self.journal.note(state, metrics, loader)
        if not self.config.gated or p.phase == FINISHED:
            return
        value = agree(lambda: find_metric(metrics, self.metric))
        if value is None:
            return
        p.measured_at = state.global_step
        if p.phase == BEFORE:
            p.baseline = value if self.config.baseline is None else self.config.baseline
            if self.greater_is_better:
                self.journal.warn_of_allowance()
        elif p.decision is None:
            p.value = value
            if state.global_step >= p.boundary:
                self._decide(state, control)

    def end(self, state: TrainerState, control: TrainerControl) -> None:
        """End on the last accepted model."""
        p = self.progress
        if p.phase == RETRAINING or p.decision is not None:
            if self.args.load_best_model_at_end:
                p.attempts[-1].get("stages", {}).pop("retrained", None)  # another model than the last one, it may be
            if p.decision is None and self.config.gated:
                self._judge_early(state)
            self._carry_out(state, control)
            self.journal.note_best(state)
        if p.phase != FINISHED:
            p.reason = p.reason or "the training ended"
            if len(p.attempts) == 1:
                self.journal.warn("The training ended before its first pruning.")
            p.phase = FINISHED
        self.ended = True
        if len(p.attempts) > 1:
            self.journal.conclude(state)
        self.journal.close()
        self.operations.end(keep=self.config.keep_snapshots or state.is_hyper_param_search)

    # ---- decisions ----

    def _due(self, state: TrainerState) -> bool:
        """Whether the gate waits for an evaluation of the model as it is at this step."""
        p = self.progress
        if not self.config.gated or state.global_step < p.boundary or p.measured_at == state.global_step:
            return False
        if p.phase == BEFORE:
            return self.config.baseline is None and state.global_step > 0
        return p.phase == RETRAINING and p.decision is None

    def _evaluation_follows(self, state: TrainerState) -> bool:
        """Whether the Trainer evaluates at the end of the epoch, which is now."""
        by_epoch = self.args.eval_strategy == "epoch" and self.args.eval_delay <= (state.epoch or 0.0)
        return by_epoch and bool(self.steps_per_epoch) and state.global_step % self.steps_per_epoch == 0

    def _decide(self, state: TrainerState, control: TrainerControl) -> None:
        p = self.progress
        verdict = self._verdict(p.value)
        room = state.global_step + self._retraining <= state.max_steps
        if verdict.accepted and p.accepted + 1 == self.config.iterations:
            self._finish("every pruning that was asked for is accepted", control)
        elif not room:
            self._finish("there are not enough epochs left for one more retraining", control)
        elif verdict.accepted:
            self._look_ahead(state, control)
        else:
            self._next = self.operations.weaker()
            if self._next is None:
                self._finish(f"no stride up to k_max={self.config.k_max} removes anything else", control)

    def _verdict(self, value: float | None) -> Verdict:
        p = self.progress
        if value is None or p.baseline is None:
            verdict = Verdict(False, float("nan"), f"{self.metric} was not measured after the retraining began")
        else:
            verdict = judge(self.config, self.metric, p.baseline, value, self.greater_is_better)
        p.decision = "accept" if verdict.accepted else "reject"
        drop = None if value is None else verdict.drop
        p.attempts[-1].update(metric=self.metric, value=value, baseline=p.baseline, drop=drop, reason=verdict.reason)
        return verdict

    def _judge_early(self, state: TrainerState) -> None:
        """The training ended before the boundary (early stopping, say):
        judge by what was measured of this structure.
        """
        p = self.progress
        if self.args.load_best_model_at_end and state.best_metric is not None:  # by the same metric: _check_gate
            p.value = state.best_metric
        self._verdict(p.value)
        p.reason = "the training ended early"

    def _look_ahead(self, state: TrainerState, control: TrainerControl) -> None:
        """Compare the blocks of a model that is accepted; without a further pruning there is nothing left to do."""
        self._seen_zeroed = companions_on(self.model).sparsified_at
        self._next = self.operations.compare(self.progress.accepted + 1, self.progress.k)
        if not self._next.removed:
            self._next = None
            self.progress.decision = "accept"
            self._finish("nothing more can be removed", control)

    # ---- actions ----

    def _prune(self, state: TrainerState, control: TrainerControl, plan: PruningPlan) -> None:
        p = self.progress
        record = self.operations.prune(plan, state.global_step)
        p.phase, p.k, p.pruned_at = RETRAINING, plan.config.k, state.global_step
        p.decision = p.value = p.measured_at = p.reason = None
        self.journal.open(state, plan, record)
        p.attempts[-1].update(
            healing=[healing.to_dict() for healing in self.operations.healings], stages=self.stages.take()
        )
        forget_best(state)
        self._set_boundary(state, state.global_step)
        again = ", another try" if sum(a.get("iteration") == p.accepted + 1 for a in p.attempts) > 1 else ""
        against = (
            f" The baseline of {self.metric} is {p.baseline:.4g}."
            if self.config.gated and p.baseline is not None
            else ""
        )
        self.journal.say(
            f"Pruning {p.accepted + 1}{again} (k={p.k}), at step {state.global_step}.{against} Blocks as they are "
            f"numbered now:\n{plan}"
        )
        for healing in self.operations.healings:
            self.journal.say(f"Healing: {healing}")
        self.journal.tell_stages()
        self.journal.write_plan(plan)
        self.journal.log(state, control)

    def _set_boundary(self, state: TrainerState, step: int) -> None:
        """When the retraining that begins at this step ends; its learning rate follows."""
        p = self.progress
        steps = state.max_steps - step if self._last else self._retraining
        p.boundary = step + steps
        self._rate.rewind(step, steps, state.max_steps)

    def _carry_out(self, state: TrainerState, control: TrainerControl) -> None:
        """Accept the pruning at hand, or take it back."""
        p = self.progress
        attempt = p.attempts[-1]
        if "retrained" not in attempt.setdefault("stages", {}):
            self.stages.end(state.global_step)
        self.journal.note_stages()
        if p.decision == "reject":
            self.operations.take_back()
            companions_on(self.model).taken_back += 1
            forget_best(state)
            self.journal.write_plan(self.operations.plan)
            attempt["decision"] = "rolled back"
        else:
            p.accepted += 1
            self.operations.accept()
            self.operations.clean_up()
            attempt["decision"] = "accepted"
            attempt.setdefault("reason", "not judged (no max_drop)")
        p.decision = None
        if p.phase != FINISHED:
            p.phase = BEFORE
        back = f" The weights from step {attempt['step']} are back." if attempt["decision"] == "rolled back" else ""
        self.journal.say(
            f"Pruning {attempt['iteration']} (k={attempt['k']}) is {attempt['decision']}: {attempt['reason']}.{back}"
        )
        self.journal.log(state, control, accepted=float(attempt["decision"] == "accepted"), drop=attempt.get("drop"))

    def _finish(self, reason: str, control: TrainerControl, stop: bool = True) -> None:
        p = self.progress
        stop = stop and not companions_on(self.model).sparsity_to_come
        p.phase, p.reason, p.stopped = FINISHED, reason, stop
        if stop:
            control.should_training_stop = True
            control.should_save = control.should_save or self.args.save_strategy == "steps"

    def _stop_after_a_step(self, control: TrainerControl) -> None:
        """Stop where the Trainer cannot stop before it has made one more step: what that step does is taken back."""
        self.operations.hold()
        self._over = True
        control.should_training_stop = True
