"""What each step of a pruning did to the model: loss and accuracy before, after removal, after healing, after
retraining.
"""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from transformers import Trainer, TrainerCallback

from deeparc_hf import PrunedConfig, WandaCallback, heal_model, remove_blocks
from deeparc_hf.core.statistics import wilson_interval
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.quality import measure_quality
from deeparc_hf.trainer.measures import EVALUATION, TRAINING, Stages
from tests.trainers import arguments, pruning, text_data, train
from tests.zoo import ZOO

from .test_neighbours import Planted

STACK = "bert.encoder.layer"


def quality(model, data, size=8):
    """Loss and accuracy, one row after the other."""
    model = copy.deepcopy(model).eval()
    losses, right = [], 0
    with torch.no_grad():
        for start in range(0, len(data), size):
            rows = data[start : start + size]
            output = model(**{key: torch.tensor(value) for key, value in rows.items()})
            losses.append(
                float(torch.nn.functional.cross_entropy(output.logits, torch.tensor(rows["labels"])))
                * len(rows["labels"])
            )
            right += int((output.logits.argmax(1) == torch.tensor(rows["labels"])).sum())
    return sum(losses) / len(data), right / len(data)


class Copies(TrainerCallback):
    """The model right before each epoch, and at the end."""

    def __init__(self):
        self.models = []

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        self.models.append(copy.deepcopy(model))

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.models.append(copy.deepcopy(model))


def test_each_figure_is_that_of_the_model_at_that_step(tmp_path):
    data, copies = text_data(), Copies()
    callback = pruning(num_blocks=3, start_epoch=1, heal="lstsq")
    # the copies come first: the model as it is before the pruning
    trainer = train(
        ZOO["bert"].model(),
        tmp_path,
        copies,
        callback,
        data=data,
        eval_strategy="epoch",
        num_train_epochs=2,
        learning_rate=1e-3,
    )
    before, end = copies.models[1], copies.models[2]
    removed = copy.deepcopy(before)
    remove_blocks(removed, {STACK: list(callback.plan.removed[STACK])})
    healed = copy.deepcopy(removed)
    # the calibration's own samples, in its order
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [
        {key: torch.tensor(value) for key, value in data[chosen[i : i + 8]].items()} for i in range(0, len(data), 8)
    ]
    heal_model(healed, before, batches)
    stages = callback.attempts[1]["stages"]
    assert list(stages) == ["before", "removed", "healed", "retrained"]
    for stage, model in zip(stages, (before, removed, healed, end), strict=True):
        loss, accuracy = quality(model, data)
        assert stages[stage]["loss"] == pytest.approx(loss, rel=1e-4), stage
        assert stages[stage]["accuracy"] == pytest.approx(accuracy), stage
        assert stages[stage]["samples"] == 64 and stages[stage]["data"] == EVALUATION
        assert stages[stage]["accuracy_interval"] == list(wilson_interval(round(accuracy * 64), 64))
        low, high = stages[stage]["loss_interval"]
        assert low < loss < high
    assert stages["healed"]["loss"] != stages["removed"]["loss"]
    # the same data as the Trainer's own evaluation, as it happens
    assert stages["retrained"]["loss"] == pytest.approx(
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1], rel=1e-4
    )
    record = PrunedConfig.from_model(trainer.model)
    assert record.iterations[-1]["stages"] == stages
    report = (tmp_path / "pruning_report.md").read_text()
    assert f"{stages['removed']['loss']:.4f} (" in report and "What each step did" in report
    assert json.loads((tmp_path / "pruning_report.json").read_text())["attempts"][1]["stages"] == stages


def test_without_evaluations_training_data_is_taken_that_no_calibration_sees(tmp_path):
    data = text_data(rows=96)
    copies, callback = Copies(), pruning(num_blocks=3, calibration_samples=40)
    train(ZOO["bert"].model(), tmp_path, copies, callback, data=data, num_train_epochs=1)
    chosen = torch.randperm(96, generator=torch.Generator().manual_seed(0)).tolist()[40:80]
    stages = callback.attempts[1]["stages"]
    assert list(stages) == ["before", "removed", "retrained"]
    assert stages["before"]["data"] == TRAINING and stages["before"]["samples"] == 40
    assert stages["before"]["loss"] == pytest.approx(quality(copies.models[0], data.select(chosen))[0], rel=1e-4)


def test_measuring_changes_nothing_in_the_training(tmp_path, monkeypatch):
    weights = []
    for measured in (True, False):
        if not measured:
            monkeypatch.setattr(Stages, "measure", lambda self, stage, step: None)
        model = ZOO["bert"].model()
        callback = pruning(num_blocks=3, start_epoch=1)
        train(model, tmp_path, callback, data=text_data(rows=560), num_train_epochs=2)
        weights.append(model.state_dict())
        assert bool(callback.attempts[1]["stages"]) == measured
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_too_few_samples_are_not_measured(tmp_path):
    callback = pruning(num_blocks=3)
    train(ZOO["bert"].model(), tmp_path, callback, data=text_data(rows=540), num_train_epochs=1)
    assert callback.attempts[1]["stages"] == {}
    assert "What each step did" not in (tmp_path / "pruning_report.md").read_text()


