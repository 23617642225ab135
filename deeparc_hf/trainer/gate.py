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
    """The gate's metric, and whether a larger one is better: by the config, the Trainer's arguments, or its name."""
    name = config.metric or args.metric_for_best_model or "loss"
    if config.greater_is_better is not None:
        return name, config.greater_is_better
    given, rule = _given(name, args), not name.endswith("loss")
    if given is not None and given != rule:
        return name, given  # the Trainer's arguments are filled in by its rule, so this one was said
    by_name = larger_is_better(name)
    return name, rule if by_name is None else by_name


def direction_is_doubtful(config: MPruneConfig, args: TrainingArguments) -> str | None:
    """Why it is not sure whether a larger value of the gate's metric is better, and what to do; None where it is."""
    name, greater = metric_of(config, args)
    if not config.gated or config.greater_is_better is not None:
        return None
    given = _given(name, args)
    if larger_is_better(name) is None and given in (None, not name.endswith("loss")):
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


def _given(name: str, args: TrainingArguments) -> bool | None:
    """What the Trainer's arguments say of a metric: whether a larger value is better."""
    return args.greater_is_better if _is_best_metric(name, args) else None


def _is_best_metric(name: str, args: TrainingArguments) -> bool:
    best = args.metric_for_best_model
    return best is not None and name.removeprefix("eval_") == best.removeprefix("eval_")


def check_gate(config: MPruneConfig, args: TrainingArguments) -> None:
    """Refuse a gate that cannot measure its metric, or that judges by another one than the best checkpoint."""
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
    agrees = _is_best_metric(metric, args) and bool(args.greater_is_better) == greater_is_better
    if args.load_best_model_at_end and not agrees:
        raise ConfigError(
            f"The gate judges by {metric} ({'larger' if greater_is_better else 'smaller'} is better), but "
            f"load_best_model_at_end would deliver the checkpoint that is best by {args.metric_for_best_model} "
            f"({'larger' if args.greater_is_better else 'smaller'} is better), which the gate may not accept. Set "
            f"metric_for_best_model={metric!r} and greater_is_better={greater_is_better} in TrainingArguments, or give "
            "the callback the same metric."
        )


def check_measured(config: MPruneConfig, args: TrainingArguments, trainer: Any) -> None:
    """Refuse a gate on a metric that a stock Trainer cannot give; another class may have metrics of its own."""
    name = metric_of(config, args)[0]
    is_stock = type(trainer).__module__.partition(".")[0] == "transformers"
    is_computed = not name.endswith(("loss", "runtime", "per_second"))
    if config.gated and is_stock and is_computed and trainer.compute_metrics is None:
        raise ConfigError(
            f"max_drop bounds {name!r}, and the Trainer has no compute_metrics that could give it: it measures the "
            "loss alone. Give the Trainer compute_metrics, or set metric='loss'."
        )


def find_metric(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric by its name, with or without the Trainer's "eval_"; None if it is not there."""
    value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
    return None if value is None else float(value)


_SMALLER = """
    loss losses error errors err wer cer ter mer wil eer der rmse mse mae mape smape wape mase msle rmsle nrmse medae
    mdape perplexity perplexities ppl nll bpb bpc bpw bits crossentropy fid kid lpips hamming brier ece mce distance
    distances divergence kl kld jsd emd crps mpjpe deviation deviance residual regret toxicity latency false fpr fnr
    absrel sqrel
"""
_LARGER = """
    accuracy accuracies acc precision recall fbeta bleu sacrebleu gleu chrf rouge meteor cider spice bertscore bleurt
    comet auc auroc auprc aucpr prauc map ap mrr ndcg hit hits mcc matthews pearson pearsonr spearman spearmanr
    kendall kendalltau correlation kappa exact em r2 iou miou dice jaccard psnr ssim likelihood reward rewards
    sensitivity specificity tpr tnr ppv npv pck correct wip
"""
_LARGER_ALONE = "score scores similarity match matches top"  # where nothing else is said: a Brier score is an error
_FAMILIES = re.compile(r"(rouge|bleu|chrf|top|f)[0-9]+|rouge[a-z]*")
_PHRASES = {"cross_entropy": False, "squared_error": False, "absolute_error": False, "pass_at": True}


def larger_is_better(name: str) -> bool | None:
    """Whether a larger value of a metric is better, by its name; None where the name does not say.

    Names are read in parts: "eval_word_error_rate", "rougeLsum", "valid/wer". A first part "neg" or "negative" turns
    the rest round, as in scikit-learn's "neg_mean_squared_error" and in "negative_log_likelihood".
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", name.removeprefix("eval_"))
    parts = [part for part in re.split(r"[^a-z0-9]+", spaced.lower()) if part]
    if parts and parts[-1].endswith("loss"):
        return False  # the Trainer's rule
    turned = len(parts) > 1 and parts[0] in ("neg", "negative")
    parts = parts[1:] if turned else parts
    said = {larger for phrase, larger in _PHRASES.items() if phrase in "_".join(parts)}
    said |= {False for part in parts if part in _SMALLER.split()}
    said |= {True for part in parts if part in _LARGER.split() or _FAMILIES.fullmatch(part)}
    said = said or {True for part in parts if part in _LARGER_ALONE.split()}
    return said.pop() != turned if len(said) == 1 else None
