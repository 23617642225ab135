"""How long a training must be for the prunings that are asked of it, and what may change where it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError
from ..pruning.config import MPruneConfig
from .machine import Progress

__all__ = ["changes_since", "check_epochs", "for_training", "needed_epochs", "other_epochs", "refuse_changes"]

_FIXED = ("start_epoch", "k", "metric", "greater_is_better", "baseline")


def needed_epochs(config: MPruneConfig) -> int:
    """Epochs of a run in which every pruning is accepted."""
    return config.start_epoch + config.iterations * config.retrain_epochs


def for_training(
    config: MPruneConfig, max_steps: int, steps_per_epoch: int | None, eval_on_start: bool
) -> MPruneConfig:
    """The settings with the schedule filled in where max_drop alone says how far to go: a third of the epochs are for
    fine-tuning, unless something else says what the metric is before the first pruning, and the rest for as many
    prunings as fit.
    """
    if config.target != "max_drop" or steps_per_epoch is None:
        return config
    epochs = max_steps // steps_per_epoch
    known = config.start_epoch > 0 or config.baseline is not None or eval_on_start
    start = config.start_epoch if known else max(1, round(epochs / 3))
    return config.replace(start_epoch=start, iterations=max(1, (epochs - start) // config.retrain_epochs))


def check_epochs(config: MPruneConfig, max_steps: int, steps_per_epoch: int | None, by_steps: bool) -> None:
    """Check that a training is long enough for the schedule.

    Args:
        max_steps, steps_per_epoch: optimizer steps of the training, and of an epoch; None where the data has no length.
        by_steps: whether the training's length was given in steps; the last retraining may then be shorter than
            retrain_epochs.
    """
    if steps_per_epoch is None:
        if config.iterations > 1 or config.start_epoch > 0 or config.gated:
            raise ConfigError(
                "The training data has no length, so it is not known where an epoch ends: only one pruning at the "
                "start is possible (start_epoch=0, iterations=1, no max_drop). Give data with a length for more."
            )
        return
    short = by_steps and not config.gated
    needed = needed_epochs(config) - (config.retrain_epochs if short else 0)
    given = max_steps / steps_per_epoch
    if given < needed or (short and given <= needed):
        steps = needed * steps_per_epoch + short
        remedy = f"max_steps={steps}" if by_steps else f"num_train_epochs={needed}"
        parts = f"start_epoch {config.start_epoch}, then {config.iterations} x retrain_epochs {config.retrain_epochs}"
        raise ConfigError(
            f"The schedule needs {needed} epoch{'' if needed == 1 else 's'}{' and a step more' if short else ''} "
            f"({parts}{', the last of which may be shorter' if short else ''}), but the training has {given:g} (of "
            f"{steps_per_epoch} steps each). Set {remedy} in TrainingArguments, or lower start_epoch, iterations or "
            "retrain_epochs."
        )


def changes_since(began_with: Mapping[str, Any], config: MPruneConfig) -> dict[str, str]:
    """What is set otherwise than it was, by setting."""
    now = config.to_dict()
    keys = [key for key in now if key in began_with and key != "keep_snapshots"]
    return {key: f"{began_with[key]} -> {now[key]}" for key in keys if began_with[key] != now[key]}


def other_epochs(progress: Progress, steps_per_epoch: int | None) -> list[str]:
    """How epochs are longer or shorter than they were; empty where they are not."""
    if progress.steps_per_epoch == steps_per_epoch:
        return []
    return [f"optimizer steps of an epoch {progress.steps_per_epoch} -> {steps_per_epoch}"]


def refuse_changes(
    began_with: Mapping[str, Any], config: MPruneConfig, progress: Progress, steps_per_epoch: int | None
) -> dict[str, str]:
    """What has changed in the settings of a resumed run since it began, by setting; it counts from here on.

    Raises:
        ConfigError: if what was decided already would have been decided otherwise, or boundaries would fall elsewhere.
    """
    changed = changes_since(began_with, config)
    now = config.to_dict()
    fixed = [key for key in _FIXED if key in changed]
    fixed += [key for key in ("max_drop", "distill") if key in changed and None in (began_with[key], now[key])]
    shown = [f"{key} {changed[key]}" for key in fixed] + other_epochs(progress, steps_per_epoch)
    if shown:
        raise ConfigError(
            f"A run cannot be resumed with these changes: {', '.join(shown)}. Resume with what it began with, or load "
            "the model from the checkpoint's folder and start a new run."
        )
    return changed
