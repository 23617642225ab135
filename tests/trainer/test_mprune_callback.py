"""MPruneCallback on stock Trainers, in one process."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
import transformers as tf
from torch.utils.data import DataLoader
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from deeparc_hf import MPruneCallback, MPruneConfig, PrunedConfig, PruningPlan, remove_blocks
from deeparc_hf.errors import CalibrationError, ConfigError, SurgeryError, UnsupportedModelError
from tests.trainers import ROWS, arguments, pruning, text_data, train
from tests.zoo import VOCAB, ZOO


def test_prunes_at_train_begin_and_trains_what_is_left(tmp_path, capsys):
    model = ZOO["bert"].model()
    callback = pruning(num_blocks=2)
    trainer = train(model, tmp_path, callback, save_strategy="epoch")
    assert len(model.bert.encoder.layer) == model.config.num_hidden_layers == 2
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()} == set(map(id, trainer.optimizer.state))
    assert callback.record == PrunedConfig.from_model(model)
    assert callback.plan == PruningPlan.from_json(tmp_path / "pruning_plan.json")
    assert "remove 2 of 4 blocks" in capsys.readouterr().out
    reloaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in reloaded.state_dict().items())
    assert PrunedConfig.from_pretrained(tmp_path / "checkpoint-16") == callback.record


def test_partial_freezing_keeps_frozen_blocks_to_the_bit(tmp_path):
    model = ZOO["bert"].model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    callback = pruning(MPruneConfig(num_blocks=3, freeze="partial"))
    trainer = train(model, tmp_path, callback)
    stack = callback.plan.stacks["bert.encoder.layer"]
    assert stack.frozen
    for position, original in enumerate(stack.kept):
        for name, value in model.bert.encoder.layer[position].state_dict().items():
            same = torch.equal(value, before[f"bert.encoder.layer.{original}.{name}"])
            assert same == (original in stack.frozen) or name.endswith("key.bias"), (original, name)
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, before["bert.embeddings.word_embeddings.weight"])
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    assert frozen and not frozen & set(map(id, trainer.optimizer.state))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_trainer(tmp_path, name):
    model = ZOO[name].model()
    callback = pruning(keep_ratio=0.6, freeze="partial")
    trainer = train(
        model,
        tmp_path,
        callback,
        data=text_data("tokens"),
        cls=Seq2SeqTrainer,
        args=Seq2SeqTrainingArguments,
        predict_with_generate=True,
    )
    assert callback.plan.num_kept == 4 == sum(len(s.kept) for s in callback.record.stacks.values())
    assert trainer.predict(text_data("tokens")).predictions.shape[0] == ROWS


def test_image_models_train_too(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(ROWS, 3, 32, 32, generator=generator)
    data = datasets.Dataset.from_dict(
        {"pixel_values": pixels.numpy(), "labels": [i % 5 for i in range(ROWS)]}
    ).with_format("torch")
    model = ZOO["wrapped_resnext"].model()
    train(model, tmp_path, pruning(num_blocks=7, freeze="partial"), data=data, num_train_epochs=1)
    assert sum(model.config.model_args["layers"]) == 7


class Order(tf.TrainerCallback):
    """Notes what the model is trained on."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(
            lambda m, a, k: self.seen.append(k["input_ids"].clone()) if m.training else None, with_kwargs=True
        )


def test_an_idle_callback_changes_nothing(tmp_path):
    """Nothing above the threshold: the same data in the same order, and bit-identical weights."""
    runs = []
    for callbacks in ([], [pruning(threshold=1.0)]):
        torch.manual_seed(1)
        model = ZOO["bert"].model()
        order = Order(model)
        train(model, tmp_path, *callbacks)
        runs.append((order.seen, model.state_dict()))
    assert len(runs[0][0]) == 16 and all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    assert all(torch.equal(value, runs[1][1][name]) for name, value in runs[0][1].items())


