"""A learning-rate schedule of its own for each retraining, on the Trainer's own scheduler object."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from ..core.caller import warn_caller
from ..pruning.config import MPruneConfig
from .machine import Progress
from .session import Session

__all__ = ["LearningRate", "is_trainers_own", "resume_rewound", "rewind"]


class LearningRate:
    """The learning rate of one run's retrainings, each with a schedule of its own."""

    def __init__(self, config: MPruneConfig, session: Session, progress: Progress) -> None:
        self._config = config
        self._session = session
        self._scheduler = session.scheduler
        self._args = session.args
        self._max_steps = session.state.max_steps
        self._progress = progress
        self._told: set[int] = set()  # lengths of schedules whose warm-up has been told of

    @cached_property
    def _own(self) -> bool:
        """Whether the scheduler is the Trainer's own; found out before anything is changed about it."""
        return is_trainers_own(self._scheduler, self._args, self._max_steps)

    def rewind(self, step: int, steps: int) -> None:
        """Give the steps that follow a learning rate that begins anew, unless they are the whole training."""
        self._progress.rewound = None
        if not self._config.rewind_lr or (step == 0 and steps == self._max_steps):
            return
        whole = self._max_steps
        if not rewind(self._scheduler, self._args, steps, own=self._own, whole=whole):
            return
        self._progress.rewound = [step, steps, whole]
        asked, taken = self._args.get_warmup_steps(steps), warmup_steps(self._args, steps, whole)
        if not self._own or asked == taken or steps in self._told:
            return
        if not _alike(_fresh(self._scheduler, self._args, steps), self._scheduler):  # it has a warm-up at all
            self._told.add(steps)
            self._session.say(
                f"The learning rate's warm-up of {asked} steps would take more than half of a retraining of {steps} "
                f"steps. It is shortened to {taken}, in proportion to the whole training's {whole} steps; a "
                "warmup_steps below 1 is a share of each."
            )

    def resume(self, to_the_end: bool) -> None:
        """Put the schedule back that a resumed run had; to_the_end: of a training that may be longer now."""
        if self._progress.rewound is None:
            return
        began, steps, *whole = self._progress.rewound
        if to_the_end:
            steps, whole = self._max_steps - began, [self._max_steps]
            self._progress.rewound = [began, steps, *whole]
        done, own = self._session.step - began, self._own
        resume_rewound(self._scheduler, self._args, steps, done, own=own, whole=whole[0] if whole else self._max_steps)


def warmup_steps(args: TrainingArguments, steps: int, whole: int | None = None) -> int:
    """Warm-up of a schedule of so many steps, in a training of `whole` steps (None: the schedule is all of it).

    A warm-up that is given in steps is meant for the whole training. Where it would take more than half of a
    retraining, it takes the share of it that it takes of the whole training, and half at most.
    """
    asked = int(args.get_warmup_steps(steps))
    if whole is None or args.warmup_steps < 1 or 2 * asked <= steps:
        return asked
    return min(steps * asked // whole, steps // 2)


def is_trainers_own(scheduler: Any, args: TrainingArguments, max_steps: int) -> bool:
    """Whether a scheduler is what the Trainer makes for a training of so many steps, and not the user's."""
    if not isinstance(scheduler, LambdaLR):
        return False
    fresh = _fresh(scheduler, args, max_steps)
    return isinstance(fresh, LambdaLR) and _alike(fresh, scheduler)


def rewind(scheduler: Any, args: TrainingArguments, steps: int, *, own: bool, whole: int | None = None) -> bool:
    """Start the schedule again, in place. Whether it could be done: others than `LambdaLR` go on, with a warning.

    Args:
        own: whether it is the Trainer's own: it is made anew, with warm-up and decay over so many steps. One of the
            user starts again at its step 0 as it is.
        whole: steps of the training that it is a part of, as in `warmup_steps`.
    """
    if not isinstance(scheduler, LambdaLR):
        if scheduler is not None:
            warn_caller(
                f"The learning rate cannot be rewound for a {type(scheduler).__name__}: it goes on as it is in each "
                "retraining. Use one of transformers' schedules (lr_scheduler_type) or a LambdaLR, or set "
                "rewind_lr=False if this is what you want.",
            )
        return False
    if own:
        scheduler.lr_lambdas = _fresh(scheduler, args, steps, whole).lr_lambdas
    _go_to(scheduler, 0)
    return True


def resume_rewound(
    scheduler: Any, args: TrainingArguments, steps: int, position: int, *, own: bool, whole: int | None = None
) -> None:
    """Put a resumed run's scheduler, which knows only the whole training, back into a retraining's schedule.

    Args:
        position: steps that are done; they count only where the checkpoint has no scheduler state (save_only_model).
        own, whole: as in `rewind`.
    """
    if isinstance(scheduler, LambdaLR):
        if own:
            scheduler.lr_lambdas = _fresh(scheduler, args, steps, whole).lr_lambdas
        if scheduler.last_epoch == 0 and position > 0:
            _go_to(scheduler, position)


def _fresh(scheduler: LambdaLR, args: TrainingArguments, steps: int, whole: int | None = None) -> Any:
    """What the Trainer would make for a training of so many steps; lengths in steps that do not fit are shortened."""
    warmup = warmup_steps(args, steps, whole)
    settings: Any = args.lr_scheduler_kwargs or {}
    room, share = steps - warmup, steps / whole if whole else 1.0
    lengths = {name: settings.get(name) for name in ("num_decay_steps", "num_stable_steps")}
    lengths = {name: length for name, length in lengths.items() if isinstance(length, int)}
    if share < 1 and sum(lengths.values()) > room:
        fitting = {name: min(int(length * share), room // len(lengths)) for name, length in lengths.items()}
        settings = {**settings, **fitting}
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in scheduler.base_lrs]
    return get_scheduler(
        args.lr_scheduler_type,
        # some schedules read the default rate of their optimizer
        optimizer=torch.optim.SGD(groups, lr=_default_rate(scheduler)),
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=settings,
    )


def _default_rate(scheduler: LambdaLR) -> float:
    """The rate that an optimizer was made with; one of DeepSpeed does not tell."""
    try:
        return float(scheduler.optimizer.defaults["lr"])
    except AttributeError:
        return float(scheduler.base_lrs[0])


def _alike(one: LambdaLR, other: LambdaLR) -> bool:
    """Whether the functions of two schedules do the same."""

    def content(function: Any) -> tuple[Any, Any, Any]:
        inner = getattr(function, "func", function)
        return getattr(inner, "__code__", inner), getattr(function, "args", ()), getattr(function, "keywords", {})

    return list(map(content, one.lr_lambdas)) == list(map(content, other.lr_lambdas))


def _go_to(scheduler: LambdaLR, position: int) -> None:
    rates = [base * function(position) for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": position, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
