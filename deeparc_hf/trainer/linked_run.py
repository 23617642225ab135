"""One link of a chain of trainings (`link`): a training in one structure. Its prunings are carried out on the files of
the model, between two links, so nothing is taken from shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import transformers
from accelerate.utils import DynamoBackend
from transformers import PreTrainedModel, SchedulerType

from ..architectures import describe
from ..architectures.adapters import is_adapted
from ..architectures.packed import is_quantized
from ..checkpoint.companions import copy_companions
from ..checkpoint.record import PrunedConfig, check_record
from ..checkpoint.weights_mark import mark_of_files
from ..core.distributed import agree, gather
from ..core.progress_bars import doing, shows_bars
from ..errors import ConfigError, SurgeryError, UnsupportedModelError
from ..healing.heal import fit_sites
from ..healing.sites import Healing
from ..healing.stored import load_healings, save_healings
from ..observe.training_calibration import TrainingCalibration
from ..pruning.config import MPruneConfig
from ..pruning.on_disk import require_copyable
from ..pruning.plan import PruningPlan
from ..reports.attempts import Evaluation
from .follow_checkpoint import Structure, record_of
from .gate import check_gate
from .learning_rate import is_trainers_own, rewind, warmup_steps
from .link import WHOLE, Kind, Link, Told, Wish
from .machine import Phase, Progress
from .measures import EVALUATION
from .operations import Operations, frozen_after
from .pruning_run import PruningRun
from .schedule import changes_since, check_epochs, for_training, other_epochs
from .session import Session
from .untrained import pruned_untrained

__all__ = ["LinkedRun", "prepare_link"]


def prepare_link(link: Link, config: MPruneConfig, trainer: Any) -> str | None:
    """Have a Trainer that was just made train what its link is for: check what it was given, set its epochs, freeze
    what the pruning before it freezes. It shards the model later.

    Returns:
        Why it is doubtful to prune the model when the training begins; None where it is not.

    Raises:
        ConfigError: if the script's settings do not go with a chain.
        SurgeryError: if the model is not the one that the link is for.
        UnsupportedModelError: if models of its kind cannot be pruned from file to file.
    """
    standing, args, model = link.standing, trainer.args, trainer.model
    _refuse(config, trainer)
    is_stock = getattr(transformers, type(model).__name__, None) is type(model)
    if not isinstance(model, PreTrainedModel) or is_adapted(model) or is_quantized(model) or not is_stock:
        raise UnsupportedModelError(
            f"A chain of trainings prunes checkpoints of transformers' own classes, without adapters and not "
            f"quantized, from file to file; {type(model).__name__} is none. Train in one process or in "
            "DistributedDataParallel, where MPruneCallback prunes the live model."
        )
    subject = describe(model)
    require_copyable(subject, subject.stacks)
    check_record(subject, config.iterations)
    loaded = str(model.config.name_or_path)
    if loaded != link.model and Path(loaded).resolve() != Path(link.model).resolve():
        raise SurgeryError(
            f"The script has loaded {loaded or 'a model without a name'!r}, and this link of the chain is for "
            f"{link.model!r}. Have it load what deeparc run puts in the place of {{model}} with from_pretrained."
        )
    if Path(args.output_dir).resolve() != link.output.resolve():
        raise ConfigError(
            f"The script's output_dir is {args.output_dir!r}, and this link of the chain is to write to "
            f"{str(link.output)!r}. Give TrainingArguments what deeparc run puts in the place of {{output}}."
        )
    if standing.progress is None:
        standing.epochs, standing.evaluates_on_start = float(args.num_train_epochs), args.eval_on_start
        standing.base_model, standing.base_revision = subject.host.loaded_from()
    # the schedule as the run has it, which counts in steps
    schedule = for_training(config, int(standing.epochs or 0), 1, standing.evaluates_on_start)
    args.num_train_epochs = _epochs(link, schedule)
    if standing.progress is None:
        return pruned_untrained(config, model)
    args.eval_on_start = False  # the chain has begun
    if link.kind is Kind.END:  # some schedules cannot be made for no steps
        args.lr_scheduler_type, args.lr_scheduler_kwargs = SchedulerType.CONSTANT, {}
    record = record_of(model)
    if link.pruned is not None and record is not None and any(standing.progress["frozen"].values()):
        Structure(record, standing.progress["frozen"]).freeze(model)
    return None


def _refuse(config: MPruneConfig, trainer: Any) -> None:
    args, plugin = trainer.args, getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "fsdp_version", 2) == 1:
        raise ConfigError(
            "The first version of FSDP keeps no blocks that could be looked at. Set fsdp_version: 2 in the "
            "accelerate config."
        )
    if getattr(plugin, "activation_checkpointing", False):
        raise ConfigError(
            "fsdp_activation_checkpointing wraps the blocks, which are not found then. Leave it out of the accelerate "
            "config, and set gradient_checkpointing=True in TrainingArguments."
        )
    if trainer.model_init is not None:
        raise ConfigError(
            "A chain of trainings (deeparc run) says which model to load: give the Trainer a model, not model_init."
        )
    never = {
        "distill": (config.distill, "no unpruned model is at hand in a link"),
        "freeze='record'": (config.freeze == "record", "take freeze='partial'"),
        "rewind_lr=False": (not config.rewind_lr, "each link has a learning rate of its own"),
        "max_steps": (args.max_steps > 0, "give num_train_epochs"),
        "load_best_model_at_end": (args.load_best_model_at_end, "the gate judges the model as the link leaves it"),
        "push_to_hub": (args.push_to_hub, "push what the chain ends with: deeparc push"),
        "auto_find_batch_size": (args.auto_find_batch_size, "give a batch size that fits"),
        "torch_compile": (args.torch_compile or _compiles(trainer), "compile the model that the chain ends with"),
    }
    for name, (given, instead) in never.items():
        if given:
            raise ConfigError(f"{name} does not go with a chain of trainings (deeparc run): {instead}. Leave it out.")


def _compiles(trainer: Any) -> bool:
    """Whether the accelerate config has the model compiled."""
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    return plugin is not None and plugin.backend != DynamoBackend.NO


def _epochs(link: Link, config: MPruneConfig) -> float:
    """Epochs of a link's own training."""
    standing = link.standing
    whole = standing.epochs or 0.0
    rest = whole - standing.epochs_done
    if link.kind is not Kind.TRAIN:
        return 0 if link.kind is Kind.END else 1  # no step of it is made
    if standing.progress is None:  # where nothing is removed at once, it goes on to the end
        return config.start_epoch or whole
    progress = Progress.from_dict(standing.progress)
    is_last = not config.gated and progress.accepted + 1 >= config.iterations
    return rest if is_last or progress.phase is Phase.DONE else config.retrain_epochs


