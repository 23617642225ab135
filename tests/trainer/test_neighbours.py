"""MPruneCallback beside other parts of a stock Trainer: checkpointed activations, compiled models, early stopping, and
their like.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from deeparc_hf import PrunedConfig, PruningPlan
from deeparc_hf.errors import ConfigError
from deeparc_hf.trainer.schedule import needed_epochs
from tests.trainers import arguments, pruning, text_data, train
from tests.zoo import ZOO

STEPS = 8  # of an epoch
TWICE = {"start_epoch": 1, "iterations": 2, "num_blocks": [3, 2]}
_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
# transformers 5.0
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _FIELDS else "gradient_checkpointing"


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def blocks(model):
    return len(model.bert.encoder.layer)


def is_reloaded_by_stock(folder, model, auto=tf.AutoModelForSequenceClassification):
    """Whether from_pretrained finds all keys and no others, and the same weights."""
    again, info = auto.from_pretrained(folder, output_loading_info=True)
    clean = not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return (
        clean
        and again.config.num_hidden_layers == model.config.num_hidden_layers
        and equal(again.state_dict(), model.state_dict())
    )


class Notes(tf.TrainerCallback):
    """The weights as they were at the end of some steps, the first time that these are reached."""

    def __init__(self, *steps):
        self.weights = dict.fromkeys(steps)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.weights.get(state.global_step, ()) is None:
            self.weights[state.global_step] = weights(model)


class Planted:
    """Accuracies that are planted: the next of a list for the number of blocks that the model has."""

    def __init__(self, model, **values):
        self.model = model
        self.values = {int(key.removeprefix("of_")): list(value) for key, value in values.items()}

    def __call__(self, prediction):
        return {"accuracy": self.values[blocks(self.model)].pop(0)}


class OutOfMemory(tf.TrainerCallback):
    """Fails once, in a step of the training, as a batch does that is too large."""

    def __init__(self, step):
        self.step = step
        self.failed = False

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.failed and state.global_step == self.step:
            self.failed = True
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


class Interrupt(tf.TrainerCallback):
    """Ctrl-C."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def environment(monkeypatch):
    """TrainingArguments with torch_compile or bf16 set variables that later trainings would read."""
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "no")
        monkeypatch.delenv(name)
    yield
    torch.compiler.reset()


# ---- how a step is computed ----


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_checkpointed_activations_lead_to_the_same_weights(tmp_path, name):
    runs = []
    data = text_data("class" if name == "bert" else "tokens").map(
        lambda row: {} if name == "bert" else {"labels": row["input_ids"]}
    )
    for checkpointed in (False, True):
        model = ZOO[name].model()
        folder = tmp_path / str(checkpointed)
        callback = pruning(**TWICE, freeze="partial")
        # the decoder's cache is of no use in training, and checkpointing says so
        model.config.use_cache = False
        options = {CHECKPOINTING: checkpointed, "save_strategy": "epoch", "num_train_epochs": 3, "learning_rate": 1e-3}
        train(model, folder, callback, data=data, **options)
        layers = model.bert.encoder.layer if name == "bert" else model.model.layers
        assert all(layer.gradient_checkpointing == checkpointed for layer in layers)
        assert len(layers) == model.config.num_hidden_layers == 2 and len(callback.record.iterations) == 2
        auto = getattr(tf, ZOO[name].auto)
        assert is_reloaded_by_stock(folder / f"checkpoint-{3 * STEPS}", model, auto)
        runs.append((weights(model), callback.record.kept))
    assert runs[0][1] == runs[1][1]
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_a_compiled_model_follows_prunings_and_freezing_in_mid_run(tmp_path, environment, backend):
    runs = []
    for compiled in (False, True):
        model = ZOO["bert"].model()
        callback, notes = pruning(**TWICE, freeze="partial"), Notes(STEPS, 2 * STEPS)
        options = {"torch_compile": True, "torch_compile_backend": backend} if compiled else {}
        trainer = train(
            model,
            tmp_path / str(compiled),
            callback,
            notes,
            num_train_epochs=3,
            save_strategy="epoch",
            learning_rate=1e-3,
            **options,
        )
        assert hasattr(trainer.model_wrapped, "_orig_mod") == compiled
        assert blocks(model) == model.config.num_hidden_layers == 2
        assert is_reloaded_by_stock(tmp_path / str(compiled) / f"checkpoint-{3 * STEPS}", model)
        stack = callback.plan.stacks["bert.encoder.layer"]  # of the three blocks that were left
        assert stack.frozen
        for position, old in enumerate(stack.kept):
            for key, value in model.bert.encoder.layer[position].attention.output.dense.state_dict().items():
                before = notes.weights[2 * STEPS][f"bert.encoder.layer.{old}.attention.output.dense.{key}"]
                assert torch.equal(value, before) == (old in stack.frozen), (old, key)
        runs.append((weights(model), callback.record.kept, {n for n, p in model.named_parameters() if p.requires_grad}))
    assert runs[0][1:] == runs[1][1:]
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-4, atol=1e-5)


