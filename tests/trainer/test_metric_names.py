"""Which direction the name of a metric says, and what the gate makes of it."""

from __future__ import annotations

import warnings

import pytest
from transformers import TrainingArguments

from deeparc_hf import MPruneConfig
from deeparc_hf.errors import ConfigError
from deeparc_hf.trainer.gate import check_gate, direction_is_doubtful, find_metric, larger_is_better, metric_of


def words(*lines):
    return " ".join(lines).split()


SMALLER = words(
    "loss eval_loss wer eval_wer cer ter mer eer rmse mse mae mape smape perplexity ppl eval_test_ppl nll "
    "bits_per_byte bpb fid hamming",
    "brier brier_score word_error_rate characterErrorRate mean_squared_error root-mean-squared-error WER "
    "cosine_distance kl_divergence",
    "cross_entropy log_loss hamming_loss accuracy_loss negative_log_likelihood valid/wer false_positive_rate "
    "calibration_error",
)
LARGER = words(
    "accuracy eval_accuracy acc f1 macro_f1 f1_macro precision recall bleu sacrebleu bleu4 rouge1 rouge2 rougeL "
    "rougeLsum chrf chrf++",
    "meteor auc roc_auc average_precision map map_50 mcc matthews_correlation pearson pearsonr spearman spearmanr "
    "spearman_cosine",
    "exact_match em r2 iou mean_iou score top5 top_1_accuracy ndcg@10 mrr neg_mean_squared_error rewards/accuracies "
    "log_likelihood dice",
    "similarity",
)
UNKNOWN = ["quality", "happiness", "eval_custom", "error_f1", "x", "length", "entropy", "samples_per_second"]


@pytest.mark.parametrize(
    ("names", "expected"), [(SMALLER, False), (LARGER, True), (UNKNOWN, None)], ids=["smaller", "larger", "unknown"]
)
def test_names(names, expected):
    assert {name: larger_is_better(name) for name in names} == dict.fromkeys(names, expected)


def gate(folder, metric, said=None, **arguments):
    args = TrainingArguments(str(folder), use_cpu=True, eval_strategy="epoch", report_to="none", **arguments)
    return MPruneConfig(metric=metric, max_drop=0.1, threshold=0.98, start_epoch=1, greater_is_better=said), args


@pytest.mark.parametrize(
    ("metric", "said", "arguments", "greater", "doubt"),
    [
        ("wer", None, {}, False, None),
        ("accuracy", None, {}, True, None),
        (
            "quality",
            None,
            {},
            True,
            "does not say whether a larger value is better. It is taken as better when larger. Give greater_is",
        ),
        ("quality", False, {}, False, None),
        ("wer", True, {}, True, None),
        # the Trainer fills in True for every name that does not end in "loss"
        ("wer", None, {"metric_for_best_model": "wer"}, False, "Set greater_is_better=False there"),
        ("wer", None, {"metric_for_best_model": "eval_wer", "greater_is_better": False}, False, None),
        ("quality", None, {"metric_for_best_model": "quality"}, True, "does not say"),
        ("quality", None, {"metric_for_best_model": "quality", "greater_is_better": False}, False, None),
        ("accuracy", None, {"metric_for_best_model": "accuracy"}, True, None),
        (None, None, {}, False, None),
        (None, None, {"metric_for_best_model": "rmse"}, False, "the worst checkpoint is the best"),
    ],
)
def test_the_gate_goes_the_right_way_or_says_that_it_is_not_sure(tmp_path, metric, said, arguments, greater, doubt):
    config, args = gate(tmp_path, metric, said, **arguments)
    assert metric_of(config, args)[1] is greater
    found = direction_is_doubtful(config, args)
    assert (found is None) if doubt is None else (doubt in found)
    # nothing is judged
    assert direction_is_doubtful(config.replace(max_drop=None, greater_is_better=None), args) is None


@pytest.mark.parametrize(
    ("metric", "best", "expected"), [(None, None, "loss"), (None, "wer", "wer"), ("f1", "wer", "f1")]
)
def test_the_loss_is_the_metric_unless_another_is_named(tmp_path, metric, best, expected):
    arguments = {} if best is None else {"metric_for_best_model": best}
    assert metric_of(*gate(tmp_path, metric, **arguments))[0] == expected


def test_the_worst_checkpoint_is_not_delivered_as_the_best(tmp_path):
    arguments = {"metric_for_best_model": "wer", "load_best_model_at_end": True, "save_strategy": "epoch"}
    with pytest.raises(
        ConfigError, match="metric_for_best_model='wer' and greater_is_better=False in TrainingArguments"
    ):
        check_gate(*gate(tmp_path, "wer", **arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_gate(*gate(tmp_path, "wer", **arguments, greater_is_better=False))


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy"])
def test_metric_is_found_with_and_without_the_trainers_prefix(name):
    assert find_metric({"eval_loss": 2.0, "eval_accuracy": 0.75, "accuracy": 0.1}, name) == 0.75


def test_metric_that_is_not_there_is_none_and_zero_is_a_value():
    assert find_metric({"eval_loss": 2.0, "accuracy": 0.5}, "accuracy") is None
    assert find_metric({}, "loss") is None
    found = find_metric({"eval_loss": 0}, "loss")
    assert (found, type(found)) == (0.0, float)