class LinkedOperations(Operations):
    """What the machine of a link does: it compares and repairs the live model, which may be in shards, and leaves word
    of what is to be removed from its files.
    """

    def __init__(self, *known: Any, link: Link, trainer: Any) -> None:
        super().__init__(*known)
        self.link = link
        self.standing = link.standing
        self.planned: PruningPlan | None = None  # to be carried out behind this link
        self.found: dict[str, Any] = {}  # measured before that
        self.is_live = True  # whether the accepted model is the one in memory
        self._trainer = trainer
        self._healed = False
        self._saved = False
        accepted = self.standing.plan
        self._accepted_plan = None if accepted is None else PruningPlan.from_dict(accepted)

    def begin_pruned(self, plan: PruningPlan, healings: list[Healing], stages: dict[str, Any]) -> None:
        """Begin with a model that was just pruned."""
        p, session, record = self._progress, self._session, record_of(self._session.subject)
        if record is None:
            raise SurgeryError(f"{self.link.model} carries no pruning record. {_AGAIN}")
        self.plan = plan
        p.record = record.to_dict()
        if stages and stages["before"]["data"] == EVALUATION:
            self.find_evaluation_data()
        stage = "healed" if any(healing.reason is None for healing in healings) else "removed"
        self._reporter.pruned(plan, healings, self.stages.after(stages, stage, session.step))

    def find_evaluation_data(self) -> None:
        """Have the stages measured on what the Trainer evaluates on, though it has not done so yet in this process."""
        data = self._trainer.eval_dataset
        first = next(iter(data.values()), None) if isinstance(data, dict) else data
        if first is not None:
            self._session.evaluations.loader = self._trainer.get_eval_dataloader(first)

    def _compared(self) -> PruningPlan:
        if self.standing.comparison is None:
            raise SurgeryError(f"The chain does not know the plan that was tried first. {_AGAIN}")
        return PruningPlan.from_dict(self.standing.comparison)

    def prune(self, planned: dict[str, Any], step: int) -> None:
        plan = PruningPlan.from_dict(planned)
        if self._config.gated and self.standing.comparison is None:
            self.standing.comparison = plan.to_dict()
        self.planned = plan
        if self.is_live:
            self.stages.begin(step)
            self.found = self.stages.take()
            self.save()
            self.heal(plan)
        else:
            self.found = self.stages.known_before()
        self._progress.frozen = frozen_after(plan)

    def heal(self, plan: PruningPlan) -> None:
        """Fit the repairs that go with a plan for the live model."""
        if self._config.heal is None:
            return
        with self._calibration.reading():
            subject, bars = self._session.subject, shows_bars(self._args)
            healings = fit_sites(subject, plan.removed, self._calibration, progress=bars)
        gather(lambda: save_healings(self.link.repairs, healings) if self._session.is_main else None)
        self._healed = True

    @property
    def wish(self) -> Wish:
        """What is to come, where a plan is to be carried out."""
        return Wish.PRUNE if self._config.heal is None or self._healed else Wish.HEAL

    def rewind(self, step: int, steps: int) -> None:
        """Each link has a learning rate of its own."""

    def pruned(self) -> None:
        """The next link tells of it."""

    def others_go_on(self) -> bool:
        return False

    def accept(self) -> None:
        p = self._progress
        self._measure_end()
        self.save()
        p.base, p.base_frozen = p.record, p.frozen
        self.standing.comparison, self._accepted_plan = None, self.plan
        self.standing.plan = None if self.plan is None else self.plan.to_dict()

    def take_back(self) -> None:
        p = self._progress
        self._measure_end()
        p.record, p.frozen = p.base, p.base_frozen
        self.plan, self.is_live = self._accepted_plan, False
        self._reporter.write_plan(self.plan)

    def save(self) -> None:
        """Save the live model, whole, as the accepted one. The evaluations of this step are of these weights."""
        if self._saved:
            return
        p, session, trainer, folder = self._progress, self._session, self._trainer, self.link.saved
        with doing("Gathering and saving the weights", shows_bars(self._args)):
            state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
            gather(partial(self._write, state, folder) if session.is_main else lambda: None)
        del state
        mark = agree(lambda: mark_of_files(folder))
        attempt = p.attempts[-1]
        attempt.evaluations = tuple(_marked(e, mark) if e.step == session.step else e for e in attempt.evaluations)
        entries = [] if p.record is None else p.record["iterations"]
        own = len(entries) > len((p.start or {"iterations": []})["iterations"])  # else it tells of an earlier pruning
        if own and "metrics" in entries[-1] and attempt.evaluations and attempt.evaluations[-1].mark == mark:
            entries[-1]["weights"] = mark
        self.standing.accepted, self.standing.mark, self._saved = str(folder), mark, True
        self.standing.model_class = type(session.model).__name__.removeprefix("FSDP")
        if p.record is not None:
            session.subject.host.set_record(p.record)
            gather(lambda: PrunedConfig.from_dict(p.record).save_pretrained(folder) if session.is_main else None)

    def _write(self, state: Mapping[str, Any], folder: Path) -> None:
        if not state or all(tensor.numel() == 0 for tensor in state.values()):
            raise SurgeryError(
                "The weights could not be gathered from their shards. Under DeepSpeed ZeRO-3 set "
                "zero3_save_16bit_model: true in the accelerate config."
            )
        model, kept = self._session.model, {}
        names: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            kept[name] = names.setdefault(id(parameter), name) == name  # what is tied is stored once
        lacking = next((name for name, is_kept in kept.items() if is_kept and name not in state), None)
        foreign = next((name for name in state if name not in kept and name not in model.state_dict()), None)
        if lacking is not None or foreign is not None:
            raise SurgeryError(
                f"What was gathered of {type(model).__name__} does not belong to it: "
                f"{f'{lacking} is missing' if lacking else f'{foreign} is none of its weights'}. Leave out what wraps "
                "the model (compiling, say)."
            )
        stored = {name: tensor for name, tensor in state.items() if kept.get(name, True)}
        size = {} if self.link.max_shard_size is None else {"max_shard_size": self.link.max_shard_size}
        model.save_pretrained(folder, state_dict=stored, **size)
        collator = getattr(self._trainer.data_collator, "tokenizer", None)
        for companion in (self._trainer.processing_class, collator):
            if hasattr(companion, "save_pretrained"):
                companion.save_pretrained(folder)
                break
        copy_companions(self.link.model, folder)

    def end(self, keep: bool) -> None:
        """Nothing is left in this process."""


