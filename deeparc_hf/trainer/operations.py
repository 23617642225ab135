"""What a training with prunings in it does to its model and optimizer, as its machine says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from ..architectures import Layout
from ..checkpoint.record import PrunedConfig
from ..core.distributed import agree, follow_in_wrapper, gather
from ..core.progress_bars import doing, shows_bars
from ..core.transaction import Transaction
from ..errors import ConfigError, PlanError, SurgeryError
from ..healing.sites import Healing
from ..observe.forward import evaluating
from ..observe.training_calibration import TrainingCalibration
from ..pruning.compare import check_settings, compare_blocks
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan, warn_if_drastic
from ..search.prune import apply_healed
from ..search.search import check_speedup, search_plan
from .follow_checkpoint import Structure, let_frozen_statistics_go, note_frozen, record_of, settle, thaw_noted
from .learning_rate import LearningRate
from .machine import Progress, Verdict
from .measures import Stages
from .rehearsal import rehearse
from .reporter import Reporter, lists
from .searching import batches_of_all, first_step, learned_by_heart, lesser_plan, remaining_speedup
from .session import Event, Session
from .snapshots import drop_unused, free_name, read_plans, require_saving, restore_weights, save_snapshot, set_groups
from .teacher import Teaching, removed_since

__all__ = ["Operations", "frozen_after"]


def frozen_after(plan: PruningPlan) -> dict[str, list[int]]:
    """The blocks that a plan freezes, by stack, as they are numbered once it is carried out."""
    left = Layout.without({name: len(stack) for name, stack in plan.stacks.items()}, plan.removed)
    return lists(left.places({name: stack.frozen for name, stack in plan.stacks.items() if stack.frozen}))


class Operations:
    """Operations on the live model of one run (`machine.World`); what they change is noted in its progress."""

    def __init__(
        self,
        config: MPruneConfig,
        calibration: TrainingCalibration,
        session: Session,
        progress: Progress,
        reporter: Reporter,
    ) -> None:
        self.plan: PruningPlan | None = None  # carried out last and not taken back
        self.stages = Stages(config, session, progress)
        self.rate = LearningRate(config, session, progress)
        self.teaching = Teaching(config, session, progress)
        self._reporter = reporter
        self._config = config
        self._calibration = calibration
        self._session = session
        self._model = session.model
        self._args = session.args
        self._optimizer: torch.optim.Optimizer | None = session.optimizer
        self._progress = progress
        self._accepted_plan: PruningPlan | None = None
        self._comparison: PruningPlan | None = None  # of the last accepted model's blocks
        self._undo: Transaction | None = None
        self._last: PruningPlan | None = None  # of the last comparison
        self._healings: list[Healing] = []  # of the last pruning

    def begin(self) -> None:
        """Note how the model is when the run begins, and freeze what its record says, if that was asked for."""
        p, record = self._progress, record_of(self._session.subject)
        if self._config.gated or self._config.distill is not None:
            require_saving(self._model)
        thaw_noted(self._model)  # what an earlier training of this model froze
        check_settings(self._session.subject, self._config.for_iteration(0))
        rehearse(self._session.subject, self._calibration, "MPruneCallback")
        if self._config.target == "speedup":
            with self._calibration.reading():
                check_speedup(self._session.subject, self._calibration, self._config)
        p.start = p.base = p.record = None if record is None else record.to_dict()
        if self._config.freeze != "record":
            return
        if record is None:
            raise ConfigError(
                "freeze='record' freezes what the model's record says, and this model carries none. Use "
                "freeze='partial'."
            )
        p.frozen = p.base_frozen = lists(record.frozen)
        Structure(record, record.frozen).freeze(self._session.subject)
        follow_in_wrapper(self._model)

    def resume(self, plan: PruningPlan | None, over: bool, rehearsed: bool) -> None:
        """Follow a checkpoint: its weights are loaded, its structure may be another than the model's.

        Args:
            plan: of the pruning at hand, where it is known.
            over: nothing is left to train.
            rehearsed: the calibration data is tried.
        """
        p = self._progress
        start, base, now = (None if r is None else PrunedConfig.from_dict(r) for r in (p.start, p.base, p.record))
        thaw_noted(self._model)  # of the same training, before it was interrupted in this process
        structures = Structure(start), Structure(base, p.base_frozen), Structure(now, p.frozen)
        if over:
            p.teacher = None  # none is needed, and it may be deleted
        self._undo, _ = settle(self._session.subject, *structures, at_start=self.teaching.wake)
        self.teaching.follow()
        follow_in_wrapper(self._model)
        if rehearsed:
            rehearse(self._session.subject, self._calibration, "MPruneCallback")
        self.plan = self._accepted_plan = plan
        if not self._config.gated or not (p.in_retraining or p.verdict is False):
            return
        if self._undo is None:
            raise SurgeryError(
                "The pruning at hand may have to be taken back, and the model was loaded in its smaller structure, "
                "which has no way back. Build the model as it was built when the run began, then resume."
            )
        self._compared()  # the snapshot must be there: better to know now than after hours

    def continue_from(self, other: Operations) -> None:
        """Take over from the same run before the Trainer began it again with a smaller batch (auto_find_batch_size)."""
        self.plan, self._accepted_plan, self._comparison = other.plan, other._accepted_plan, other._comparison
        self._undo, self.teaching = other._undo, other.teaching
        self.teaching.follow()
        follow_in_wrapper(self._model)

    def forget_zeros(self) -> bool:
        """Leave zeroed weights out of the model's record; whether there were any in it."""
        live = self._session.subject.host.record()
        if live is None or not live.get("sparsity"):
            return False
        self._session.subject.host.set_record({**live, "sparsity": None})
        return True

    def note_zeros(self) -> None:
        """Have the progress know what the model's record says of weights that another callback has zeroed."""
        p, live = self._progress, self._session.subject.host.record()
        if live is not None:
            p.record = {**(p.record or live), "sparsity": live.get("sparsity")}

    # ---- what the machine says ----

    def compare(self, iteration: int, k: int) -> dict[str, Any] | None:
        p = self._progress
        # patterns call the blocks by the indices that they had when the run began
        labels = {} if p.record in (None, p.start) else dict(removed_since(p.start, p.record).kept)
        config, bars = self._config.for_iteration(iteration).replace(k=k), shows_bars(self._args)
        judges_by_outputs = config.search is not None or config.heal is not None
        if judges_by_outputs and not self._calibration.is_given and len(p.attempts) == 1:
            doubt = learned_by_heart(self._session.state.log_history)
            if doubt is not None:
                self._session.warn(doubt)
        with self._calibration.reading():
            if config.search is not None:
                plan = self._search(config, iteration, labels)
            else:
                plan = compare_blocks(self._session.subject, self._calibration, config, progress=bars, labels=labels)
        plan = PruningPlan.from_dict(agree(plan.to_dict))
        warn_if_drastic(plan)
        self._last = plan
        return plan.to_dict() if plan.removed else None

    def _search(self, config: MPruneConfig, iteration: int, labels: Mapping[str, tuple[int, ...]]) -> PruningPlan:
        """What a search finds for the model as it is now."""
        attempts, most = self._progress.attempts, None
        subject, bars = self._session.subject, shows_bars(self._args)
        batches = batches_of_all(subject.host, self._calibration)
        if config.target == "max_drop":
            most = first_step(attempts)
        if config.target == "speedup":
            speedup = remaining_speedup(config, attempts, iteration)
            whole = {"num_blocks": sum(subject.lengths.values())}  # it is reached: nothing is to go
            config = config.replace(**({"speedup": speedup} if speedup > 1.0 else whole))
        return search_plan(subject, batches, config, most=most, labels=labels, shared=True, progress=bars)

    def weaker(self) -> dict[str, Any] | None:
        p = self._progress
        tried = [a.plan_removed for a in p.attempts if a.iteration == p.accepted + 1]
        if self._config.search is not None:
            counts = [sum(map(len, removed.values())) for removed in tried]
            plan = lesser_plan(self._compared(), counts, halves=self._config.target == "max_drop")
            return None if plan is None else plan.to_dict()
        for k in range(p.k + 1, self._config.k_max + 1):
            try:
                plan = self._compared().replan(k=k)
            except PlanError:
                continue  # the target cannot be reached with this stride
            if plan.removed and lists(plan.removed) not in tried:
                return plan.to_dict()
        return None

    def prune(self, planned: dict[str, Any], step: int) -> None:
        p, plan = self._progress, PruningPlan.from_dict(planned)
        self._save_before(plan, f"step-{step}")
        self.stages.begin(step)
        live = self._session.subject.host.record()
        if live is not None:
            p.base = live  # what it says of zeroed weights is part of what comes back
        if self._calibration.example is None:
            with self._calibration.reading(), evaluating(self._model):
                self._calibration.first()
        undo = Transaction()
        with Transaction() as guard, self._calibration.reading():
            thaw_noted(self._model, guard)
            trainable = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            record, self._healings = apply_healed(
                self._session.subject,
                plan,
                self._calibration,
                optimizer=self._optimizer,
                example=self._calibration.example,
                transaction=undo,
                progress=shows_bars(self._args),
                done=lambda stage: self.stages.measure(stage, step),
            )
        self._undo = undo if self._config.gated else None
        note_frozen(self._model, [parameter for parameter in trainable if not parameter.requires_grad])
        self.plan = plan
        p.record = record.to_dict()
        p.frozen = frozen_after(plan)
        self.teaching.follow()
        follow_in_wrapper(self._model)
        self._session.tell(Event.PRUNED)

    def _compared(self) -> PruningPlan:
        if self._comparison is None:
            comparison, led = read_plans(self._session.folder, str(self._progress.snapshot))
            self._comparison = PruningPlan.from_dict(comparison)
            self._accepted_plan = None if led is None else PruningPlan.from_dict(led)
        return self._comparison

    def rewind(self, step: int, steps: int) -> None:
        self.rate.rewind(step, steps)

    def pruned(self) -> None:
        self._session.forget_best()
        self._reporter.pruned(self.plan, self._healings, self.stages.take())

    def judged(self, verdict: Verdict) -> None:
        self._reporter.judged(verdict)

    def nothing_removed(self) -> None:
        self.plan = self._last
        self._reporter.nothing_removed(self.plan)

    def others_go_on(self) -> bool:
        return self._session.has_work

    def no_metric(self) -> Exception:
        return self._reporter.no_metric()

    def _save_before(self, plan: PruningPlan, name: str) -> None:
        """Save the model from before a pruning, where it may have to come back or is to teach."""
        p = self._progress
        if self._config.gated and p.snapshot is None:
            p.snapshot, self._comparison = self._save(plan, name), plan
        # a name of its own: where the Trainer begins a run again, steps count from 0, and a later snapshot may have
        # this one's
        self.teaching.begin(lambda: self._save(plan, f"teacher-{name}"))

    def _save(self, plan: PruningPlan, name: str) -> str:
        led = None if self._accepted_plan is None else self._accepted_plan.to_dict()
        free = agree(partial(free_name, self._session.folder, name))
        work = partial(save_snapshot, self._session.folder, free, self._model, self._optimizer, plan.to_dict(), led)
        with doing("Saving the weights from before the pruning", shows_bars(self._args)):
            gather(work if self._args.should_save else lambda: None)
        return free

    def accept(self) -> None:
        p = self._progress
        self._measure_end()
        p.base, p.base_frozen, p.snapshot = p.record, p.frozen, None
        self._undo, self._comparison, self._accepted_plan = None, None, self.plan
        if self._args.should_save:
            drop_unused(self._session.folder, p.teacher)

    def take_back(self) -> None:
        """Go back to the last accepted model: its structure, its weights bit for bit, an optimizer without memory."""
        p = self._progress
        self._measure_end()
        self._compared()  # before anything changes: the snapshot must be there
        thaw_noted(self._model)
        self._undo.roll_back()
        torch.compiler.reset()
        with doing("Bringing back the weights from before the pruning", shows_bars(self._args)):
            gather(lambda: restore_weights(self._session.folder, str(p.snapshot), self._model))
        if self._optimizer is not None:
            set_groups(self._session.folder, str(p.snapshot), self._model, self._optimizer)
        p.record, p.frozen = p.base, p.base_frozen
        base = None if p.base is None else PrunedConfig.from_dict(p.base)
        Structure(base, p.base_frozen).freeze(self._session.subject)
        self._undo, self.plan = None, self._accepted_plan
        self.teaching.follow()
        follow_in_wrapper(self._model)
        self._session.forget_best()
        self._reporter.write_plan(self.plan)
        self._session.tell(Event.TAKEN_BACK)

    def carried_out(self, accepted: bool) -> None:
        self._reporter.carried_out(accepted)

    def _measure_end(self) -> None:
        if "retrained" not in self._progress.attempts[-1].stages:
            self.stages.end(self._session.step)
        self._reporter.note_stages()

    def end(self, keep: bool) -> None:
        """Leave the model as the training made it; keep: whether the snapshots stay that a checkpoint needs."""
        self._progress.snapshot = self._progress.teacher = None
        self.teaching.forget()
        let_frozen_statistics_go(self._model)
        if self._args.should_save:
            drop_unused(self._session.folder, ended=not keep)
