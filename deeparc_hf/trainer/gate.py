"""What the gate and the schedule need to know of the Trainer's arguments."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerState, TrainingArguments

from ..architectures.hosts import is_adapted
from ..errors import ConfigError
from ..pruning.config import MPruneConfig
from .metric_names import larger_is_better
from .schedule import same_metric
from .untrained import untrained_weights

__all__ = [
    "check_gate",
    "check_measured",
    "direction_is_doubtful",
    "forget_best",
    "metric_of",
    "pruned_untrained",
    "steps_per_epoch",
]


def metric_of(config: MPruneConfig, args: TrainingArguments) -> tuple[str, bool]:
    """The gate's metric, and whether a larger one is better: as the config says, or the Trainer's arguments, or its
    name.
    """
    name = config.metric or args.metric_for_best_model or "loss"
    if config.greater_is_better is not None:
        return name, config.greater_is_better
    given = args.greater_is_better if same_metric(name, args.metric_for_best_model) else None
    if given is not None and given != _trainers_rule(name):
        return name, given  # the Trainer's arguments are filled in by its rule, so this one was said
    by_name = larger_is_better(name)
    return name, _trainers_rule(name) if by_name is None else by_name


def direction_is_doubtful(config: MPruneConfig, args: TrainingArguments) -> str | None:
    """Why it is not sure whether a larger value of the gate's metric is better, and what to do; None where it is."""
    name, greater = metric_of(config, args)
    if not config.gated or config.greater_is_better is not None:
        return None
    given = args.greater_is_better if same_metric(name, args.metric_for_best_model) else None
    if larger_is_better(name) is None and given in (None, _trainers_rule(name)):
        return (
            f"max_drop bounds {name!r}, whose name does not say whether a larger value is better. It is taken as "
            f"better when {'larger' if greater else 'smaller'}. Give greater_is_better=True or False beside metric."
        )
    if given is not None and given != greater:
        return (
            f"max_drop bounds {name!r}, which is better when {'larger' if greater else 'smaller'}; TrainingArguments "
            f"has greater_is_better={given} for it (the Trainer's own default for every name that does not end in "
            f"'loss'), by which the worst checkpoint is the best. Set greater_is_better={greater} there, or give the "
            f"callback greater_is_better={given} if so meant."
        )
    return None


def pruned_untrained(config: MPruneConfig, model: nn.Module) -> str | None:
    """Why it is doubtful to prune the model when the training begins, and what to do; None where it is not."""
    # an adapter begins at random, and changes nothing then
    names = untrained_weights(model) if config.start_epoch == 0 and not is_adapted(model) else []
    if not names:
        return None
    which = " and ".join(names) if len(names) < 3 else f"{names[0]}, {names[1]} and {len(names) - 2} more parameters"
    return (
        f"The model is pruned when the training begins (start_epoch=0), and it cannot do its task yet: {which} "
        f"{'is' if len(names) == 1 else 'are'} as drawn at random. Such a model does not tell which blocks can go. "
        f"Fine-tune it first: give start_epoch=1 or more, and as many more epochs of training."
    )


def _trainers_rule(name: str) -> bool:
    return not name.endswith("loss")


def check_gate(config: MPruneConfig, args: TrainingArguments) -> None:
    """Check that the gate can measure its metric, and that what it judges is what the training delivers.

    Raises:
        ConfigError: saying what to set in TrainingArguments.
    """
    metric, greater_is_better = metric_of(config, args)
    if not config.gated:
        return
    if args.eval_strategy == "no":
        raise ConfigError(
            "max_drop needs evaluations to judge a pruning by, and the Trainer makes none. Set eval_strategy='epoch' "
            "in TrainingArguments, and give the Trainer an eval_dataset."
        )
    if config.start_epoch == 0 and config.baseline is None and not args.eval_on_start:
        raise ConfigError(
            f"max_drop compares with {metric} before the first pruning, which start_epoch=0 puts before every "
            f"evaluation. Set eval_on_start=True in TrainingArguments, give baseline=..., or fine-tune first with "
            f"start_epoch=1 or more."
        )
    best = args.metric_for_best_model
    if args.load_best_model_at_end and (
        not same_metric(metric, best) or bool(args.greater_is_better) != greater_is_better
    ):
        raise ConfigError(
            f"The gate judges by {metric} ({'larger' if greater_is_better else 'smaller'} is better), but "
            f"load_best_model_at_end would deliver the checkpoint that is best by {best} "
            f"({'larger' if args.greater_is_better else 'smaller'} is better), which the gate may not accept. Set "
            f"metric_for_best_model={metric!r} and greater_is_better={greater_is_better} in TrainingArguments, or give "
            f"the callback the same metric."
        )


def check_measured(config: MPruneConfig, args: TrainingArguments, trainer: Any) -> None:
    """Refuse a gate on a metric that a stock Trainer cannot give; a Trainer of another class may have metrics of its
    own.

    Raises:
        ConfigError: if the metric is none of those that every evaluation has, and there is nothing to compute it.
    """
    name = metric_of(config, args)[0]
    is_stock = type(trainer).__module__.partition(".")[0] == "transformers"
    if (
        config.gated
        and is_stock
        and trainer.compute_metrics is None
        and not name.endswith(("loss", "runtime", "per_second"))
    ):
        raise ConfigError(
            f"max_drop bounds {name!r}, and the Trainer has no compute_metrics that could give it: it measures the "
            f"loss alone. Give the Trainer compute_metrics, or set metric='loss'."
        )


def steps_per_epoch(loader: Any, args: TrainingArguments) -> int | None:
    """Optimizer steps of an epoch, as the Trainer counts them; None where the data has no length."""
    try:
        batches = len(loader)
    except TypeError:
        return None
    return max(-(-batches // args.gradient_accumulation_steps), 1)


def forget_best(state: TrainerState) -> None:
    """A checkpoint of another structure must not be the best."""
    state.best_metric = state.best_model_checkpoint = None
    state.best_global_step = None