class LinkedRun(PruningRun):
    """One link.

    Args:
        trainer: the Trainer that runs it.
        doubt: what `prepare_link` gave.
    """

    operations: LinkedOperations

    def __init__(
        self,
        config: MPruneConfig,
        calibration: TrainingCalibration,
        session: Session,
        progress: Progress,
        link: Link,
        trainer: Any,
        doubt: str | None = None,
    ) -> None:
        self.link = link
        self._doubt = doubt
        self.standing = standing = link.standing
        self._trainer = trainer
        of_epoch = session.steps_per_epoch
        if of_epoch is None:
            raise ConfigError("The training data has no length, so a chain cannot tell where an epoch ends.")
        whole = standing.epochs or 0.0
        session.steps_before, session.epochs_before = standing.steps_done, standing.epochs_done
        session.whole_steps, session.whole_epochs = math.ceil(whole * of_epoch), whole
        session.known_mark = standing.mark if link.kind is Kind.END else None
        session.evaluates_on_start = standing.evaluates_on_start
        session.evaluations.take_over(standing.data, standing.validation, whole)
        if link.kind is Kind.END and "evaluation" in standing.data:
            session.evaluations.know_as_validation(trainer.eval_dataset)
        self._is_first = standing.progress is None
        if self._is_first:
            standing.settings = config.to_dict()
        super().__init__(config, calibration, session, progress)

    def _operations(self, calibration: TrainingCalibration) -> LinkedOperations:
        known = (self.config, calibration, self.session, self.progress, self.reporter)
        return LinkedOperations(*known, link=self.link, trainer=self._trainer)

    # ---- beginning ----

    def begin(self, before: PruningRun | None = None) -> None:
        standing, reporter = self.standing, self.reporter
        if self._is_first:
            self._begin_chain()
            return
        self._require_same(standing.settings or {})
        if self.link.kind is Kind.TRAIN and self.link.pruned is not None:
            pruned = self.link.pruned
            healings = [] if pruned["repairs"] is None else load_healings(Path(pruned["repairs"]))
            self.operations.begin_pruned(PruningPlan.from_dict(pruned["plan"]), healings, pruned["stages"])
        elif self.link.kind is Kind.END:
            plan, self.progress.frozen = standing.plan, {}
            self.session.saved_in = Path(self.link.model)
            self.operations.plan = None if plan is None else PruningPlan.from_dict(plan)
            reporter.write_plan(self.operations.plan)
        self._shorten_warmup()
        reporter.write()

    def _require_same(self, then: Mapping[str, Any]) -> None:
        """Refuse settings other than those that the chain, or this link, began with."""
        changed = [f"{name} {change}" for name, change in changes_since(then, self._asked).items()]
        changed += other_epochs(self.progress, self.session.steps_per_epoch)
        if changed:
            raise ConfigError(
                f"The script's settings have changed since the chain began: {', '.join(changed)}. Go on with the same "
                "ones, or begin anew in another output folder."
            )

    def _shorten_warmup(self) -> None:
        """A warm-up in steps is meant for the whole training: it is shortened as in a retraining of a single one."""
        session, args = self.session, self.session.args
        steps, whole = session.state.max_steps, session.max_steps
        if self.link.kind is not Kind.TRAIN or session.state.global_step > 0:
            return
        asked, taken = int(args.get_warmup_steps(steps)), warmup_steps(args, steps, whole)
        if asked == taken:
            return
        own = is_trainers_own(session.scheduler, args, steps)
        if own and rewind(session.scheduler, args, steps, own=own, whole=whole):
            session.say(
                f"The learning rate's warm-up of {asked} steps is shortened to {taken} of the {steps} steps here."
            )

    def _begin_chain(self) -> None:
        session, config, p = self.session, self.config, self.progress
        check_epochs(config, session.max_steps, session.steps_per_epoch, by_steps=False)
        check_gate(config, session.args)
        p.steps_per_epoch = session.steps_per_epoch
        self.machine.begin(config.start_epoch * (session.steps_per_epoch or 0))
        self.operations.begin()
        self.reporter.open()
        self._shorten_warmup()
        self.reporter.write()
        self.reporter.outline(self._doubt)

    def resume(self, began_with: Mapping[str, Any]) -> None:
        """Go on within a link, from a checkpoint of its own."""
        self._require_same(began_with)
        if self.link.pruned is not None:
            self.operations.plan = PruningPlan.from_dict(self.link.pruned["plan"])
        if any(evaluation.is_of_evaluation_data for evaluation in self.progress.attempts[-1].evaluations):
            self.operations.find_evaluation_data()
        self.session.say(f"Resumed at step {self.session.step}.")

    # ---- events ----

    def epoch_begin(self) -> None:
        if self.link.kind is Kind.HEAL:
            plan = self.operations.planned = PruningPlan.from_dict(self.link.after or {})
            self.operations.found = self.operations.stages.known_before()
            self.operations.heal(plan)
        elif not self.progress.is_over:
            super().epoch_begin()
        if self.operations.planned is not None:
            self._leave(self.operations.wish)

    def checkpoint_saved(self) -> None:
        """Mark a checkpoint as whole, once every process has written its part."""
        gather(lambda: None)
        folder = Path(self.session.args.output_dir, f"checkpoint-{self.session.state.global_step}")
        if self.session.is_main and folder.is_dir():
            (folder / WHOLE).touch()

    def _stop_if_over(self) -> None:
        """It lasts as long as it was made to."""

    def end(self) -> None:
        p, operations, step = self.progress, self.operations, self.session.step
        if self.link.kind is Kind.END:
            self.ended = True
            if len(p.attempts) > 1:
                self.reporter.conclude()
            self.reporter.write()
            self._tell(Wish.END)
            self.session.close()
            return
        lasts = p.phase is Phase.RETRAINING and self.machine.is_last
        if step >= p.boundary and p.phase is not Phase.DONE and not lasts:
            self.machine.epoch_begins(step)
        if operations.planned is not None:
            self._leave(operations.wish)
        if p.phase is not Phase.DONE:
            self.machine.training_ends(step)
        if p.accepted == 0 and len(p.attempts) == 1:
            operations.save()
            if self._is_first and p.boundary <= step < self.session.max_steps:
                self._leave(Wish.TRAIN)
        self._leave(Wish.END)

    def evaluated_after_end(self, metrics: Mapping[str, Any], loader: Any) -> None:
        super().evaluated_after_end(metrics, loader)
        self._tell(Wish.END)

    def _leave(self, wish: Wish) -> NoReturn:
        """End the script here: what it does after its training is for the model that the chain ends with."""
        self.ended = True
        self.reporter.write()
        self._tell(wish)
        self.session.close()
        self._trainer.accelerator.end_training()
        raise SystemExit(0)

    def _tell(self, wish: Wish) -> None:
        session, standing, operations = self.session, self.standing, self.operations
        standing.progress = self.progress.to_dict()
        standing.steps_done, standing.epochs_done = session.step, session.epoch
        standing.data, standing.validation = session.evaluations.data, session.evaluations.validation
        planned = operations.planned
        told = Told(
            wish,
            standing,
            model=standing.accepted,
            plan=None if planned is None else planned.to_dict(),
            repairs=str(self.link.repairs) if self.link.repairs.is_dir() else None,
            stages=operations.found,
            record=self.progress.record,
        )
        gather(lambda: told.write(self.link.told) if session.is_main else None)


def _marked(evaluation: Evaluation, mark: str | None) -> Evaluation:
    return Evaluation.from_dict({**evaluation.to_dict(), "weights": mark})


_AGAIN = "To begin the chain anew, delete its output folder."
