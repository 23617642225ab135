"""One training of a model by a Trainer, as the callbacks of this package in it share it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import default_logdir, get_reporting_integration_callbacks

from ..architectures import Subject, describe
from ..checkpoint.record import PrunedConfig, current_record
from ..checkpoint.weights_mark import mark_of_model
from ..core.caller import warn_caller
from ..core.offload import is_offloaded
from ..errors import UnsupportedModelError
from .evaluations import Evaluations

__all__ = ["Event", "Member", "Session"]

_SESSION = "deeparc_hf_session"  # of the Trainer's state; no field, so it is in no trainer_state.json


class Event(StrEnum):
    """What callbacks tell each other."""

    PRUNED = "blocks were removed"
    TAKEN_BACK = "blocks came back, with the zeros that they had"
    ZEROED = "weights were zeroed"


class Member:
    """What one callback does in one training: it gets the Trainer's events, and hears what the other callbacks do."""

    ended = False  # the training has
    removes_blocks = False  # and then tells the training's end
    keeps_zeros = False
    # epochs before the first pruning, and after the last verdict at the earliest; None: nothing is judged
    pruning_starts: int | None = None
    judged_after: int | None = None

    @property
    def has_work(self) -> bool:
        """Whether the training must not stop yet, because something is still to be done in it."""
        return False

    @property
    def may_be_taken_back(self) -> bool:
        """Whether the weights from before a pruning may come back."""
        return False

    def hear(self, event: Event) -> None:
        """Something has happened to the model, just now."""

    def epoch_begin(self) -> None: ...
    def step_begin(self) -> None: ...
    def before_optimizer(self) -> None: ...
    def after_optimizer(self) -> None: ...
    def step_end(self) -> None: ...
    def epoch_end(self) -> None: ...
    def evaluated(self, metrics: Mapping[str, Any], loader: Any) -> None: ...
    def end(self) -> None: ...
    def evaluated_after_end(self, metrics: Mapping[str, Any], loader: Any) -> None: ...


class Session:
    """One training; event: what the Trainer hands to a callback when it begins."""

    def __init__(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, event: Mapping[str, Any]
    ) -> None:
        if is_offloaded(event["model"]):
            raise UnsupportedModelError(
                f"{type(event['model']).__name__} has weights that accelerate keeps elsewhere (device_map: on the disk "
                "or the CPU), which a training does not change. Load the model without offloading: leave device_map "
                "out, or give one without 'disk' and 'cpu'."
            )
        self.args = args
        self.state = state
        self.control = control  # as in the event at hand
        self.model: nn.Module = event["model"]
        self.optimizer = event.get("optimizer")
        self.scheduler = event.get("lr_scheduler")
        self.loader = event.get("train_dataloader")
        self.steps_per_epoch: int | None = None  # optimizer steps; None where the data has no length
        with suppress(TypeError):
            self.steps_per_epoch = max(-(-len(self.loader) // args.gradient_accumulation_steps), 1)
        self.folder = Path(args.output_dir)
        # where this training is a link of a longer one (`link`): what came before it, and how long the whole is
        self.steps_before, self.epochs_before = 0, 0.0
        self.whole_steps: int | None = None
        self.whole_epochs: float | None = None
        self.evaluates_on_start: bool = args.eval_on_start
        self.saved_in: Path | None = None  # the folder that the model already lies in
        self.known_mark: str | None = None  # of weights that are in shards, and stay as they are
        self.members: list[Member] = []  # in the order of the Trainer's callbacks
        self.zeroed_at: int | None = None  # optimizer step at which weights were zeroed last
        self.evaluations = Evaluations(args, self.loader)
        self._trackers: list[Any] | None = None  # made when something is logged first
        self._subject: nn.Module | Subject = self.model
        # every callback of a training is given this object, also one that stands inside another
        setattr(state, _SESSION, self)

    @classmethod
    def of(cls, state: TrainerState) -> Session | None:
        """The session of the training whose state this is; None where none has begun."""
        known = getattr(state, _SESSION, None)
        return known if isinstance(known, cls) and known.state is state else None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy or a pickle of a Trainer's state carries no training."""
        return type(None), ()

    @property
    def step(self) -> int:
        return self.steps_before + self.state.global_step

    @property
    def epoch(self) -> float:
        return self.epochs_before + (self.state.epoch or 0.0)

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.state.max_steps if self.whole_steps is None else self.whole_steps

    @property
    def epochs(self) -> float:
        """Epochs of the whole training."""
        return self.state.num_train_epochs if self.whole_epochs is None else self.whole_epochs

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints lines."""
        return self.args.process_index == 0

    # ---- what callbacks tell each other ----

    def tell(self, event: Event) -> None:
        if event is Event.ZEROED:
            self.zeroed_at = self.step
        for member in self.members:
            member.hear(event)

    @property
    def may_be_taken_back(self) -> bool:
        return any(member.may_be_taken_back for member in self.members)

    @property
    def has_work(self) -> bool:
        return any(member.has_work for member in self.members)

    def forget_best(self) -> None:
        """A checkpoint of another structure, or of other zeros, must not be the best."""
        self.state.best_metric = self.state.best_model_checkpoint = self.state.best_global_step = None

    # ---- the model ----

    @property
    def subject(self) -> Subject:
        self._subject = describe(self._subject)
        return self._subject

    def mark(self) -> str | None:
        """The mark of the model's weights; None where it is not known."""
        host = self.subject.host
        # of a sentence encoder the model within, which is what lies in the checkpoint's model.safetensors
        return mark_of_model(self.model if host.outer is None else host.root) or self.known_mark

    def record(self) -> PrunedConfig:
        return current_record(self.subject)

    # ---- the user ----

    def say(self, text: str) -> None:
        """Print, without breaking a progress bar."""
        if self.is_main:
            tqdm.write(text)

    def warn(self, text: str) -> None:
        if self.is_main:
            warn_caller(text)

    def log(self, figures: Mapping[str, float]) -> None:
        """Add figures to the log history, and send them to every tracker; a callback cannot call `Trainer.log`."""
        logs = {**figures, **({} if self.state.epoch is None else {"epoch": self.state.epoch})}
        self.state.log_history.append({**logs, "step": self.step})
        if self._trackers is None:
            self._trackers = [cls() for cls in get_reporting_integration_callbacks(self.args.report_to)]
            for tracker in self._trackers:
                if getattr(tracker, "logging_dir", "") is None:  # TensorBoard: as the Trainer's own has made it
                    folder = self.folder / default_logdir()
                    made = max(folder.parent.glob("*"), key=lambda path: path.stat().st_mtime, default=folder)
                    tracker.logging_dir = str(made)
        for tracker in self._trackers:
            tracker.on_log(self.args, self.state, self.control, model=self.model, logs=dict(logs))

    def close(self) -> None:
        """Close what is open and let the optimizer go, once every member has heard of the training's end."""
        if not all(member.ended for member in self.members):
            return
        self.optimizer = self.scheduler = None  # a callback that is kept for its report holds on to the session
        for tracker in self._trackers or ():
            if getattr(tracker, "tb_writer", None) is not None:
                tracker.tb_writer.close()  # what was logged is on the disk then