def test_a_compiled_model_takes_a_pruning_back_to_the_bit(tmp_path, environment):
    model = ZOO["bert"].model()
    callback, notes = pruning(start_epoch=1, num_blocks=2, max_drop=0.1, metric="accuracy", k_max=1), Notes(STEPS)
    trainer = train(
        model,
        tmp_path,
        callback,
        notes,
        num_train_epochs=2,
        eval_strategy="epoch",
        compute_metrics=Planted(model, of_4=[0.9], of_2=[0.1]),
        torch_compile=True,
        torch_compile_backend="eager",
    )
    assert callback.attempts[-1]["decision"] == "rolled back" and blocks(model) == model.config.num_hidden_layers == 4
    assert equal(weights(model), notes.weights[STEPS])
    model.eval()
    batch = ZOO["bert"].batches(1)[0]
    with torch.no_grad():  # what was compiled for two blocks is not run any more
        torch.testing.assert_close(trainer.model_wrapped(**batch).logits, model(**batch).logits)


def test_training_in_bf16(tmp_path, environment):
    model, notes = ZOO["bert"].model(), Notes(2 * STEPS)
    callback = pruning(**TWICE)
    trainer = train(
        model, tmp_path, callback, notes, bf16=True, num_train_epochs=3, save_strategy="epoch", learning_rate=1e-3
    )
    assert trainer.accelerator.mixed_precision == "bf16"
    assert blocks(model) == model.config.num_hidden_layers == 2 and len(callback.record.iterations) == 2
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}
    for position, old in enumerate(callback.plan.stacks["bert.encoder.layer"].kept):
        name = "attention.output.dense.weight"
        assert not torch.equal(
            model.bert.encoder.layer[position].state_dict()[name],
            notes.weights[2 * STEPS][f"bert.encoder.layer.{old}.{name}"],
        )
    assert is_reloaded_by_stock(tmp_path / f"checkpoint-{3 * STEPS}", model)


# ---- when a training ends ----


@pytest.mark.parametrize(("max_drop", "decision"), [(0.5, "accepted"), (0.07, "rolled back")])
@pytest.mark.parametrize("best", [False, True])
def test_early_stopping_in_a_retraining_judges_by_what_was_measured(tmp_path, best, max_drop, decision):
    """The last value without load_best_model_at_end, else that of the model which is loaded."""
    model = ZOO["bert"].model()
    notes = Notes(STEPS, 2 * STEPS, 3 * STEPS)
    callback = pruning(start_epoch=1, retrain_epochs=3, num_blocks=3, max_drop=max_drop, k_max=1)
    trainer = train(
        model,
        tmp_path,
        callback,
        notes,
        EarlyStoppingCallback(1),
        num_train_epochs=4,
        learning_rate=1e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=best,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        compute_metrics=Planted(model, of_4=[0.9], of_3=[0.8, 0.7, 0.6]),
    )
    assert trainer.state.global_step == 3 * STEPS
    attempt = callback.attempts[-1]
    assert attempt["decision"] == decision and attempt["value"] == (0.8 if best else 0.7) and attempt["baseline"] == 0.9
    accepted = decision == "accepted"
    assert blocks(model) == model.config.num_hidden_layers == (3 if accepted else 4)
    assert equal(weights(model), notes.weights[STEPS if not accepted else 2 * STEPS if best else 3 * STEPS])
    assert not equal(notes.weights[2 * STEPS], notes.weights[3 * STEPS])
    assert (callback.record is not None) == (callback.plan is not None) == accepted
    trainer.save_model(str(tmp_path / "end"))
    assert is_reloaded_by_stock(tmp_path / "end", model)


