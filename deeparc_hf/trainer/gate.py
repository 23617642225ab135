"""The metric that the gate judges by: which it is, whether a larger value is better, and whether it can be measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigError
from ..pruning.config import MPruneConfig

__all__ = ["check_gate", "check_measured", "direction_is_doubtful", "find_metric", "larger_is_better", "metric_of"]


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
            "evaluation. Set eval_on_start=True in TrainingArguments, give baseline=..., or fine-tune first with "
            "start_epoch=1 or more."
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
            "the callback the same metric."
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
            "loss alone. Give the Trainer compute_metrics, or set metric='loss'."
        )


def same_metric(one: str | None, other: str | None) -> bool:
    """Whether two names mean one metric: the Trainer's "eval_" may be there or not."""
    return one is not None and other is not None and one.removeprefix("eval_") == other.removeprefix("eval_")


def find_metric(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric by its name, with or without the Trainer's "eval_"; None if it is not there."""
    value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
    return None if value is None else float(value)


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_SMALLER = _words(
    "loss losses error errors err wer cer ter mer wil eer der rmse mse mae mape smape wape mase msle rmsle nrmse medae "
    "mdape",
    "perplexity perplexities ppl nll bpb bpc bpw bits crossentropy fid kid lpips hamming brier ece mce distance "
    "distances divergence kl",
    "kld jsd emd crps mpjpe deviation deviance residual regret toxicity latency false fpr fnr absrel sqrel",
)
_LARGER = _words(
    "accuracy accuracies acc precision recall fbeta bleu sacrebleu gleu chrf rouge meteor cider spice bertscore bleurt "
    "comet auc auroc",
    "auprc aucpr prauc map ap mrr ndcg hit hits mcc matthews pearson pearsonr spearman spearmanr kendall kendalltau "
    "correlation kappa",
    "exact em r2 iou miou dice jaccard psnr ssim likelihood reward rewards sensitivity specificity tpr tnr ppv npv pck "
    "correct wip",
)
# they say something only where nothing else does: a Brier score is an error
_LARGER_ALONE = _words("score scores similarity match matches top")
_FAMILIES = re.compile(r"(rouge|bleu|chrf|top|f)[0-9]+|rouge[a-z]*")
_PHRASES = {"cross_entropy": False, "squared_error": False, "absolute_error": False, "pass_at": True}
_NEGATED = ("neg", "negative")


def larger_is_better(name: str) -> bool | None:
    """Whether a larger value of a metric is better, by its name; None where the name does not say.

    Names are read in parts: "eval_word_error_rate", "rougeLsum", "valid/wer". A first part "neg" or "negative" turns
    the rest round, as in scikit-learn's "neg_mean_squared_error" and in "negative_log_likelihood".
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name.removeprefix("eval_"))
    parts = [part for part in re.split(r"[^a-z0-9]+", spaced.lower()) if part]
    if parts and parts[-1].endswith("loss"):
        return False  # the Trainer's rule
    turned = len(parts) > 1 and parts[0] in _NEGATED
    found = _direction(parts[1:] if turned else parts)
    return found if found is None else found != turned


def _direction(parts: list[str]) -> bool | None:
    joined = "_".join(parts)
    smaller = any(part in _SMALLER for part in parts) or any(
        phrase in joined for phrase, larger in _PHRASES.items() if not larger
    )
    larger = any(part in _LARGER or _FAMILIES.fullmatch(part) for part in parts)
    larger = larger or any(phrase in joined for phrase, is_larger in _PHRASES.items() if is_larger)
    if smaller and larger:
        return None
    if smaller or larger:
        return larger
    return True if any(part in _LARGER_ALONE for part in parts) else None
