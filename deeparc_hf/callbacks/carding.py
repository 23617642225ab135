"""The model card in the output folder, made anew for each push of a Trainer to the Hub."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainingArguments

from ..card.model_card import CARD_FILE, make_card, may_replace
from ..errors import DeepArcWarning

__all__ = ["write_card"]


def write_card(args: TrainingArguments, model: nn.Module | None, processing_class: Any = None) -> None:
    """Write the card of a model as it is now, from the reports in the output folder. One that somebody wrote or edited stays.

    A card that cannot be made is a warning: a training does not end because of it.
    """
    if args.process_index != 0 or model is None:
        return
    folder = Path(args.output_dir)
    try:
        if may_replace(folder / CARD_FILE):
            name = args.hub_model_id or folder.resolve().name
            make_card(model, folder / CARD_FILE, repo_id=name, processing_class=processing_class, reports=folder, own=True)
    except Exception as error:
        warnings.warn(
            f"The model card could not be made ({type(error).__name__}: {error}). The push goes on with the README.md that is there, if "
            "any; deeparc_hf.create_model_card(trainer) makes the card when the cause is gone.",
            DeepArcWarning,
            stacklevel=3,
        )
