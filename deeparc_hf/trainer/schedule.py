"""The schedule of a training with prunings in it, and the verdict on each of them. Pure: no model, no Trainer.

The algorithm is MPruner's (arXiv 2408.13482): train, prune, retrain, judge; accept and prune the smaller model again
with the same stride, or take the pruning back and try the next larger stride, which removes less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError, RecordError
from ..pruning.config import MPruneConfig
from ..reports.phases import BEFORE, FINISHED, RETRAINING
from .saved import Saved

__all__ = [
    "Progress",
    "Verdict",
    "check_epochs",
    "find_metric",
    "judge",
    "needed_epochs",
    "refuse_changes",
    "same_metric",
]

_FOLDERS, _NAME = ("snapshot", "teacher"), re.compile(r"[\w-]+")
_FIXED = ("start_epoch", "k", "metric", "greater_is_better", "baseline")


@dataclass
class Progress(Saved):
    """Where a run stands: all that a resumed run needs to go on. JSON types only; lives in the Trainer's
    trainer_state.json.

    Attributes:
        k: stride of the pruning at hand, or of the next one.
        phase: BEFORE, RETRAINING or FINISHED.
        accepted: number of prunings that were accepted.
        boundary: optimizer step at which this phase ends.
        steps_per_epoch: optimizer steps of an epoch, in which the boundaries are counted; None where the data has no
            length.
        pruned_at: optimizer step of the last pruning; None before the first.
        baseline: the metric that later ones are compared with; None if not known yet.
        measured_at: optimizer step at which the gate's metric was measured last.
        value: that metric.
        decision: verdict on the pruning at hand, from its boundary until it is carried out: "accept" or "reject"; None
            before.
        reason: why the run is FINISHED, or why the decision is what it is.
        stopped: whether the training was asked to stop, because nothing is left to do.
        rewound: step at which the learning rate was rewound last, the number of steps of its schedule, and that of the
            whole training then; None if it was not.
        start, base, record: records (as dicts) of the model when the run began, of the last accepted model, and as it
            is now.
        frozen, base_frozen: blocks that this run froze, by stack, in the model as it is now and in the last accepted
            one.
        snapshot: name of the folder with the accepted weights; None where nothing can be taken back.
        teacher: name of the folder with the weights of the unpruned model, which teaches; None where none does.
        attempts: what the report says of each pruning, and first of the model before them.
    """

    k: int
    phase: str = BEFORE
    accepted: int = 0
    boundary: int = 0
    steps_per_epoch: int | None = None
    pruned_at: int | None = None
    baseline: float | None = None
    measured_at: int | None = None
    value: float | None = None
    decision: str | None = None
    reason: str | None = None
    stopped: bool = False
    rewound: list[int] | None = None
    start: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    frozen: dict[str, list[int]] = field(default_factory=dict)
    base_frozen: dict[str, list[int]] = field(default_factory=dict)
    snapshot: str | None = None
    teacher: str | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Any) -> Progress:
        """The inverse of `to_dict`.

        Raises:
            RecordError: if the data is not a progress, or was written by another version of this package.
        """
        fields = cls.fields_of(data)
        whole = fields is not None and fields["phase"] in (BEFORE, RETRAINING, FINISHED) and type(fields["k"]) is int
        # names of folders beside the checkpoint, and nowhere else
        if not whole or not all(
            fields[n] is None or (isinstance(fields[n], str) and _NAME.fullmatch(fields[n])) for n in _FOLDERS
        ):
            raise RecordError(
                "The checkpoint's trainer_state.json does not tell where the pruning stood, or another version of "
                "deeparc_hf wrote it. Resume with the version that wrote it, or start a new run from the checkpoint's "
                "model."
            )
        return cls(**fields)


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a pruning: whether it stays, by how much the metric got worse, and why."""

    accepted: bool
    drop: float
    reason: str


def needed_epochs(config: MPruneConfig) -> int:
    """Epochs of a run in which every pruning is accepted."""
    return config.start_epoch + config.iterations * config.retrain_epochs


def check_epochs(config: MPruneConfig, max_steps: int, steps_per_epoch: int | None, by_steps: bool) -> None:
    """Check that a training is long enough for the schedule.

    Args:
        config: the settings.
        max_steps: optimizer steps of the training.
        steps_per_epoch: optimizer steps of an epoch; None where the data has no length.
        by_steps: whether the training's length was given in steps; the last retraining may then be shorter than
            retrain_epochs.

    Raises:
        ConfigError: saying how many epochs are needed.
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
            f"retrain_epochs."
        )


def refuse_changes(
    began_with: Mapping[str, Any], config: MPruneConfig, progress: Progress, steps_per_epoch: int | None
) -> dict[str, str]:
    """Compare the settings of a resumed run with those that it began with.

    Returns:
        What else changed, by setting; it counts from here on.

    Raises:
        ConfigError: if what was decided already would have been decided otherwise, or boundaries would fall elsewhere.
    """
    now = config.to_dict()
    keys = [key for key in now if key in began_with and key != "keep_snapshots"]
    changed = {key: f"{began_with[key]} -> {now[key]}" for key in keys if began_with[key] != now[key]}
    fixed = [key for key in _FIXED if key in changed]
    fixed += [key for key in ("max_drop", "distill") if key in changed and None in (began_with[key], now[key])]
    shown = [f"{key} {changed[key]}" for key in fixed]
    if progress.steps_per_epoch != steps_per_epoch:
        shown.append(f"optimizer steps of an epoch {progress.steps_per_epoch} -> {steps_per_epoch}")
    if shown:
        raise ConfigError(
            f"A run cannot be resumed with these changes: {', '.join(shown)}. Resume with what it began with, or load "
            f"the model from the checkpoint's folder and start a new run."
        )
    return changed


def same_metric(one: str | None, other: str | None) -> bool:
    """Whether two names mean one metric: the Trainer's "eval_" may be there or not."""
    return one is not None and other is not None and one.removeprefix("eval_") == other.removeprefix("eval_")


def find_metric(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric by its name, with or without the Trainer's "eval_"; None if it is not there."""
    value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
    return None if value is None else float(value)


def judge(config: MPruneConfig, name: str, baseline: float, value: float, greater_is_better: bool) -> Verdict:
    """Whether a retrained model is good enough."""
    drop = baseline - value if greater_is_better else value - baseline
    allowed = float(config.max_drop or 0.0)
    if not math.isfinite(value):
        return Verdict(False, drop, f"{name} is {value:g} after the retraining, and was {baseline:.6g}")
    # 0.8 - 0.7 is more than 0.1 for a computer, and for nobody else
    accepted = drop <= allowed or math.isclose(drop, allowed, rel_tol=1e-9, abs_tol=1e-12)
    change = f"{name} went from {baseline:.4g} to {value:.4g}"
    change += f", {'worse' if drop > 0 else 'better'} by {abs(drop):.4g}" if drop else ", unchanged"
    return Verdict(accepted, drop, f"{change} ({'' if accepted else 'only '}a drop of up to {allowed:g} is allowed)")
