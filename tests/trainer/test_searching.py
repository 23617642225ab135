"""Blocks that are searched for in a training: max_drop alone, a speed-up, and what is tried where one is taken back."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers as tf
from transformers import Trainer

from deeparc_hf import MPruneCallback, MPruneConfig, PrunedConfig, create_model_card
from deeparc_hf.errors import ConfigError, DeepArcWarning, PlanError
from tests.trainers import arguments, text_data, train
from tests.zoo import TEXT, ZOO, spread

from .test_resume import blocks, scripted

EPOCHS = {"eval_strategy": "epoch", "learning_rate": 1e-3}


def deep(count=12):
    torch.manual_seed(0)
    config = tf.BertConfig(**{**TEXT, "num_hidden_layers": count, "num_labels": 2})
    return spread(tf.BertForSequenceClassification(config))


def run(folder, model, accuracy, epochs, **settings):
    callback = MPruneCallback(metric="accuracy", calibration_samples=48, **settings)
    compute = scripted(model, accuracy)
    trainer = train(model, folder, callback, compute_metrics=compute, num_train_epochs=epochs, **EPOCHS)
    return callback, trainer


def removed(callback):
    return [(sum(map(len, a["plan_removed"].values())), a.get("decision")) for a in callback.attempts[1:]]


def test_one_argument_goes_as_far_as_the_metric_lets_it(tmp_path):
    model = ZOO["bert"].model()
    callback, _ = run(tmp_path, model, {4: 0.9, 3: 0.9, 2: 0.87, 1: 0.5}, epochs=6, max_drop=0.05)
    assert removed(callback) == [(1, "accepted"), (1, "accepted"), (1, "rolled back")]
    assert blocks(model) == 2 and PrunedConfig.from_model(model) == callback.record
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["reason"] == "no smaller removal is left to try"
    assert all("greedy search: divergence" in a["search"] for a in report["attempts"][1:])
    assert all(site["healed"] or site["reason"] for a in callback.attempts[1:] for site in a["healing"])
    # a third of the epochs came first, and each pruning had one
    assert [a["epoch"] for a in callback.attempts[1:]] == [2.0, 3.0, 4.0]


def test_the_card_says_that_the_blocks_were_searched_for(tmp_path):
    model = ZOO["bert"].model()
    _, trainer = run(tmp_path, model, {4: 0.9, 3: 0.9, 2: 0.87, 1: 0.5}, epochs=5, max_drop=0.05)
    trainer.save_model(tmp_path)
    card = str(create_model_card(tmp_path))
    assert "(found by greedy search, each candidate judged by what it puts out)" in card
    assert "not chosen by it, but by greedy search" in card
    assert "arXiv 2410.14649" in card and "MPruner, which clusters" not in card and "debiased CKA)" not in card
    assert "- search" in card and "- cka" not in card


def test_a_step_that_is_taken_back_is_halved_and_later_ones_are_as_small(tmp_path):
    model = deep()
    found = {12: 0.9, 10: 0.9, 8: 0.5, 9: 0.9, 7: 0.5}
    found |= dict.fromkeys((11,), 0.89)
    callback, _ = run(tmp_path, model, found | {8: 0.5}, epochs=9, max_drop=0.05)
    assert removed(callback)[:4] == [(2, "accepted"), (2, "rolled back"), (1, "accepted"), (1, "rolled back")]
    assert blocks(model) == 9


def test_what_is_tried_again_is_on_the_way_of_the_same_search(tmp_path):
    model = deep(6)
    callback, _ = run(
        tmp_path, model, {6: 0.9, 5: 0.9, 4: 0.5, 3: 0.5}, epochs=6, max_drop=0.05, start_epoch=1,
        search="greedy", heal="lstsq", num_blocks=3, retrain_epochs=1,
    )  # fmt: skip
    assert removed(callback) == [(3, "rolled back"), (2, "rolled back"), (1, "accepted")]
    reason = json.loads((tmp_path / "pruning_report.json").read_text())["reason"]
    assert reason == "every pruning that was asked for is accepted, with fewer blocks removed than was tried first"
    tried = [set(a["plan_removed"]["bert.encoder.layer"]) for a in callback.attempts[1:]]
    assert tried[2] < tried[1] < tried[0]  # greedy takes one after another
    assert blocks(model) == 5


def test_a_speed_up_is_reached_in_equal_shares(tmp_path):
    model = deep()
    callback, _ = run(
        tmp_path, model, dict.fromkeys(range(1, 13), 0.9), epochs=5, max_drop=0.05, start_epoch=1, speedup=1.4,
        iterations=2, retrain_epochs=2,
    )  # fmt: skip
    assert [decision for _, decision in removed(callback)] == ["accepted", "accepted"]
    first, second = (a["speedup"] for a in callback.attempts[1:])
    assert first >= 1 / (1 - (1 - 1 / 1.4) / 2) - 1e-6 and first * second >= 1.4 - 1e-6
    for attempt in callback.attempts[1:]:  # the smaller model was timed beside the one before it
        assert re.search(r", \d+\.\d\d times as fast \(by the times of its blocks \d+\.\d\d\)$", attempt["search"])
    assert blocks(model) < 10  # blocks this small are a small part of the time


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "gready", "num_blocks": 3}, "no search named 'gready'.*Did you mean 'greedy'"),
        ({"search": "greedy", "objective": "accuracy", "num_blocks": 3}, "no search objective named 'accuracy'"),
        ({"search": "greedy", "objective": "metric", "num_blocks": 3}, "objective='metric' is what evaluate"),
        ({"search": "greedy", "threshold": 0.9}, "no threshold bounds it"),
        ({"speedup": 1.0}, "speedup .* must be more than 1"),
        ({"speedup": 2.0, "num_blocks": 3}, "Exactly one of"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_they_are_given(settings, message):
    with pytest.raises(ConfigError, match=message):
        MPruneCallback(**settings)


def test_what_max_drop_alone_means():
    alone = MPruneConfig(max_drop=0.01)
    assert (alone.target, alone.search, alone.heal, alone.retrain_epochs) == ("max_drop", "greedy", "lstsq", 1)
    assert MPruneConfig.from_dict(alone.to_dict()) == alone
    assert alone.replace(num_blocks=4).target == "num_blocks" and alone.replace(num_blocks=4).search == "greedy"
    by_likeness = MPruneConfig(max_drop=0.01, similarity="cosine")
    assert (by_likeness.target, by_likeness.search, by_likeness.threshold) == ("threshold", None, 0.98)
    plain = MPruneConfig(max_drop=0.01, search="beam")
    assert (plain.target, plain.search, plain.heal) == ("max_drop", "beam", None)
    assert MPruneConfig().target == "threshold" and MPruneConfig().retrain_epochs == 3


BY_HEART = re.compile(r"The loss on the training data is 0\.0\d+ and on the evaluation data .* learned by heart")


def overfitted(folder, **settings):
    """A training on few samples whose labels are chance, evaluated on others."""
    labels = torch.randint(2, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = text_data().map(lambda row, i: {"labels": labels[i]}, with_indices=True)
    args = arguments(folder, num_train_epochs=30, eval_strategy="epoch", learning_rate=3e-3, logging_strategy="epoch")
    pruning = MPruneCallback(
        metric="loss", greater_is_better=False, max_drop=99.0, start_epoch=29, calibration_samples=32, **settings
    )
    train_data, others = rows.select(range(32)), rows.select(range(32, 64))
    trainer = Trainer(ZOO["bert"].model(), args, train_dataset=train_data, eval_dataset=others, callbacks=[pruning])
    trainer.train()


def test_samples_that_are_learned_by_heart_are_warned_of(tmp_path):
    with pytest.warns(DeepArcWarning, match=BY_HEART) as told:
        overfitted(tmp_path)
    assert sum(bool(BY_HEART.search(str(each.message))) for each in told) == 1


def test_samples_that_were_held_back_are_not_warned_of(tmp_path, recwarn):
    overfitted(tmp_path, calibration=text_data(rows=96).select(range(64, 96)))
    assert not any(BY_HEART.search(str(each.message)) for each in recwarn)


def test_a_training_that_is_too_short_for_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="The schedule needs 2 epochs"):
        run(tmp_path, ZOO["bert"].model(), {4: 0.9}, epochs=1, max_drop=0.05)


def test_a_speed_up_that_cannot_be_reached_is_refused_before_any_step(tmp_path):
    model = ZOO["bert"].model()
    with pytest.raises(PlanError, match=r"speedup=50 cannot be reached: with every block gone that may go"):
        run(tmp_path, model, {4: 0.9}, epochs=9, max_drop=0.05, start_epoch=1, speedup=50.0)
    assert blocks(model) == 4


def test_a_speed_up_for_which_too_few_blocks_may_go_is_refused_before_any_step(tmp_path):
    model = ZOO["bert"].model()
    with pytest.raises(PlanError, match=r"speedup=1\.5 cannot be reached: with every block gone that may go"):
        run(tmp_path, model, {4: 0.9}, epochs=9, max_drop=0.05, start_epoch=1, speedup=1.5, min_blocks=3)
    assert blocks(model) == 4


def test_where_no_block_may_go_the_training_goes_on_as_it_is(tmp_path):
    model = ZOO["bert"].model()
    callback, trainer = run(tmp_path, model, {4: 0.9}, epochs=3, max_drop=0.05, protect="*")
    assert removed(callback) == [] and blocks(model) == 4
    assert trainer.state.global_step == 24 and callback.plan is not None and not callback.plan.removed


def test_a_share_that_leaves_nothing_to_remove_ends_the_prunings_and_not_the_training(tmp_path):
    model = ZOO["bert"].model()
    callback = MPruneCallback(keep_ratio=0.75, iterations=3, search="greedy", retrain_epochs=1, calibration_samples=32)
    train(model, tmp_path, callback, num_train_epochs=3)
    assert blocks(model) == 2 and [count for count, _ in removed(callback)] == [1, 1]
