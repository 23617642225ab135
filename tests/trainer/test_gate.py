"""The gate and the schedule in real trainings: what is accepted, what is taken back, and that the end is the last
accepted model.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf

from deeparc_hf import PrunedConfig, remove_blocks
from deeparc_hf.errors import ConfigError, DeepArcWarning, PlanError
from tests.trainers import pruning, train
from tests.zoo import ZOO

from .test_resume import STACK, blocks, equal, scripted

pytestmark = pytest.mark.filterwarnings("ignore:The threshold 1e-06 takes")
STEPS = 8  # of an epoch
GATE = {"metric": "accuracy", "max_drop": 0.05, "start_epoch": 1}


class Weights(tf.TrainerCallback):
    """Keeps the weights at the end of each epoch, and the learning rate of each step."""

    def __init__(self):
        self.epochs, self.rates = [], []

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs.append({name: value.clone() for name, value in kwargs["model"].state_dict().items()})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])


def trained(model, accuracy=None):
    compute = scripted(model, accuracy or {4: 0.9, 2: 0.9})
    return {"eval_strategy": "epoch", "num_train_epochs": 5, "learning_rate": 1e-3, "compute_metrics": compute}


def gated(folder, accuracy, settings=None, model=None, **arguments):
    model = model or ZOO["bert"].model()
    callback, weights = pruning(**{**GATE, **(settings or {})}), Weights()
    trainer = train(model, folder, callback, weights, **{**trained(model, accuracy), **arguments})
    return model, callback, weights, trainer


def verdicts(callback):
    return [(a.get("iteration"), a.get("k"), a.get("decision")) for a in callback.attempts[1:]]


def test_an_accepted_pruning_stays_and_the_training_ends_with_it(tmp_path):
    model, callback, weights, trainer = gated(tmp_path, {4: 0.9, 2: 0.86}, {"num_blocks": 2})
    assert blocks(model) == 2 and verdicts(callback) == [(1, 1, "accepted")]
    assert trainer.state.global_step == 2 * STEPS  # of 5 epochs: nothing is left to do
    assert equal(model.state_dict(), weights.epochs[-1])
    assert callback.record == PrunedConfig.from_model(model) and callback.plan.num_kept == 2


def test_what_is_taken_back_comes_back_to_the_bit(tmp_path):
    model, callback, weights, _ = gated(
        tmp_path, {4: 0.9, 3: 0.88, 2: 0.5}, {"num_blocks": [3, 2], "freeze": "partial", "k_max": 1}
    )
    assert verdicts(callback) == [(1, 1, "accepted"), (2, 1, "rolled back")]
    assert blocks(model) == model.config.num_hidden_layers == 3
    assert equal(model.state_dict(), weights.epochs[1])  # as accepted, after the first retraining
    assert not equal(model.state_dict(), weights.epochs[2])
    assert callback.record == PrunedConfig.from_model(model) and len(callback.record.iterations) == 1
    assert callback.plan.num_kept == 3  # the plan that was accepted
    model.save_pretrained(tmp_path / "end")
    again, info = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "end", output_loading_info=True)
    assert not any(info.values()) and equal(again.state_dict(), model.state_dict())


def test_the_next_larger_stride_is_tried_and_removes_less(tmp_path):
    """A threshold below every similarity puts all blocks into one cluster: k=1 leaves 1, k=2 leaves 2, k=3 leaves 2 or
    3.
    """
    model, callback, _, _ = gated(tmp_path, {4: 0.9, 1: 0.3, 2: 0.88, 3: 0.89}, {"threshold": 1e-6})
    assert verdicts(callback) == [(1, 1, "rolled back"), (1, 2, "accepted")]
    assert blocks(model) == 2
    kept = callback.attempts[1]["removed"][STACK], callback.attempts[2]["removed"][STACK]
    assert kept == ([1, 2, 3], [1, 3])


def test_a_stride_that_removes_the_same_is_not_tried_again(tmp_path):
    """protect leaves only block 1 to remove, which every stride does."""
    protect = [f"{STACK}.2", f"{STACK}.3"]
    model, callback, _, trainer = gated(tmp_path, {4: 0.9, 3: 0.1}, {"threshold": 1e-6, "protect": protect})
    assert verdicts(callback) == [(1, 1, "rolled back")] and blocks(model) == 4
    assert trainer.state.global_step == 2 * STEPS
    assert "k_max=3" in json.loads((tmp_path / "pruning_report.json").read_text())["reason"]


def test_if_nothing_is_accepted_the_end_is_the_fine_tuned_model(tmp_path):
    model, callback, weights, _ = gated(tmp_path, lambda model: 0.9 if blocks(model) == 4 else 0.1, {"threshold": 1e-6})
    assert all(decision == "rolled back" for _, _, decision in verdicts(callback)) and len(callback.attempts) > 2
    assert blocks(model) == 4 and equal(model.state_dict(), weights.epochs[0])
    assert callback.record is None and callback.plan is None and not hasattr(model.config, "pruning_config")
    assert not (tmp_path / "pruning_plan.json").exists() and not (tmp_path / "_pruning_snapshots").exists()


def test_the_baseline_is_measured_at_the_start_where_the_trainer_evaluates_there(tmp_path):
    _, callback, _, _ = gated(tmp_path, {4: 0.9, 2: 0.86}, {"num_blocks": 2, "start_epoch": 0}, eval_on_start=True)
    assert verdicts(callback) == [(1, 1, "accepted")] and callback.attempts[1]["baseline"] == 0.9


@pytest.mark.filterwarnings("ignore:max_drop bounds 'acuracy', whose name does not say")
@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"start_epoch": 0}, {}, "eval_on_start=True"),
        ({}, {"eval_strategy": "no"}, "eval_strategy='epoch'"),
        (
            {"metric": "acuracy"},
            {},
            "'acuracy', which was not among the metrics of the evaluation: accuracy, loss. Did you mean 'accuracy'",
        ),
        ({"metric": "accuracy"}, {"compute_metrics": None}, "Give the Trainer compute_metrics, or set metric='loss'"),
        ({"num_blocks": 9}, {}, "has only 4"),
        ({"protect": "encoder.layer.3"}, {}, "matches no block"),
        ({"freeze": ["bert.embeddings*"]}, {}, "matches no block"),
        ({"retrain_epochs": 9}, {}, "needs 11 epochs .*has 5.*num_train_epochs=11"),
    ],
)
def test_a_gate_that_cannot_work_is_refused(tmp_path, settings, arguments, message):
    model, epochs = ZOO["bert"].model(), Weights()
    with pytest.raises((ConfigError, PlanError), match=message):
        train(
            model,
            tmp_path,
            pruning(**{**GATE, "start_epoch": 2, "num_blocks": 2, **settings}),
            epochs,
            **{**trained(model), **arguments},
        )
    assert blocks(model) == 4 and len(epochs.epochs) <= 1  # before the fine-tuning has ended


def test_evaluations_in_steps_are_completed_by_one_at_the_boundary(tmp_path):
    _, callback, _, _ = gated(tmp_path, {4: 0.9, 2: 0.86}, {"num_blocks": 2}, eval_strategy="steps", eval_steps=5)
    assert [e["step"] for a in callback.attempts for e in a["evaluations"]] == [5, 8, 10, 15, 16]


def test_the_best_checkpoint_is_one_of_the_final_structure(tmp_path):
    """The unpruned model is better by far; it must not win."""
    model, callback, _, trainer = gated(
        tmp_path,
        {4: 0.99, 2: 0.96},
        {"num_blocks": 2, "retrain_epochs": 2},
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        save_total_limit=1,
    )
    assert blocks(model) == 2 and verdicts(callback) == [(1, 1, "accepted")]
    assert trainer.state.best_metric == 0.96
    saved = tf.AutoModelForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert equal(saved.state_dict(), model.state_dict())


def test_blocks_are_protected_by_the_names_of_the_beginning(tmp_path):
    """After the first pruning block 3 is called something else; it stays protected."""
    settings = {"num_blocks": [3, 2], "start_epoch": 0, "protect": [f"{STACK}.0", f"{STACK}.3"]}
    callback = pruning(**settings)
    train(ZOO["bert"].model(), tmp_path, callback)
    assert callback.record.kept[STACK] == (0, 3)


def test_frozen_blocks_stay_to_the_bit_and_may_thaw_at_the_next_pruning(tmp_path):
    callback, weights = pruning(num_blocks=[5, 4], start_epoch=1, freeze="partial"), Weights()
    model = ZOO["gemma3"].model()
    from tests.trainers import text_data

    data = text_data("tokens").map(lambda row: {"labels": row["input_ids"]})
    train(model, tmp_path, callback, weights, data=data, num_train_epochs=3, learning_rate=1e-2)
    first, second = callback.attempts[1:]
    stack = "model.layers"
    original = list(range(7))
    for before, after, attempt in (
        (weights.epochs[0], weights.epochs[1], first),
        (weights.epochs[1], weights.epochs[2], second),
    ):
        old, original = original, [i for i in original if i not in attempt["removed"][stack]]
        for now, place in enumerate(original):
            same = all(
                torch.equal(value, before[name.replace(f"{stack}.{now}.", f"{stack}.{old.index(place)}.")])
                for name, value in after.items()
                if name.startswith(f"{stack}.{now}.")
            )
            assert same == (now in attempt["frozen"].get(stack, [])), (attempt["name"], place)
    assert first["frozen"][stack] and second["frozen"][stack]


def test_each_retraining_has_its_own_warm_up_and_decay(tmp_path):
    rates = {}
    for rewound in (True, False):
        weights = Weights()
        callback = pruning(num_blocks=[3, 2], start_epoch=1, rewind_lr=rewound)
        train(ZOO["bert"].model(), tmp_path, callback, weights, num_train_epochs=3, learning_rate=1.0, warmup_steps=2)
        rates[rewound] = weights.rates
    whole = [min(step / 2, (24 - step) / 22) for step in range(24)]
    assert rates[False] == pytest.approx(whole)
    retraining = [min(step / 2, (8 - step) / 6) for step in range(8)]
    assert rates[True] == pytest.approx([*whole[:8], *retraining, *retraining])


def test_a_downloaded_pruned_checkpoint_is_pruned_further_with_the_frozen_blocks_of_its_record(tmp_path):
    first = ZOO["bert"].model()
    train(first, tmp_path / "first", pruning(num_blocks=3, freeze="partial"), num_train_epochs=1)
    first.save_pretrained(tmp_path / "hub")
    record = PrunedConfig.from_pretrained(tmp_path / "hub")
    assert record.frozen[STACK]
    model, weights = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hub"), Weights()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = pruning(num_blocks=2, start_epoch=1, freeze="record")
    train(model, tmp_path / "second", callback, weights, num_train_epochs=2)
    for index in range(3):
        names = [name for name in before if name.startswith(f"{STACK}.{index}.") and not name.endswith("key.bias")]
        assert all(torch.equal(before[n], weights.epochs[0][n]) == (index in record.frozen[STACK]) for n in names)
    assert callback.record.stacks[STACK].length == 4 and len(callback.record.kept[STACK]) == 2 == blocks(model)
    assert len(callback.record.iterations) == 2


def test_freezing_by_a_record_needs_one(tmp_path):
    with pytest.raises(ConfigError, match="carries none"):
        train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=2, freeze="record"))


def test_blocks_to_freeze_may_be_named(tmp_path):
    callback = pruning(num_blocks=3, freeze=[f"{STACK}.0", f"{STACK}.3"], protect=[f"{STACK}.0", f"{STACK}.3"])
    model = ZOO["bert"].model()
    train(model, tmp_path, callback, num_train_epochs=1)
    trained = [any(p.requires_grad for p in block.parameters()) for block in model.bert.encoder.layer]
    assert trained == [False, True, False]


def test_figures_go_to_the_logs_the_report_and_the_record(tmp_path):
    model, callback, _, trainer = gated(tmp_path, {4: 0.9, 3: 0.88, 2: 0.5}, {"num_blocks": [3, 2], "k_max": 1})
    logged = [entry for entry in trainer.state.log_history if "pruning_blocks" in entry]
    assert [(e["step"], e["pruning_blocks"], e.get("pruning_accepted")) for e in logged] == [
        (8, 3, None),
        (16, 3, 1.0),
        (16, 2, None),
        (24, 3, 0.0),
    ]
    report = json.loads((tmp_path / "pruning_report.json").read_text())
    assert report["attempts"] == callback.attempts and report["accepted"] == 1
    table = (tmp_path / "pruning_report.md").read_text()
    assert "rolled back" in table and "accepted" in table and "max_drop 0.05" in table
    assert PrunedConfig.from_model(model).iterations[0]["metrics"]["eval_accuracy"] == 0.88


def test_a_training_that_ends_before_its_first_pruning_warns(tmp_path):
    class Stop(tf.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    with pytest.warns(DeepArcWarning, match="ended before its first pruning"):
        train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=2, start_epoch=1), Stop())


def test_the_schedule_ends_where_nothing_more_can_be_removed(tmp_path):
    callback = pruning(num_blocks=2, iterations=3, start_epoch=1)
    trainer = train(ZOO["bert"].model(), tmp_path, callback, num_train_epochs=4)
    assert verdicts(callback) == [(1, 1, "accepted")] and trainer.state.global_step == 2 * STEPS


def test_an_idle_gated_run_is_the_training_without_the_callback(tmp_path):
    ends = []
    for callbacks in ([], [pruning(threshold=1.0, max_drop=0.1, start_epoch=1, iterations=2)]):
        model = ZOO["bert"].model()
        train(model, tmp_path, *callbacks, eval_strategy="epoch", num_train_epochs=4)
        ends.append(model.state_dict())
    assert equal(*ends)


def test_two_stacks_and_a_model_pruned_before(tmp_path):
    model = ZOO["bert"].model()
    remove_blocks(model, {STACK: [1]})
    callback = pruning(**GATE, num_blocks=2)
    train(
        model,
        tmp_path,
        callback,
        eval_strategy="epoch",
        compute_metrics=scripted(model, {3: 0.9, 2: 0.1}),
        num_train_epochs=4,
    )
    assert blocks(model) == 3 and callback.record.kept[STACK] == (0, 2, 3) and model.config.num_hidden_layers == 3


def test_a_bound_that_can_reject_nothing_warns(tmp_path):
    with pytest.warns(DeepArcWarning, match=r"max_drop 2 is not below the baseline of 0\.9.*Did you mean 0\.02"):
        gated(tmp_path, {4: 0.9, 2: 0.1}, {"num_blocks": 2, "max_drop": 2.0})


def test_other_settings_on_a_resume_warn_and_count_from_there(tmp_path):
    settings = {"num_blocks": [3, 2], "start_epoch": 1}
    train(ZOO["bert"].model(), tmp_path, pruning(**settings), save_strategy="epoch", num_train_epochs=3)
    model = ZOO["bert"].model()
    with pytest.warns(
        DeepArcWarning, match=r"other settings.*num_blocks \[3, 2\] -> \[3, 1\].*they count from here on"
    ):
        changed = pruning(**{**settings, "num_blocks": [3, 1]})
        train(
            model, tmp_path, changed, resume=str(tmp_path / "checkpoint-16"), save_strategy="epoch", num_train_epochs=3
        )
    assert blocks(model) == 1


def test_two_callbacks_in_one_trainer_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="One does all iterations"):
        train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3), pruning(num_blocks=2))


def test_the_terminal_tells_the_schedule_the_verdicts_and_the_end(tmp_path, capsys):
    gated(tmp_path, {4: 0.9, 3: 0.88, 2: 0.5}, {"num_blocks": [3, 2], "k_max": 1, "freeze": "partial"})
    printed = capsys.readouterr().out
    for line in (
        "Pruning schedule: 1 epoch before the first pruning, then 2 prunings with 1 epoch of retraining each (3 of the "
        "training's 5 epochs); accuracy may get worse by 0.05.",
        "Pruning 1 (k=1), at step 8. The baseline of accuracy is 0.9.",
        "Pruning 2 (k=1) is rolled back: accuracy went from 0.9 to 0.5, worse by 0.4 (only a drop of up to 0.05 is "
        "allowed). The weights from step 16 are back.",
        "Pruning is finished at epoch 3 of 5 (no stride up to k_max=1 removes anything else): 1 of 2 accepted, 4 -> 3 "
        "blocks",
        "Still frozen in this process: ",
    ):
        assert line in printed


def test_a_warm_up_that_is_longer_than_a_retraining_is_shortened_and_resumed_alike(tmp_path, capsys):
    def go(folder, resume=None):
        torch.manual_seed(0)
        model, weights = ZOO["bert"].model(), Weights()
        arguments = {
            "num_train_epochs": 4,
            "warmup_steps": 12,
            "learning_rate": 1.0,
            "save_strategy": "steps",
            "save_steps": 4,
        }
        train(
            model,
            folder,
            pruning(num_blocks=[3, 2], start_epoch=1, rewind_lr=True),
            weights,
            resume=resume,
            **arguments,
        )
        return model, weights.rates

    model, rates = go(tmp_path / "whole")
    # 12 of 32 steps are 3 of 8; the last retraining has 16 steps, and 12 are 6 of them
    assert rates[8:16] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    assert rates[16 + 6] == 1.0 and rates[-1] == pytest.approx(0.1)
    told = capsys.readouterr().out
    assert "warm-up of 12 steps would take more than half of a retraining of 8 steps. It is shortened to 3" in told
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "whole", again)
    resumed, rest = go(again, str(again / "checkpoint-12"))
    assert rest == pytest.approx(rates[12:]) and equal(model.state_dict(), resumed.state_dict())