def test_pruning_does_not_disturb_the_order_of_the_data(tmp_path):
    orders = []
    for callbacks in ([], [pruning(num_blocks=2)]):
        model = ZOO["bert"].model()
        order = Order(model)
        train(model, tmp_path, *callbacks)
        orders.append(order.seen)
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))


def test_calibration_data_may_be_given_as_a_data_set_or_as_batches(tmp_path):
    plans = []
    data = text_data(rows=40)
    for calibration in (data, list(DataLoader(data.with_format("torch"), batch_size=8)), None):
        callback = pruning(num_blocks=2, calibration=calibration)
        train(ZOO["bert"].model(), tmp_path, callback, num_train_epochs=1)
        plans.append(callback.plan)
    assert [plan.samples for plan in plans] == [40, 40, 64]
    first, second = (torch.tensor(plan.stacks["bert.encoder.layer"].similarity) for plan in plans[:2])
    torch.testing.assert_close(first, second)


def test_calibration_samples_are_a_seeded_choice_of_the_training_data(tmp_path):
    def plan(**settings):
        callback = pruning(num_blocks=2, calibration_samples=40, **settings)
        train(ZOO["bert"].model(), tmp_path, callback, num_train_epochs=1)
        assert callback.plan.samples == 40
        return callback.plan.stacks["bert.encoder.layer"].similarity

    assert plan() == plan() != plan(seed=1)


def test_iterable_training_data(tmp_path):
    stream = text_data().to_iterable_dataset()
    callback = pruning(num_blocks=2)
    train(ZOO["bert"].model(), tmp_path, callback, data=stream, max_steps=4)
    assert callback.plan.samples == ROWS


def test_two_runs_prune_twice_and_compose(tmp_path):
    model = ZOO["gemma3"].model()
    data = text_data("tokens").map(lambda row: {"labels": row["input_ids"]})
    callback = pruning(keep_ratio=0.7)
    trainer = train(model, tmp_path, callback, data=data, num_train_epochs=1)
    assert len(model.model.layers) == 5
    trainer.train()
    assert len(model.model.layers) == 4  # 0.7 of 5, rounded
    assert len(callback.record.iterations) == 2 and callback.record.stacks["model.layers"].length == 7


def test_resume_of_a_model_loaded_from_the_checkpoint_is_bit_identical(tmp_path):
    def callback():
        return pruning(num_blocks=3, freeze="partial")

    whole = ZOO["bert"].model()
    train(whole, tmp_path, callback(), save_strategy="epoch")
    resumed = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    train(resumed, tmp_path, callback(), resume=str(tmp_path / "checkpoint-8"))
    assert {n for n, p in resumed.named_parameters() if p.requires_grad} == {
        n for n, p in whole.named_parameters() if p.requires_grad
    }
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_resume_with_the_model_as_it_was_built_is_bit_identical(tmp_path):
    """The script builds the whole model again; it follows the checkpoint."""
    whole = ZOO["bert"].model()
    train(whole, tmp_path, pruning(num_blocks=3, freeze="partial"), save_strategy="epoch")
    model = ZOO["bert"].model()
    train(model, tmp_path, pruning(num_blocks=3, freeze="partial"), resume=str(tmp_path / "checkpoint-8"))
    assert model.config.num_hidden_layers == 3
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.state_dict().items())


def test_resume_of_a_run_that_began_without_the_callback_is_refused(tmp_path):
    """It prunes at the beginning, which has passed: to go on unpruned in silence would be wrong."""
    train(ZOO["bert"].model(), tmp_path, save_strategy="epoch")
    with pytest.raises(SurgeryError, match="began without MPruneCallback"):
        train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3), resume=str(tmp_path / "checkpoint-8"))


