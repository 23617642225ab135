"""What a training with prunings in it does to its model and optimizer: compare, prune, accept, take back, follow a
checkpoint.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from ..architectures import Layout, Subject, describe
from ..checkpoint.record import PrunedConfig
from ..core.distributed import agree, follow_in_wrapper, gather
from ..core.progress_bars import doing, shows_bars
from ..core.transaction import Transaction
from ..errors import ConfigError, PlanError, SurgeryError
from ..healing.sites import Healing
from ..observe.calibration import Calibration
from ..observe.forward import evaluating
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan, warn_if_drastic
from ..pruning.prune import apply_healed, check_settings, compare_blocks
from ..reports.phases import FINISHED, RETRAINING
from .follow_checkpoint import Structure, let_frozen_statistics_go, note_frozen, record_of, settle, thaw_noted
from .measures import Stages
from .rehearsal import rehearse
from .reporter import lists
from .schedule import Progress
from .snapshots import drop_unused, free_name, read_plans, restore_weights, save_snapshot, set_groups
from .teacher import Teaching, removed_since

__all__ = ["Operations"]


class Operations:
    """Operations on the live model of one run; what they change is noted in its progress.

    Args:
        config: the settings.
        calibration: where the calibration batches come from.
        args: the Trainer's arguments.
        model: the model, unwrapped.
        optimizer: the optimizer that follows.
        progress: where the run stands.
        stages: measures what each step of a pruning does.

    Attributes:
        plan: the plan that was carried out last and not taken back; None before.
    """

    def __init__(
        self,
        config: MPruneConfig,
        calibration: Calibration,
        args: TrainingArguments,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        progress: Progress,
        stages: Stages,
    ) -> None:
        self.model = model
        self._subject = describe(model)
        self.plan: PruningPlan | None = None
        self._config = config
        self._calibration = calibration
        self._args = args
        self._output = Path(args.output_dir)
        self._optimizer = optimizer
        self._progress = progress
        self._accepted_plan: PruningPlan | None = None
        self._comparison: PruningPlan | None = None  # of the last accepted model's blocks
        self.healings: list[Healing] = []  # of the last pruning
        self.stages = stages
        self.teaching = Teaching(config, args, model, progress)
        self._undo: Transaction | None = None
        self._held: dict[str, torch.Tensor] | None = None

    @property
    def subject(self) -> Subject:
        """The model as it is now, described."""
        self._subject = describe(self._subject)
        return self._subject

    def begin(self) -> None:
        """Note how the model is when the run begins, and freeze what its record says, if that was asked for."""
        p, record = self._progress, record_of(self.subject)
        thaw_noted(self.model)  # what an earlier training of this model froze
        check_settings(self.subject, self._config.for_iteration(0))
        self.rehearse()
        p.start = p.base = p.record = None if record is None else record.to_dict()
        if self._config.freeze != "record":
            return
        if record is None:
            raise ConfigError(
                "freeze='record' freezes what the model's record says, and this model carries none. Use "
                "freeze='partial'."
            )
        p.frozen = p.base_frozen = lists(record.frozen)
        Structure(record, record.frozen).freeze(self.subject)
        follow_in_wrapper(self.model)

    def rehearse(self) -> None:
        """Try the calibration data, where a pruning is to come."""
        p = self._progress
        last = p.phase == RETRAINING and not self._config.gated and p.accepted + 1 >= self._config.iterations
        if p.phase == FINISHED or last:
            return
        rehearse(self.subject, self._calibration, "MPruneCallback")

    def resume(self, plan: PruningPlan | None, over: bool = False) -> None:
        """Follow a checkpoint: its weights are loaded, its structure may be another than the model's.

        Args:
            plan: of the pruning at hand, where it is known.
            over: nothing is left to train, so that no teacher is needed.
        """
        p = self._progress
        start, base, now = (None if r is None else PrunedConfig.from_dict(r) for r in (p.start, p.base, p.record))
        thaw_noted(self.model)  # of the same training, before it was interrupted in this process
        structures = Structure(start), Structure(base, p.base_frozen), Structure(now, p.frozen)
        if over:
            self.teaching.retire()
        self._undo, _ = settle(self.subject, *structures, at_start=self.teaching.wake)
        self.teaching.follow()
        follow_in_wrapper(self.model)
        self.rehearse()
        self.plan = self._accepted_plan = plan
        if not self._config.gated or (p.phase != RETRAINING and p.decision != "reject"):
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
        self._undo = other._undo
        self.teaching.take_over(other.teaching)
        follow_in_wrapper(self.model)

    def forget_zeros(self) -> bool:
        """Leave zeroed weights out of the model's record; whether there were any in it."""
        host = self.subject.host
        live = host.record()
        if live is None or not live.get("sparsity"):
            return False
        host.set_record({**live, "sparsity": None})
        return True

    def note_zeros(self) -> None:
        """Have the progress know what the model's record says of zeroed weights: another callback may have zeroed some
        since.
        """
        p, live = self._progress, self.subject.host.record()
        if live is not None:
            p.record = {**(p.record or live), "sparsity": live.get("sparsity")}

    def compare(self, iteration: int, k: int) -> PruningPlan:
        """The plan of an iteration, counted from 0, for the model as it is now: the same in every process."""
        with self._calibration.reading():
            plan = compare_blocks(
                self.subject,
                self._calibration,
                self._config.for_iteration(iteration).replace(k=k),
                progress=shows_bars(self._args),
                gather=gather,
                max_samples=self._calibration.samples,
                labels=self._labels(),
            )
        plan = PruningPlan.from_dict(agree(plan.to_dict))
        warn_if_drastic(plan)
        return plan

    def weaker(self) -> PruningPlan | None:
        """The plan of the next larger stride that removes something else than was tried from this model; None if there
        is none.
        """
        p = self._progress
        tried = [a["plan_removed"] for a in p.attempts if a.get("iteration") == p.accepted + 1]
        for k in range(p.k + 1, self._config.k_max + 1):
            try:
                plan = self._compared().replan(k=k)
            except PlanError:
                continue  # the target cannot be reached with this stride
            if plan.removed and lists(plan.removed) not in tried:
                return plan
        return None

    def prune(self, plan: PruningPlan, step: int) -> PrunedConfig:
        """Carry a plan out, so that it can be taken back if the run is to judge it."""
        p = self._progress
        self._save_before(plan, f"step-{step}")
        self.stages.begin(step)
        live = self.subject.host.record()
        if live is not None:
            p.base = live  # what it says of zeroed weights is part of what comes back
        undo = Transaction()
        with Transaction() as guard, self._calibration.reading():
            thaw_noted(self.model, guard)
            trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            record, self.healings = apply_healed(
                self.subject,
                plan,
                self._calibration,
                optimizer=self._optimizer,
                example=self._example(),
                transaction=undo,
                progress=shows_bars(self._args),
                gather=gather,
                max_samples=self._calibration.samples,
                done=lambda stage: self.stages.measure(stage, step),
            )
        self._undo = undo if self._config.gated else None
        note_frozen(self.model, [parameter for parameter in trainable if not parameter.requires_grad])
        self.plan = plan
        p.record = record.to_dict()
        layout = Layout.without({name: len(stack) for name, stack in plan.stacks.items()}, plan.removed)
        p.frozen = lists(layout.places({name: stack.frozen for name, stack in plan.stacks.items() if stack.frozen}))
        self.teaching.follow()
        follow_in_wrapper(self.model)
        return record

    def _save_before(self, plan: PruningPlan, name: str) -> None:
        """Save the model from before a pruning, where it may have to come back or is to teach."""
        p = self._progress
        if self._config.gated and p.snapshot is None:
            p.snapshot, self._comparison = self._save(plan, name), plan
        if self.teaching.is_waiting:
            # a name of its own: where the Trainer begins a run again, steps count from 0, and a later snapshot may have
            # this one's
            self.teaching.copy_model(self._save(plan, f"teacher-{name}"))

    def _save(self, plan: PruningPlan, name: str) -> str:
        led = None if self._accepted_plan is None else self._accepted_plan.to_dict()
        free = agree(partial(free_name, self._output, name))
        work = partial(save_snapshot, self._output, free, self.model, self._optimizer, plan.to_dict(), led)
        with doing("Saving the weights from before the pruning", shows_bars(self._args)):
            gather(work if self._args.should_save else lambda: None)
        return free

    def accept(self) -> None:
        """Make the model as it is now the one to go back to."""
        p = self._progress
        p.base, p.base_frozen, p.snapshot = p.record, p.frozen, None
        self._undo, self._comparison, self._accepted_plan = None, None, self.plan

    def take_back(self) -> None:
        """Go back to the last accepted model: its structure, its weights bit for bit, an optimizer without memory."""
        p = self._progress
        if self._undo is None:
            raise SurgeryError("There is no way back from this pruning.")
        self._compared()  # before anything changes: the snapshot must be there
        thaw_noted(self.model)
        self._undo.roll_back()
        torch.compiler.reset()
        with doing("Bringing back the weights from before the pruning", shows_bars(self._args)):
            gather(lambda: restore_weights(self._output, str(p.snapshot), self.model))
        if self._optimizer is not None:
            set_groups(self._output, str(p.snapshot), self.model, self._optimizer)
        p.record, p.frozen = p.base, p.base_frozen
        base = None if p.base is None else PrunedConfig.from_dict(p.base)
        Structure(base, p.base_frozen).freeze(self.subject)
        self._undo, self.plan = None, self._accepted_plan
        self.teaching.follow()
        follow_in_wrapper(self.model)

    def hold(self) -> None:
        """Keep the weights as they are now: the step that comes is one too many."""
        self._held = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def release(self) -> None:
        """Put the weights back that `hold` kept."""
        live = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in (self._held or {}).items():
                live[name].copy_(tensor)
        self.forget_held()

    def forget_held(self) -> None:
        """Free what `hold` kept."""
        self._held = None

    def clean_up(self) -> None:
        """Delete the snapshots that no checkpoint needs."""
        if self._args.should_save:
            drop_unused(self._output, self._progress.snapshot, self._progress.teacher)

    def end(self, keep: bool) -> None:
        """Leave the model as the training made it, without anything that only a training needs.

        Args:
            keep: whether the snapshots stay that a checkpoint needs.
        """
        self._progress.snapshot = self._progress.teacher = None
        self.forget_held()
        self.teaching.forget()
        let_frozen_statistics_go(self.model)
        if self._args.should_save:
            drop_unused(self._output, ended=not keep)

    def _compared(self) -> PruningPlan:
        if self._comparison is None:
            comparison, led = read_plans(self._output, str(self._progress.snapshot))
            self._comparison = PruningPlan.from_dict(comparison)
            self._accepted_plan = None if led is None else PruningPlan.from_dict(led)
        return self._comparison

    def _labels(self) -> dict[str, tuple[int, ...]]:
        """What patterns call the blocks: the indices that they had when the run began."""
        p = self._progress
        if p.record is None or p.record == p.start:
            return {}
        return dict(removed_since(p.start, p.record).kept)

    def _example(self) -> Any:
        """A calibration batch to verify a removal on."""
        if self._calibration.example is None:
            with self._calibration.reading(), evaluating(self.model):
                self._calibration.first()
        return self._calibration.example