def test_the_best_metric_of_the_old_structure_does_not_stop_the_new_one(tmp_path):
    def run(folder, *callbacks, **accuracy):
        model = ZOO["bert"].model()
        trainer = train(
            model,
            folder,
            *callbacks,
            EarlyStoppingCallback(1),
            num_train_epochs=4,
            eval_strategy="epoch",
            metric_for_best_model="accuracy",
            greater_is_better=True,
            compute_metrics=Planted(model, **accuracy),
        )
        return model, trainer

    _, trainer = run(tmp_path / "unpruned", of_4=[0.9, 0.7, 0.5, 0.6])
    assert trainer.state.global_step == 2 * STEPS  # such metrics stop a training
    model, trainer = run(tmp_path / "pruned", pruning(**TWICE), of_4=[0.9], of_3=[0.7], of_2=[0.5, 0.6])
    assert trainer.state.global_step == 4 * STEPS and blocks(model) == model.config.num_hidden_layers == 2
    assert trainer.state.best_metric == 0.6


def test_after_an_interruption_the_model_can_be_saved_and_loaded(tmp_path):
    """Ctrl-C in the retraining, while the pruning may still be taken back."""
    model, notes = ZOO["bert"].model(), Notes(STEPS)
    callback = pruning(start_epoch=1, num_blocks=3, freeze="partial", max_drop=1.0)
    trainer = Trainer(
        model,
        arguments(tmp_path, eval_strategy="epoch"),
        train_dataset=text_data(),
        eval_dataset=text_data(),
        callbacks=[callback],
    )
    trainer.add_callback(notes)
    trainer.add_callback(Interrupt(STEPS + 3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    assert blocks(model) == model.config.num_hidden_layers == 3 and is_reloaded_by_stock(tmp_path / "end", model)
    assert PrunedConfig.from_pretrained(tmp_path / "end") == callback.record
    stack = callback.plan.stacks["bert.encoder.layer"]
    for position, old in enumerate(stack.kept):
        name = "attention.output.dense.weight"
        before = notes.weights[STEPS][f"bert.encoder.layer.{old}.{name}"]
        assert torch.equal(model.bert.encoder.layer[position].state_dict()[name], before) == (old in stack.frozen)


# ---- how a training begins ----


def found_batch_size(folder, step, **settings):
    """A run in which the first batch size turns out to be too large at a step."""
    model = ZOO["bert"].model()
    callback, failure, notes = pruning(**settings), OutOfMemory(step), Notes(STEPS)
    options = {}
    if callback.config.gated:
        metrics = Planted(model, of_4=[0.9], of_3=[0.1])
        options = {"eval_strategy": "epoch", "compute_metrics": metrics}
    trainer = train(
        model,
        folder,
        callback,
        failure,
        notes,
        auto_find_batch_size=True,
        num_train_epochs=needed_epochs(callback.config),
        save_strategy="epoch",
        learning_rate=1e-3,
        **options,
    )
    assert failure.failed and trainer.state.train_batch_size == 7  # accelerate goes down by a tenth
    return SimpleNamespace(model=model, callback=callback, trainer=trainer, notes=notes)


@pytest.mark.parametrize(
    ("start_epoch", "step"),
    [(0, 0), pytest.param(0, 3, marks=pytest.mark.slow), pytest.param(1, 0, marks=pytest.mark.slow), (1, STEPS + 1)],
)
def test_a_batch_size_that_is_found_does_not_prune_twice(tmp_path, start_epoch, step):
    # of 4, and then 2 of 3 if it were done twice
    run = found_batch_size(tmp_path, step, start_epoch=start_epoch, keep_ratio=0.75)
    assert blocks(run.model) == run.model.config.num_hidden_layers == 3
    assert len(run.callback.record.iterations) == 1 and len(run.callback.attempts) == 2
    assert run.callback.attempts[-1]["decision"] == "accepted"
    assert run.callback.plan == PruningPlan.from_json(tmp_path / "pruning_plan.json")
    held = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    assert is_reloaded_by_stock(tmp_path / f"checkpoint-{run.trainer.state.global_step}", run.model)


def test_a_batch_size_that_is_found_lets_frozen_blocks_thaw_at_the_next_pruning(tmp_path):
    settings = {"num_blocks": [3, 2], "iterations": 2, "freeze": "partial"}
    run = found_batch_size(tmp_path, 0, **settings)
    stack = run.callback.plan.stacks["bert.encoder.layer"]
    frozen = {
        i
        for i, layer in enumerate(run.model.bert.encoder.layer)
        if not any(p.requires_grad for p in layer.parameters())
    }
    assert blocks(run.model) == 2 and frozen == {stack.kept.index(i) for i in stack.frozen}


@pytest.mark.parametrize(("start_epoch", "step"), [pytest.param(0, 0, marks=pytest.mark.slow), (1, STEPS + 2)])
def test_a_batch_size_that_is_found_leaves_the_way_back_open(tmp_path, start_epoch, step):
    """Pruned, out of memory, trained, and the gate rejects: the model from before the pruning must come back."""
    untrained = weights(ZOO["bert"].model())
    baseline = None if start_epoch else 0.9
    settings = {"num_blocks": 3, "max_drop": 0.1, "metric": "accuracy", "k_max": 1}
    run = found_batch_size(tmp_path, step, start_epoch=start_epoch, baseline=baseline, **settings)
    assert run.callback.attempts[-1]["decision"] == "rolled back"
    assert blocks(run.model) == run.model.config.num_hidden_layers == 4
    assert equal(weights(run.model), run.notes.weights[STEPS] if start_epoch else untrained)


def test_model_init_makes_a_fresh_model_for_each_training_and_each_is_pruned(tmp_path):
    made = []

    def init():
        made.append(ZOO["bert"].model())
        return made[-1]

    callback = pruning(**TWICE)
    trainer = Trainer(
        model_init=init,
        args=arguments(tmp_path, num_train_epochs=3, learning_rate=1e-3),
        train_dataset=text_data(),
        callbacks=[callback],
    )
    ends = []
    for number in (1, 2):
        trainer.train()
        assert trainer.model is made[-1] and len(made) == 1 + number  # the Trainer makes one for itself first
        assert blocks(trainer.model) == trainer.model.config.num_hidden_layers == 2
        assert callback.record == PrunedConfig.from_model(trainer.model) and len(callback.record.iterations) == 2
        trainer.save_model(str(tmp_path / str(number)))
        assert is_reloaded_by_stock(tmp_path / str(number), trainer.model)
        ends.append(weights(trainer.model))
    assert blocks(made[0]) == 4 and equal(*ends)
    assert not torch.equal(ends[0]["classifier.weight"], made[0].state_dict()["classifier.weight"])


# ---- which data ----


def test_data_without_a_length_is_pruned_at_the_start_only(tmp_path):
    stream, model, callback = text_data().to_iterable_dataset(), ZOO["bert"].model(), pruning(num_blocks=3)
    before = weights(model)
    train(model, tmp_path, callback, data=stream, max_steps=6, save_strategy="steps", save_steps=6, learning_rate=1e-3)
    assert blocks(model) == model.config.num_hidden_layers == 3 and callback.attempts[-1]["step"] == 0
    for position, old in enumerate(callback.plan.stacks["bert.encoder.layer"].kept):
        name = "attention.output.dense.weight"
        assert not torch.equal(
            model.bert.encoder.layer[position].state_dict()[name], before[f"bert.encoder.layer.{old}.{name}"]
        )
    assert is_reloaded_by_stock(tmp_path / "checkpoint-6", model)


@pytest.mark.parametrize("settings", [{"start_epoch": 1, "num_blocks": 3}, {"num_blocks": [3, 2], "iterations": 2}])
def test_data_without_a_length_has_no_later_prunings(tmp_path, settings):
    model = ZOO["bert"].model()
    before = weights(model)
    with pytest.raises(ConfigError, match="no length"):
        train(model, tmp_path, pruning(**settings), data=text_data().to_iterable_dataset(), max_steps=20)
    assert blocks(model) == 4 and equal(before, weights(model))