def test_what_is_taken_back_shows_too_and_the_next_try_starts_from_the_same(tmp_path):
    model = ZOO["bert"].model()
    callback = pruning(threshold=0.05, start_epoch=1, k_max=2, max_drop=0.1, metric="accuracy")
    planted = Planted(model, of_4=[0.9], of_1=[0.1], of_2=[0.9], of_3=[0.9])
    with pytest.warns(match="takes 3 of 4 blocks"):
        train(model, tmp_path, callback, num_train_epochs=3, eval_strategy="epoch", compute_metrics=planted)
    first, second = (attempt["stages"] for attempt in callback.attempts[1:3])
    assert {"before", "removed", "retrained"} == set(first) == set(second)
    assert callback.attempts[1]["decision"] == "rolled back"
    assert first["before"] == second["before"] and first["before"]["step"] == 8 and second["removed"]["step"] == 16


def test_the_record_keeps_to_itself_what_a_pruning_did_that_was_taken_back(tmp_path):
    """An evaluation after the end is noted in the record, whose last pruning is the accepted one."""
    model = ZOO["bert"].model()
    callback = pruning(num_blocks=[3, 2], start_epoch=1, k_max=1, max_drop=0.1, metric="accuracy")
    planted = Planted(model, of_4=[0.9], of_3=[0.9, 0.9], of_2=[0.1])
    trainer = train(model, tmp_path, callback, num_train_epochs=3, eval_strategy="epoch", compute_metrics=planted)
    assert [attempt["decision"] for attempt in callback.attempts[1:]] == ["accepted", "rolled back"]
    assert callback.attempts[1]["stages"] != callback.attempts[2]["stages"]
    trainer.evaluate()
    assert PrunedConfig.from_model(trainer.model).iterations[-1]["stages"] == callback.attempts[1]["stages"]


def test_a_run_resumed_at_a_pruning_says_on_which_data_it_measured(tmp_path):
    settings = {"num_blocks": 3, "start_epoch": 1}
    options = {"data": text_data(rows=560), "num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    callback = pruning(**settings)
    train(ZOO["bert"].model(), tmp_path / "whole", callback, **options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-70", tmp_path / "again" / "checkpoint-70")
    again = pruning(**settings)
    train(ZOO["bert"].model(), tmp_path / "again", again, resume=True, **options)
    stages, expected = again.attempts[1]["stages"], callback.attempts[1]["stages"]
    assert {value["data"] for value in expected.values()} == {EVALUATION}
    assert {value["data"] for value in stages.values()} == {TRAINING} and set(stages) == set(expected)


def test_a_model_without_a_loss_of_its_own_is_not_measured():
    model = ZOO["timm_vit"].model()
    assert measure_quality(model, Calibration([(torch.randn(4, 3, 32, 32), torch.zeros(4))], 8)) is None
    batch = {key: torch.tensor(value) for key, value in text_data()[:8].items()}
    bert = ZOO["bert"].model().train()
    assert measure_quality(bert, Calibration([batch], 8))["loss_interval"] is None and bert.training
    assert measure_quality(bert, Calibration([{**batch, "labels": torch.full((8,), 99)}], 8)) is None  # no such class
    del batch["labels"]
    assert measure_quality(bert, Calibration([batch], 8)) is None
    llama = ZOO["llama"].model()
    found = measure_quality(llama, Calibration([{**b, "labels": b["input_ids"]} for b in ZOO["llama"].batches()], 20))
    assert found["samples"] == 20 and found["accuracy"] is None and found["loss"] > 0


def test_every_figure_is_of_the_first_evaluation_data(tmp_path):
    """Of two evaluation sets the first counts, whichever came last; an evaluation with a prefix of its own is of other
    data.
    """

    class Elsewhere(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            other = trainer_of["it"].evaluate(text_data(rows=40), metric_key_prefix="test")
            assert "test_loss" in other

    trainer_of = {}
    sets = {"a": text_data(rows=64), "b": text_data(rows=48)}
    callback = pruning(num_blocks=3, start_epoch=1)
    settings = arguments(tmp_path, num_train_epochs=2, eval_strategy="epoch", learning_rate=0.0)
    trainer = Trainer(
        ZOO["bert"].model(), settings, train_dataset=text_data(), eval_dataset=sets, callbacks=[Elsewhere(), callback]
    )
    trainer_of["it"] = trainer
    trainer.train()
    stages = callback.attempts[1]["stages"]
    assert {value["samples"] for value in stages.values()} == {64}
    assert stages["removed"]["loss"] == pytest.approx(stages["retrained"]["loss"])  # nothing was learnt


def test_before_is_measured_anew_where_weights_were_zeroed_since(tmp_path):
    copies = Copies()
    callbacks = [WandaCallback(sparsity=0.5, start_epoch=1), copies, pruning(num_blocks=3, start_epoch=1)]
    train(ZOO["bert"].model(), tmp_path, *callbacks, eval_strategy="epoch", num_train_epochs=2)
    before = callbacks[2].attempts[1]["stages"]["before"]
    assert before["loss"] == pytest.approx(quality(copies.models[1], text_data())[0], rel=1e-4)