def test_resume_into_a_model_with_another_history_is_refused(tmp_path):
    """The same number of blocks, but not the same ones."""
    callback = pruning(num_blocks=3)
    train(ZOO["bert"].model(), tmp_path, callback, save_strategy="epoch")
    other = ZOO["bert"].model()
    gone = callback.plan.stacks["bert.encoder.layer"].removed[0]
    remove_blocks(other, {"bert.encoder.layer": [3 - gone]})
    with pytest.raises(SurgeryError, match="pruned otherwise"):
        train(other, tmp_path, pruning(num_blocks=3), resume=str(tmp_path / "checkpoint-8"))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = ZOO["bert"].model()
    train(
        model,
        tmp_path,
        pruning(num_blocks=3),
        save_strategy="epoch",
        eval_strategy="epoch",
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    assert len(model.bert.encoder.layer) == 3


def test_the_state_in_a_checkpoint_makes_the_callback_again(tmp_path):
    callback = pruning(num_blocks=3, protect="bert.encoder.layer.3")
    train(ZOO["bert"].model(), tmp_path, callback, save_strategy="epoch")
    state = json.loads((tmp_path / "checkpoint-16" / "trainer_state.json").read_text())["stateful_callbacks"][
        "MPruneCallback"
    ]
    again = MPruneCallback.from_state(state)
    assert again.config == callback.config and again.saved_progress["record"] == callback.record.to_dict()


def test_unsupported_models_are_refused_before_training(tmp_path):
    config = tf.AlbertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=VOCAB, embedding_size=16
    )
    with pytest.raises(UnsupportedModelError, match="shared by the depths"):
        Trainer(tf.AlbertForSequenceClassification(config), arguments(tmp_path), callbacks=[pruning()])


@pytest.mark.parametrize(
    ("settings", "message"), [({"threshold": 98}, "0.98"), ({"treshold": 0.9}, "Did you mean 'threshold'")]
)
def test_settings_are_checked_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        MPruneCallback(**settings)


def test_no_calibration_data_is_an_error_and_nothing_is_pruned(tmp_path):
    model = ZOO["bert"].model()
    with pytest.raises(CalibrationError, match="gave no samples"):
        train(model, tmp_path, pruning(calibration=[]))
    assert len(model.bert.encoder.layer) == 4


def test_a_run_that_removes_nothing_from_a_pruned_model_can_be_resumed(tmp_path):
    def model():
        smaller = ZOO["bert"].model()
        remove_blocks(smaller, {"bert.encoder.layer": [1]})
        return smaller

    callback = pruning(threshold=1.0)
    train(model(), tmp_path, callback, save_strategy="epoch")
    assert callback.plan.removed == {} and callback.record.kept == {"bert.encoder.layer": (0, 2, 3)}
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    train(again, tmp_path, pruning(threshold=1.0), resume=str(tmp_path / "checkpoint-8"))


def test_the_trainer_itself_restores_the_callback_from_a_checkpoint(tmp_path):
    train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3, protect="bert.encoder.layer.3"), save_strategy="epoch")
    resumed = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    trainer = train(
        resumed,
        tmp_path,
        pruning(num_blocks=2),
        resume=str(tmp_path / "checkpoint-8"),
        restore_callback_states_from_checkpoint=True,
    )
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, MPruneCallback)]
    assert callback.config == MPruneConfig(num_blocks=3, protect="bert.encoder.layer.3", retrain_epochs=1)
    assert len(resumed.bert.encoder.layer) == 3


def test_a_callback_is_fresh_in_a_new_trainer_after_an_interrupted_run(tmp_path):
    class Interrupt(tf.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    callback = pruning(threshold=1.0)
    with pytest.raises(KeyboardInterrupt):
        train(ZOO["bert"].model(), tmp_path, callback, Interrupt())
    callback.config = MPruneConfig(num_blocks=3, retrain_epochs=1)
    model = ZOO["bert"].model()
    train(model, tmp_path, callback, num_train_epochs=1)
    assert len(model.bert.encoder.layer) == 3
