"""A learning-rate schedule of its own for each retraining, on the Trainer's own scheduler object."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainingArguments, get_scheduler

from ..errors import DeepArcWarning

__all__ = ["resume_rewound", "rewind"]


def rewind(scheduler: Any, args: TrainingArguments, steps: int) -> bool:
    """Start the schedule again, in place: warm-up and decay over so many steps.

    A schedule of transformers (`lr_scheduler_type`) is made anew for that number of steps. A `LambdaLR` of the user
    starts again at its step 0.

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
    _install(scheduler, args, steps)
    _go_to(scheduler, 0)
    return True


def resume_rewound(scheduler: Any, args: TrainingArguments, steps: int, position: int) -> None:
    """Put a resumed run's scheduler, which knows only the whole training, back into a retraining's schedule.

    Args:
        steps: of the retraining's schedule.
        position: steps of it that are done. It counts only where the checkpoint has no scheduler state (save_only_model).
    """
    if isinstance(scheduler, LambdaLR):
        _install(scheduler, args, steps)
        if scheduler.last_epoch == 0 and position > 0:
            _go_to(scheduler, position)


def _install(scheduler: LambdaLR, args: TrainingArguments, steps: int) -> None:
    functions = [getattr(function, "func", function) for function in scheduler.lr_lambdas]
    if any(function.__module__ != "transformers.optimization" for function in functions):
        return
    groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in scheduler.base_lrs]
    fresh: LRScheduler = get_scheduler(
        args.lr_scheduler_type,
        # some schedules read the default rate of their optimizer
        optimizer=torch.optim.SGD(groups, lr=scheduler.optimizer.defaults["lr"]),
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    scheduler.lr_lambdas = fresh.lr_lambdas


def _go_to(scheduler: LambdaLR, position: int) -> None:
    rates = [base * function(position) for base, function in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": position, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
