"""What the name of a metric says about its direction."""

from __future__ import annotations

import re

__all__ = ["larger_is_better"]


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
