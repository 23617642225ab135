"""A learning-rate schedule of its own for each retraining, on the Trainer's own scheduler object."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from ..errors import DeepArcWarning

__all__ = ["is_trainers_own", "resume_rewound", "rewind"]


def is_trainers_own(scheduler: Any, args: TrainingArguments, max_steps: int) -> bool:
    """Whether a scheduler is what the Trainer makes for a training of so many steps, and not one that the user has given it."""
    if not isinstance(scheduler, LambdaLR):
        return False
    fresh = _fresh(scheduler, args, max_steps)
    return isinstance(fresh, LambdaLR) and [_content(f) for f in fresh.lr_lambdas] == [_content(f) for f in scheduler.lr_lambdas]


def rewind(scheduler: Any, args: TrainingArguments, steps: int, *, own: bool) -> bool:
    """Start the schedule again, in place.

    Args:
        steps: of the schedule that begins.
        own: whether it is the Trainer's own: it is made anew, with warm-up and decay over so many steps. A `LambdaLR` of the user starts
            again at its step 0 as it is.

    Returns:
        Whether it could be done; other schedulers go on as they are, with a warning.
    """
    if not isinstance(scheduler, LambdaLR):
        if scheduler is not None:
            warnings.warn(
                f"The learning rate cannot be rewound for a {type(scheduler).__name__}: it goes on as it is in each retraining. Use one of "
                "transformers' schedules (lr_scheduler_type) or a LambdaLR, or set rewind_lr=False if this is what you want.",
                DeepArcWarning,
                stacklevel=2,
            )
        return False
    if own:
        scheduler.lr_lambdas = _fresh(scheduler, args, steps).lr_lambdas
    _go_to(scheduler, 0)
    return True


def resume_rewound(scheduler: Any, args: TrainingArguments, steps: int, position: int, *, own: bool) -> None:
    """Put a resumed run's scheduler, which knows only the whole training, back into a retraining's schedule.

    Args:
        steps: of the retraining's schedule.
        position: steps of it that are done. It counts only where the checkpoint has no scheduler state (save_only_model).
        own: as in `rewind`.
    """
    if isinstance(scheduler, LambdaLR):
        if own:
            scheduler.lr_lambdas = _fresh(scheduler, args, steps).lr_lambdas
        if scheduler.last_epoch == 0 and position > 0:
            _go_to(scheduler, position)


def _fresh(scheduler: LambdaLR, args: TrainingArguments, steps: int) -> Any:
    """What the Trainer would make for a training of so many steps, at the same rates."""
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in scheduler.base_lrs]
    return get_scheduler(
        args.lr_scheduler_type,
        # some schedules read the default rate of their optimizer
        optimizer=torch.optim.SGD(groups, lr=scheduler.optimizer.defaults["lr"]),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def _content(function: Any) -> tuple[Any, Any, Any]:
    """What a function of a schedule does: equal for two that were made alike."""
    inner = getattr(function, "func", function)
    return getattr(inner, "__code__", inner), getattr(function, "args", ()), getattr(function, "keywords", {})


def _go_to(scheduler: LambdaLR, position: int) -> None:
    rates = [base * function(position) for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": position, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
