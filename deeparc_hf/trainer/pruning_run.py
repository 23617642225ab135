"""One training with prunings in it: what the machine says at each event of the Trainer is done to the live model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from ..core.distributed import agree
from ..observe.training_calibration import TrainingCalibration
from ..pruning.config import MPruneConfig
from .gate import check_gate, direction_is_doubtful, find_metric, metric_of
from .machine import Machine, Phase, Progress
from .operations import Operations
from .reporter import Reporter
from .schedule import check_epochs, for_training, needed_epochs, refuse_changes
from .session import Event, Member, Session
from .untrained import pruned_untrained

__all__ = ["PruningRun"]


class PruningRun(Member):
    removes_blocks = True

    def __init__(
        self, config: MPruneConfig, calibration: TrainingCalibration, session: Session, progress: Progress
    ) -> None:
        self._asked = config
        steps = session.max_steps, session.steps_per_epoch
        self.config = config = for_training(config, *steps, session.evaluates_on_start)
        self.session = session
        self.progress = progress
        self.metric, self.greater_is_better = metric_of(config, session.args)
        self.reporter = Reporter(config, session, progress, self.metric)
        self.operations = self._operations(calibration)
        self.machine = Machine(
            config,
            progress,
            self.operations,
            metric=self.metric,
            greater_is_better=self.greater_is_better,
            max_steps=session.max_steps,
            retraining=config.retrain_epochs * (session.steps_per_epoch or 0),
        )
        if config.gated:
            self.pruning_starts, self.judged_after = config.start_epoch, needed_epochs(config)
        # the weights as they are to stay, where nothing is left to do, but the Trainer makes one more step
        self._spare: dict[str, torch.Tensor] | None = None
        self._step_began = 0.0

    def _operations(self, calibration: TrainingCalibration) -> Operations:
        return Operations(self.config, calibration, self.session, self.progress, self.reporter)

    # ---- beginning ----

    def begin(self, before: PruningRun | None = None) -> None:
        """Begin a run; `before` is the same one, where auto_find_batch_size begins it again in a retraining."""
        session, config = self.session, self.config
        self._check_epochs()
        check_gate(config, session.args)
        self.progress.steps_per_epoch = session.steps_per_epoch
        if before is not None:
            self.operations.continue_from(before.operations)
            self.reporter.reopen()
            self.machine.begin_again()
            return
        self.machine.begin(config.start_epoch * (session.steps_per_epoch or 0))
        self.operations.begin()
        self.reporter.open()
        self.reporter.write()  # a folder that cannot be written to is told now
        doubts = direction_is_doubtful(config, session.args), pruned_untrained(config, session.model)
        self.reporter.outline(*doubts)

    def resume(self, began_with: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, which notes the settings that the run began with."""
        p, session = self.progress, self.session
        changed = refuse_changes(began_with, self._asked, p, session.steps_per_epoch)
        if not self.config.gated and not p.is_over:  # a gated run may end early, and says so
            self._check_epochs()
        check_gate(self.config, session.args)
        if changed:
            self.reporter.warn_of_changes(changed)
        over = p.stopped or session.step >= session.max_steps
        self.machine.resume(changed=bool(changed))
        is_last = self.machine.is_last and p.in_retraining
        self.operations.resume(self.reporter.read_plan(), over, rehearsed=not (p.is_over or is_last))
        self.operations.rate.resume(to_the_end=is_last)
        where = f"{p.for_report()['phase']}, {p.accepted} of {self.config.iterations} prunings accepted"
        session.say(f"Resumed at step {session.step}: {where}.")
        if over:
            self._stop_after_a_step()

    def _check_epochs(self) -> None:
        session = self.session
        by_steps = session.args.max_steps > 0
        check_epochs(self.config, session.max_steps, session.steps_per_epoch, by_steps=by_steps)

    @property
    def may_be_taken_back(self) -> bool:
        return self.machine.may_be_taken_back

    # ---- events ----

    def hear(self, event: Event) -> None:
        if event is Event.ZEROED:
            self.machine.weights_zeroed()

    def epoch_begin(self) -> None:
        if self._spare is not None:
            return
        # zeros that nobody keeps will be lost, so the record must not list them
        if not any(member.keeps_zeros for member in self.session.members) and self.operations.forget_zeros():
            self.session.warn(
                "The model's record lists zeroed weights, and nothing in this training keeps them zero. They are left "
                "out of the record. To keep them, add WandaCallback() to the callbacks."
            )
        self.reporter.check_metric()
        self.machine.epoch_begins(self.session.step)
        if self.progress.stopped:
            self._stop_after_a_step()

    def step_begin(self) -> None:
        self.reporter.check_metric()
        self._step_began = time.perf_counter()

    def before_optimizer(self) -> None:
        self.operations.teaching.check()

    def step_end(self) -> None:
        control, step = self.session.control, self.session.step
        if self._spare is not None:
            live = self.session.model.state_dict()
            with torch.no_grad():
                for name, weight in self._spare.items():
                    live[name].copy_(weight)
            self._spare = {}
            control.should_evaluate = control.should_save = False
            return
        self.progress.attempts[-1].training_seconds += time.perf_counter() - self._step_began
        args, of_epoch = self.session.args, self.session.steps_per_epoch
        by_epoch = args.eval_strategy == "epoch" and args.eval_delay <= (self.session.state.epoch or 0.0)
        follows = by_epoch and bool(of_epoch) and step % of_epoch == 0  # the Trainer's own, at the end of the epoch
        # Saved and then evaluated, a checkpoint would not know the verdict, and a resumed run would lack the evaluation
        if control.should_save and (self.machine.wants_evaluation(step) or follows):
            control.should_evaluate = True
            self.progress.asked_at = step

    def epoch_end(self) -> None:
        control, step = self.session.control, self.session.step
        if self._spare is not None:
            control.should_evaluate = control.should_save = False
            return
        if self.progress.asked_at == step:
            control.should_evaluate = self.session.zeroed_at == step
        elif self.machine.wants_evaluation(step):
            control.should_evaluate = True
        if not self.progress.is_over:
            self.machine.epoch_ends(step)
            self._stop_if_over()

    def evaluated(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Note an evaluation; the one at a boundary decides."""

        p, step = self.progress, self.session.step
        if self._spare is not None:
            return
        if not p.is_over and step >= p.boundary:
            self.operations.stages.end(step)
        self.reporter.note(metrics, loader)
        if not self.config.gated or p.is_over:
            return
        value = agree(lambda: find_metric(metrics, self.metric))
        is_baseline = value is not None and p.phase is Phase.WAITING
        self.machine.evaluated(step, value)
        if is_baseline and self.greater_is_better:
            self.reporter.warn_of_allowance()
        self._stop_if_over()

    def end(self) -> None:
        """End on the last accepted model."""

        p, session = self.progress, self.session
        never_pruned = not p.is_over and len(p.attempts) == 1
        best = session.state.best_metric if session.args.load_best_model_at_end else None
        loads_best = session.args.load_best_model_at_end and p.phase in (Phase.RETRAINING, Phase.JUDGED)
        if loads_best:
            p.attempts[-1].stages.pop("retrained", None)  # another model than the last one, it may be
        self.machine.training_ends(session.step, best)  # best by the same metric: check_gate
        if loads_best:
            self.reporter.note_best()
        if never_pruned:
            session.warn("The training ended before its first pruning.")
        self.ended = True
        if len(p.attempts) > 1:
            self.reporter.conclude()
        self.reporter.write()
        session.close()
        self._spare = None
        self.operations.end(keep=self.config.keep_snapshots or session.state.is_hyper_param_search)

    def evaluated_after_end(self, metrics: Mapping[str, Any], loader: Any) -> None:
        self.reporter.conclude_with(metrics, loader)

    def _stop_if_over(self) -> None:

        if self.progress.stopped:
            control = self.session.control
            control.should_training_stop = True
            control.should_save = control.should_save or self.session.args.save_strategy == "steps"

    def _stop_after_a_step(self) -> None:
        """Stop where the Trainer cannot stop before it has made one more step: what that step does is taken back."""
        self._spare = {name: weight.clone() for name, weight in self.session.model.state_dict().items()}
        self.session.control.should_training_stop = True
