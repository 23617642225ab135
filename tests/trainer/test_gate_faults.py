"""What must not slip through the gate: verdicts that were never given, and models that were never judged."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch.utils.data import DataLoader
from transformers import Trainer

from deeparc_hf.errors import CalibrationError, ConfigError
from tests.trainers import arguments, pruning, text_data, train
from tests.zoo import ZOO

from .test_resume import blocks, scripted

GATE = {"num_blocks": [3, 2], "max_drop": 0.01, "metric": "accuracy"}


def gated(folder, *callbacks, compute=None, settings=None, **kwargs):
    model = ZOO["bert"].model()
    callback = pruning(**{**GATE, "start_epoch": 1, **(settings or {})})
    compute = compute or scripted(model, {4: 0.9, 3: 0.9, 2: 0.9})
    train(
        model,
        folder,
        callback,
        *callbacks,
        compute_metrics=compute,
        **{"num_train_epochs": 4, "eval_strategy": "epoch", **kwargs},
    )
    return model, callback


@pytest.mark.filterwarnings("ignore:max_drop bounds 'acuracy', whose name does not say")
def test_a_misspelt_metric_beside_a_given_baseline_accepts_nothing(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'accuracy'"):
        gated(
            tmp_path,
            settings={"start_epoch": 0, "baseline": 0.9, "metric": "acuracy"},
            compute=lambda _: {"accuracy": 0.1},
        )


def test_a_metric_that_is_missing_at_the_verdict_accepts_nothing(tmp_path):
    """It was there before, and the training goes on long enough for another pruning."""
    seen = []

    def compute(_):
        seen.append(0)
        return {"accuracy": 0.9} if len(seen) == 1 else {"other": 0.1}

    with pytest.raises(ConfigError, match="'accuracy', which was not among the metrics"):
        gated(tmp_path, compute=compute)


def test_an_evaluation_that_another_callback_switches_off_accepts_nothing(tmp_path):
    class NoEvaluation(tf.TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            control.should_evaluate = control.should_evaluate and state.epoch < 2

    with pytest.raises(ConfigError, match="there was none"):
        gated(tmp_path, NoEvaluation())


@pytest.mark.parametrize(
    ("settings", "best"),
    [({}, {"metric_for_best_model": "loss"}), ({"greater_is_better": False}, {"metric_for_best_model": "accuracy"})],
    ids=["metric", "direction"],
)
def test_what_is_delivered_is_what_is_judged(tmp_path, settings, best):
    with pytest.raises(ConfigError, match="load_best_model_at_end would deliver"):
        gated(tmp_path, settings=settings, save_strategy="epoch", load_best_model_at_end=True, **best)


def test_after_a_rollback_the_best_checkpoint_is_not_one_that_was_rejected(tmp_path):
    model = ZOO["bert"].model()
    callback = pruning(num_blocks=3, max_drop=0.01, metric="accuracy", start_epoch=1, k_max=1)
    trainer = train(
        model,
        tmp_path,
        callback,
        compute_metrics=scripted(model, {4: 0.9, 3: 0.5}),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    assert blocks(model) == 4 and trainer.state.best_model_checkpoint is None and trainer.state.best_metric is None


def test_an_evaluation_of_other_data_is_no_evaluation_of_the_model(tmp_path):
    """A callback that evaluates under another prefix must neither decide nor be taken for a misspelt metric."""

    class Extra(tf.TrainerCallback):
        trainer = None

        def on_epoch_end(self, args, state, control, **kwargs):
            self.trainer.evaluate(text_data(rows=8), metric_key_prefix="hard")
            control.should_evaluate = True  # an evaluation takes back what was asked for

    model, extra = ZOO["bert"].model(), Extra()
    callback = pruning(num_blocks=3, max_drop=0.1, metric="accuracy", start_epoch=1)
    trainer = Trainer(
        model,
        arguments(tmp_path, num_train_epochs=2, eval_strategy="epoch"),
        train_dataset=text_data(),
        eval_dataset=text_data(),
        compute_metrics=scripted(model, {4: 0.9, 3: 0.9}),
        callbacks=[callback, extra],
    )
    extra.trainer = trainer
    trainer.train()
    assert callback.attempts[1]["decision"] == "accepted" and blocks(model) == 3


def test_training_data_may_be_a_plain_list(tmp_path):
    callback = pruning(num_blocks=3)
    train(ZOO["bert"].model(), tmp_path, callback, data=list(text_data()), num_train_epochs=1)
    assert callback.plan.samples == 64


def test_an_iterator_serves_one_pruning_only(tmp_path):
    batches = list(DataLoader(text_data().with_format("torch"), batch_size=8))
    callback = pruning(num_blocks=3, calibration=iter(batches))
    train(ZOO["bert"].model(), tmp_path, callback, num_train_epochs=1)
    assert callback.plan.num_kept == 3
    with pytest.raises(CalibrationError, match="can be gone through once"):
        train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=[3, 2], calibration=iter(batches)))


def test_a_trainer_still_evaluates_after_a_training_was_refused(tmp_path):
    model = ZOO["bert"].model()
    data = text_data()
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[pruning(num_blocks=3, retrain_epochs=9)],
    )
    with pytest.raises(ConfigError, match="needs 9 epochs"):
        trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_folder_that_cannot_be_written_to_is_told_at_once(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pruning_report.json").mkdir()  # nothing can be written over a folder
    model = ZOO["bert"].model()
    with pytest.raises(OSError):
        train(model, tmp_path / "out", pruning(num_blocks=3, start_epoch=1))
    assert blocks(model) == 4


def test_a_schedule_that_the_user_made_is_not_replaced(tmp_path):
    model, rates = ZOO["bert"].model(), []

    class Rates(tf.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    schedule = tf.get_constant_schedule(optimizer)
    Trainer(
        model,
        arguments(tmp_path, num_train_epochs=2),
        train_dataset=text_data(),
        optimizers=(optimizer, schedule),
        callbacks=[pruning(num_blocks=3, start_epoch=1), Rates()],
    ).train()
    assert blocks(model) == 3 and rates == [1e-3] * 16
