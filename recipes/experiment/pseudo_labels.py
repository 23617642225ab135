"""Training on what a teacher hears: transcripts that the model gives before anything is removed stand for those of the
data (Kim & Rush 2016, arXiv 1606.07947), without those that differ much from them (Gandhi et al. 2023, arXiv
2311.00430).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deeparc_hf.errors import ConfigError

from .arguments import PruningArguments
from .speech import Hearing, word_error_rates

__all__ = ["check_pseudo_labels", "with_pseudo_labels"]


def check_pseudo_labels(asked: bool, most: float | None, pruning: PruningArguments) -> None:
    """Refuse settings that make no sense.

    Raises:
        ConfigError: if nothing would be trained on them, or they would not be the teacher's.
    """
    if most is not None and (not asked or most < 0):
        raise ConfigError(
            f"max_pseudo_wer bounds the error rate of pseudo_labels, found {most:g} and pseudo_labels={asked}. Give a "
            "rate of 0 or more, and --pseudo_labels."
        )
    if asked and (pruning.finetune_epochs > 0 or pruning.retrain_epochs == 0):
        raise ConfigError(
            "pseudo_labels are what the given model hears, and are trained on after the removal, found "
            f"finetune_epochs={pruning.finetune_epochs:g} and retrain_epochs={pruning.retrain_epochs}. Give "
            "finetune_epochs 0 and a retraining; a model that is to be fine-tuned first, fine-tune in a run of its own."
        )


def with_pseudo_labels(
    train: Any, text: str, heard: Sequence[str], hearing: Hearing, most: float | None
) -> tuple[Any, str]:
    """The training data with the labels of what was heard, and a sentence about them. Transcripts with a larger word
    error rate than `most` against the column `text` are left out with their recordings, and so are empty ones.

    Raises:
        ConfigError: if none is left.
    """
    labels = hearing.labels(heard)
    rates = word_error_rates(heard, list(train[text]), hearing.normalize)
    kept = [
        index
        for index, rate in enumerate(rates)
        if heard[index] and len(labels[index]) <= hearing.longest and (most is None or rate <= most)
    ]
    if not kept:
        raise ConfigError(
            f"None of the {len(heard):,} pseudo-labels is left: the lowest error rate is {min(rates):.2f}, found "
            f"max_pseudo_wer={most}. Give a larger one, or leave it out."
        )
    bound = "" if most is None else f", those of a word error rate of at most {most:g} against the data's transcripts"
    told = f"Trained on what the whole model hears in {len(kept):,} of {len(heard):,} training recordings{bound}."
    return train.remove_columns("labels").add_column("labels", labels).select(kept), told
