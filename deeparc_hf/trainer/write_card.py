"""The model card in the output folder, made anew for each push of a Trainer to the Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..core.plain_text import plain
from ..errors import DeepArcWarning
from ..publish.card import CARD_FILE, make_card, may_replace
from ..publish.merging import kept_message
from ..publish.overview import ENDING
from .session import companions_on

__all__ = ["keep_card_hint", "tell_to_keep_card", "write_card"]


def write_card(
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    model: nn.Module | None,
    processing_class: Any = None,
) -> None:
    """Write the card of a model as it is now, from the reports in the output folder. One that somebody wrote or edited
    stays, and is told.

    A card that cannot be made is a warning: a training does not end because of it.
    """
    if args.process_index != 0 or model is None:
        return
    folder = Path(args.output_dir)
    try:
        if may_replace(folder / CARD_FILE):
            name = args.hub_model_id or folder.resolve().name
            # the last save of a training comes before its callbacks hear of its end
            over = control.should_training_stop or 0 < state.max_steps <= state.global_step
            phase = {"phase": ENDING} if over else {}
            make_card(
                model,
                folder / CARD_FILE,
                repo_id=name,
                processing_class=processing_class,
                reports=folder,
                own=True,
                **phase,
            )
        else:
            how = "delete it, or deeparc_hf.push_to_hub(trainer, overwrite=True)"
            warnings.warn(kept_message(folder / CARD_FILE, how), DeepArcWarning, stacklevel=3)
    except DeepArcWarning:  # where warnings are errors
        raise
    except Exception as error:
        warnings.warn(
            f"The model card could not be made ({type(error).__name__}: {plain(error, 400)}). The push goes on with "
            f"the README.md that is there, if any; deeparc_hf.create_model_card(trainer) makes the card when the cause "
            f"is gone.",
            DeepArcWarning,
            stacklevel=3,
        )


def keep_card_hint(args: TrainingArguments) -> str | None:
    """How to push so that the card stays, for the end of a training that is set up to be pushed; None for any other.

    `Trainer.push_to_hub` and `Trainer.save_model` write the Trainer's own draft over README.md right before they
    upload, after the last event that a callback hears of; no argument of either keeps the card.
    """
    if not args.push_to_hub:
        return None
    return (
        "To publish with the card of this model: deeparc_hf.push_to_hub(trainer). The Trainer's own push_to_hub() and "
        "save_model() replace the card by their draft, unless you say before: "
        "trainer.create_model_card = functools.partial(deeparc_hf.create_model_card, trainer)"
    )


def tell_to_keep_card(args: TrainingArguments, model: nn.Module) -> None:
    """Tell how the card is kept, once for all callbacks of a training."""
    hint, companions = keep_card_hint(args), companions_on(model)
    if hint is not None and not companions.card_told and args.process_index == 0:
        companions.card_told = True
        tqdm.write(hint)
