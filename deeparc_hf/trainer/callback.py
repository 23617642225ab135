"""What the callbacks have in common: one session for a training, and a push to the Hub brings a new card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..architectures.adapters import is_adapted
from ..core.caller import warn_caller
from ..core.plain_text import plain
from ..errors import DeepArcWarning
from ..publish.card import CARD_FILE, make_card
from ..publish.merging import kept_message, may_replace
from ..publish.overview import ENDING
from .session import Member, Session

__all__ = ["SessionCallback"]

_SHOWN = ("epoch_begin", "step_begin", "epoch_end", "evaluated", "evaluated_after_end", "end")


class SessionCallback(TrainerCallback, ExportableState):
    """A callback whose work in one training is a `Member` of that training's session."""

    session: Session | None = None  # the training that began last in this process
    _run: Member | None = None
    _others: Sequence[TrainerCallback] = ()  # in the same Trainer

    def __init__(self, calibration: Dataset[Any] | Iterable[Any] | None) -> None:
        self.calibration = calibration
        self.saved_progress: dict[str, Any] | None = None  # where the work stood, as a checkpoint keeps it

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are of the settings, not of a training."""
        of_a_training = ("_run", "session", "_others", "_link", "_doubt")
        return {name: value for name, value in self.__dict__.items() if name not in of_a_training}

    def _saved(self, state: TrainerState) -> tuple[dict[str, Any], Any]:
        """What the resumed checkpoint notes: settings, and where the work stood; empty where it notes nothing."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        saved = saved[0] if isinstance(saved, list) and saved else saved
        saved = saved if isinstance(saved, dict) else {}
        return saved.get("args", {}), saved.get("attributes", {}).get("saved_progress")

    def _tell(self, event: str, control: TrainerControl, *what: Any) -> None:
        """Have the run act on an event of the Trainer."""
        if self._run is not None and self.session is not None:
            self.session.control = control
            getattr(self._run, event)(*what)
            if event in _SHOWN:
                self._publish()

    def _publish(self) -> None:
        """Show what the run has come to in the callback's attributes."""

    # ---- the Trainer's events ----

    def on_epoch_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("epoch_begin", control)

    def on_step_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("step_begin", control)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("before_optimizer", control)

    def on_optimizer_step(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("after_optimizer", control)

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("step_end", control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("epoch_end", control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._run is None or self.session is None:
            return
        what = kwargs.get("metrics") or {}, kwargs.get("eval_dataloader")
        if not self._run.ended:
            self.session.evaluations.notice(*what)
            self._tell("evaluated", control, *what)
        elif kwargs.get("model") is self.session.model:
            self._tell("evaluated_after_end", control, *what)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the card of the model as it is now, from the reports in the output folder. One that somebody wrote or
        edited stays, and one that cannot be made is a warning: a training does not end because of it.
        """
        model, folder = kwargs.get("model"), Path(args.output_dir)
        if self._run is None or args.process_index != 0 or model is None:
            return
        if is_adapted(model):
            return  # what is pushed is adapters alone, whose card is PEFT's
        # the last save of a training comes before its callbacks hear of its end
        over = control.should_training_stop or 0 < state.max_steps <= state.global_step
        try:
            if not may_replace(folder / CARD_FILE):
                how = "delete it, or deeparc_hf.push_to_hub(trainer, overwrite=True)"
                warn_caller(kept_message(folder / CARD_FILE, how))
                return
            make_card(
                model,
                folder / CARD_FILE,
                repo_id=args.hub_model_id or folder.resolve().name,
                processing_class=kwargs.get("processing_class"),
                reports=folder,
                own=True,
                **({"phase": ENDING} if over else {}),
            )
        except DeepArcWarning:  # where warnings are errors
            raise
        except Exception as error:
            warn_caller(
                f"The model card could not be made ({type(error).__name__}: {plain(error, 400)}). The push goes on "
                "with the README.md that is there, if any; deeparc_hf.create_model_card(trainer) makes the card when "
                "the cause is gone.",
            )

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("end", control)
        session, run = self.session, self._run
        adapted = session is not None and is_adapted(session.model)
        if session is not None and run is not None and run is session.members[0] and args.push_to_hub and not adapted:
            session.say(_KEEP_CARD)  # once for all callbacks


# `Trainer.push_to_hub` and `Trainer.save_model` write the Trainer's own draft over README.md right before they upload,
# after the last event that a callback hears of; no argument of either keeps the card
_KEEP_CARD = (
    "To publish with the card of this model: deeparc_hf.push_to_hub(trainer). The Trainer's own push_to_hub() and "
    "save_model() replace the card by their draft, unless you say before: "
    "trainer.create_model_card = functools.partial(deeparc_hf.create_model_card, trainer)"
)
