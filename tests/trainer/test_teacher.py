"""The teacher in the life of a run: resumed, taken back, interrupted, bypassed, beside other parts of a Trainer, and
gone at the end.
"""

from __future__ import annotations

import copy
import gc
import json
import shutil
import weakref

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from deeparc_hf import DistillConfig, MPruneCallback, MPruneConfig
from deeparc_hf.errors import ConfigError, SurgeryError
from tests.trainers import pruning, text_data, train
from tests.zoo import ZOO

from .test_distributed import launch, same
from .test_neighbours import CHECKPOINTING, Interrupt, OutOfMemory, environment
from .test_resume import equal, scripted

STEPS = 8  # of an epoch
TAUGHT = {"alpha": 0.6, "temperature": 2.0, "hidden": 0.3}
TWICE = {"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "keep_snapshots": True}
__all__ = ["environment"]  # a fixture


class Losses(TrainerCallback):
    """The evaluation losses, and how many hooks the model has when each epoch ends."""

    def __init__(self):
        self.losses, self.hooks = [], []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.losses.append(metrics["eval_loss"])

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.hooks.append(len(model._forward_hooks))


def in_memory():
    """The models of BERT that are alive, skeletons without weights left out."""
    found = [item for item in gc.get_objects() if type(item) is tf.BertForSequenceClassification]
    return [model for model in found if not any(parameter.is_meta for parameter in model.parameters())]


# ---- resume ----

RUNS = {
    "two prunings": ({**TWICE, "freeze": "partial", "heal": "lstsq"}, None, 3),
    "second taken back": ({**TWICE, "max_drop": 0.1}, {4: 0.9, 3: 0.85, 2: 0.1}, 5),
    "all taken back": (
        {"num_blocks": 2, "start_epoch": 1, "max_drop": 0.1, "keep_snapshots": True},
        {4: 0.9, 2: 0.1},
        4,
    ),
}


def run(name, folder, resume=None, model=None, distill=TAUGHT):
    settings, accuracy, epochs = RUNS[name]
    model = ZOO["bert"].model() if model is None else model
    arguments = {"num_train_epochs": epochs, "save_strategy": "epoch", "learning_rate": 1e-3}
    if accuracy is not None:
        settings = {**settings, "metric": "accuracy", "k_max": 1}
        arguments |= {"eval_strategy": "epoch", "compute_metrics": scripted(model, accuracy)}
    callback = pruning(**settings, distill=distill)
    return train(model, folder, callback, resume=resume, **arguments), callback


@pytest.mark.parametrize("name", RUNS)
def test_resumed_from_each_checkpoint_it_ends_as_never_interrupted(tmp_path, name):
    whole, _ = run(name, tmp_path / "whole")
    expected = whole.model.state_dict()
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) >= 2
    for checkpoint in checkpoints:
        folder = tmp_path / checkpoint.name
        folder.mkdir()
        shutil.copytree(checkpoint, folder / checkpoint.name)
        if (tmp_path / "whole" / "_pruning_snapshots").is_dir():
            shutil.copytree(tmp_path / "whole" / "_pruning_snapshots", folder / "_pruning_snapshots")
        again, _ = run(name, folder, resume=str(folder / checkpoint.name))
        assert equal(again.model.state_dict(), expected), checkpoint.name
        assert not again.model._forward_hooks and not again.model._forward_pre_hooks


def test_a_resumed_run_needs_the_model_that_teaches(tmp_path):
    run("two prunings", tmp_path)
    checkpoint = tmp_path / f"checkpoint-{2 * STEPS}"
    smaller = tf.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    with pytest.raises(SurgeryError, match="Build the model as it was built when the run began"):
        run("two prunings", tmp_path, resume=str(checkpoint), model=smaller)
    shutil.rmtree(tmp_path / "_pruning_snapshots")
    with pytest.raises(SurgeryError, match="model from before a pruning is needed"):
        run("two prunings", tmp_path, resume=str(checkpoint))


def test_a_teacher_cannot_join_a_run_or_leave_it(tmp_path):
    run("two prunings", tmp_path)
    checkpoint = tmp_path / f"checkpoint-{2 * STEPS}"
    with pytest.raises(ConfigError, match=r"distill .* -> None"):
        run("two prunings", tmp_path, resume=str(checkpoint), distill=None)
    with pytest.warns(match="other settings than it began with"):
        run("two prunings", tmp_path, resume=str(checkpoint), distill={**TAUGHT, "alpha": 0.2})


# ---- in a run ----


def test_evaluations_are_without_the_teacher_and_nothing_stays_on_the_model(tmp_path):
    notes, model = Losses(), ZOO["bert"].model()
    callback = pruning(**TWICE, distill=DistillConfig(**TAUGHT))
    trainer = train(model, tmp_path, callback, notes, eval_strategy="epoch", num_train_epochs=3)
    assert notes.hooks == [0, 1, 1]  # the teacher comes with the first pruning
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not any(block._forward_hooks for block in model.bert.encoder.layer)
    data = trainer.get_eval_dataloader()
    losses = []
    with torch.no_grad():
        for batch in data:
            losses.append(float(model.eval()(**batch).loss))
    assert notes.losses[-1] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    config = json.loads((tmp_path / "pruning_report.json").read_text())["config"]["distill"]
    assert config == {**TAUGHT, "dtype": None}
    assert MPruneConfig.from_dict(callback.config.to_dict()) == callback.config
    assert not (tmp_path / "_pruning_snapshots").exists()


@pytest.mark.filterwarnings("ignore:Before holds what looks like a copy")  # it does, and changes nothing
def test_the_teacher_is_the_model_from_before_the_first_pruning(tmp_path):
    """In the second retraining too: what it teaches with is what the run fine-tuned, bit for bit."""
    kept = {}

    class Look(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            if state.epoch == 1:
                kept["fine-tuned"] = copy.deepcopy(before.weights)
            if state.epoch == 2:
                (teacher,) = [other for other in in_memory() if not any(other is one for one in known)]
                kept["teacher"] = {key: value.clone() for key, value in teacher.state_dict().items()}
                kept["mode"] = teacher.training, any(p.requires_grad for p in teacher.parameters())

    class Before(TrainerCallback):
        def on_epoch_end(self, args, state, control, model=None, **kwargs):
            if state.epoch == 1:
                self.weights = {key: value.clone() for key, value in model.state_dict().items()}

    model, before, callback = ZOO["bert"].model(), Before(), pruning(**TWICE, distill=TAUGHT)
    known = in_memory()
    train(model, tmp_path, before, callback, Look(), num_train_epochs=3, learning_rate=1e-3)
    assert equal(kept["teacher"], kept["fine-tuned"]) and kept["mode"] == (False, False)
    removed = callback.record.removed["bert.encoder.layer"]
    assert len(removed) == 2


def test_after_the_training_the_teacher_is_gone(tmp_path):
    model, callback = ZOO["bert"].model(), pruning(num_blocks=2, distill=TAUGHT)
    known, found = in_memory(), {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if not found:
                (teacher,) = [other for other in in_memory() if not any(other is one for one in known)]
                found["teacher"] = weakref.ref(teacher)
            found["copy"] = copy.deepcopy(model)

    train(model, tmp_path, callback, Look(), num_train_epochs=1)
    copied = found["copy"].train()
    plain = copied(**{key: torch.tensor(value) for key, value in text_data()[:4].items()}).loss
    assert plain.requires_grad
    gc.collect()
    assert found["teacher"]() is None


def test_an_interrupted_training_can_begin_again(tmp_path):
    model, callback = ZOO["bert"].model(), pruning(num_blocks=2, distill=TAUGHT)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, callback, Interrupt(3), num_train_epochs=1)
    notes = Losses()
    train(model, tmp_path, callback, notes, num_train_epochs=1)
    assert notes.hooks == [0]  # nothing more to remove: no teacher, and none left over
    assert not model._forward_hooks


def test_a_smaller_batch_begins_the_run_again_with_its_teacher(tmp_path):
    notes, model = Losses(), ZOO["bert"].model()
    callback = pruning(num_blocks=2, distill=TAUGHT)
    train(model, tmp_path, callback, OutOfMemory(2), notes, num_train_epochs=1, auto_find_batch_size=True)
    assert notes.hooks == [1] and len(callback.attempts) == 2
    assert not model._forward_hooks


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_teacher_in_half_precision_teaches_nearly_the_same(tmp_path, dtype):
    weights = {}
    for name in (None, dtype):
        model = ZOO["llama"].model()
        model.config.use_cache = False
        data = text_data("tokens").map(lambda row: {"labels": row["input_ids"]})
        callback = pruning(num_blocks=2, distill={**TAUGHT, "dtype": name})
        train(model, tmp_path / str(name), callback, data=data, num_train_epochs=1, optim="sgd", learning_rate=1e-2)
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = ZOO["llama"].model()
    difference = (weights[None] - weights[dtype]).norm()
    assert 0 < difference < 0.02 * weights[None].norm()
    assert weights[dtype].dtype == next(start.parameters()).dtype


def test_images_meet_a_teacher_in_half_precision(tmp_path):
    import datasets

    batch = ZOO["vit"].batches(1, 32)[0]
    data = datasets.Dataset.from_dict(
        {"pixel_values": batch["pixel_values"].tolist(), "labels": [0, 1] * 16}
    ).with_format("torch")
    train(
        ZOO["vit"].model(),
        tmp_path,
        pruning(num_blocks=2, distill={"dtype": "bfloat16", "hidden": 0.1}),
        data=data,
        num_train_epochs=1,
    )


@pytest.mark.parametrize("name", ["resnet", "wrapped_vit"])
def test_image_models_are_taught(tmp_path, name):
    import datasets

    batch = ZOO[name].batches(1, 32)[0]
    data = datasets.Dataset.from_dict(
        {"pixel_values": batch["pixel_values"].tolist(), "labels": [0, 1] * 16}
    ).with_format("torch")
    notes, callback = Losses(), pruning(keep_ratio=0.7, distill=TAUGHT)
    train(ZOO[name].model(), tmp_path, callback, notes, data=data, num_train_epochs=1)
    assert callback.plan.removed and notes.hooks == [1]


def test_generation_in_evaluations_is_left_alone(tmp_path):
    lengths = []

    def compute(prediction):
        lengths.append(prediction.predictions.shape)
        return {"length": prediction.predictions.shape[1]}

    model = ZOO["t5"].model()
    callback = pruning(num_blocks={"encoder.block": 4, "decoder.block": 2}, distill=TAUGHT)
    arguments = {
        "eval_strategy": "epoch",
        "predict_with_generate": True,
        "generation_max_length": 5,
        "num_train_epochs": 1,
    }
    data = text_data("tokens", rows=32)
    train(
        model,
        tmp_path,
        callback,
        data=data,
        cls=Seq2SeqTrainer,
        args=Seq2SeqTrainingArguments,
        compute_metrics=compute,
        **arguments,
    )
    assert lengths and lengths[0][0] == 32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(tmp_path, reentrant):
    options = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    results = []
    for extra in ({}, options):
        model = ZOO["bert"].model()
        train(model, tmp_path, pruning(num_blocks=2, distill=TAUGHT), num_train_epochs=1, **extra)
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_a_compiled_model_is_taught_alike(tmp_path, environment):
    results = []
    for compiled in (False, True):
        model = ZOO["bert"].model()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        data = text_data(rows=32)
        train(
            model,
            tmp_path,
            pruning(num_blocks=2, distill=TAUGHT),
            data=data,
            num_train_epochs=1,
            torch_compile=compiled,
            optim="sgd",
        )
        results.append(model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_autocast(tmp_path, environment):
    model = ZOO["bert"].model()
    train(model, tmp_path, pruning(num_blocks=2, distill=TAUGHT), num_train_epochs=1, bf16=True)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_two_processes_are_taught_as_one(tmp_path):
    settings = {**TWICE, "retrain_epochs": 1, "calibration_samples": 48, "distill": TAUGHT, "freeze": "partial"}
    arguments = {"optim": "sgd", "learning_rate": 4e-2}
    two, _ = launch(tmp_path / "two", {"settings": settings, "dropout": 0.0, "arguments": arguments})
    assert (
        two[0]["world"] == 2
        and two[0]["wrapped"] == "DistributedDataParallel"
        and same(two[0]["weights"], two[1]["weights"])
    )
    alone = {**arguments, "per_device_train_batch_size": 8}
    one, _ = launch(tmp_path / "one", {"settings": settings, "dropout": 0.0, "arguments": alone}, processes=1)
    untaught, _ = launch(
        tmp_path / "plain", {"settings": {**settings, "distill": None}, "dropout": 0.0, "arguments": alone}, processes=1
    )
    gap = 0.0
    for name, value in one[0]["weights"].items():
        torch.testing.assert_close(two[0]["weights"][name], value, atol=2e-4, rtol=1e-3, msg=name)
        gap = max(gap, float((value - untaught[0]["weights"][name]).abs().max()))
    assert gap > 2e-3  # far more than the tolerance


# ---- refused ----


class OwnLoss(Trainer):
    """A loss of its own from the logits: what the model calls its loss is not used."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


class LossFunction(Trainer):
    """The Trainer's own way to another loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args, compute_loss_func=lambda out, labels, **_: nn.functional.cross_entropy(out.logits, labels), **kwargs
        )


@pytest.mark.parametrize("cls", [OwnLoss, LossFunction])
def test_a_loss_from_elsewhere_is_an_error_before_the_first_step(tmp_path, cls):
    model = ZOO["bert"].model()
    with pytest.raises(ConfigError, match=r"has not reached the weights.*compute_loss"):
        train(model, tmp_path, pruning(num_blocks=2, distill=TAUGHT), cls=cls, num_train_epochs=1)


def test_label_smoothing_is_refused_when_training_begins(tmp_path):
    model = ZOO["bert"].model()
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        train(model, tmp_path, pruning(num_blocks=2, distill=TAUGHT), num_train_epochs=1, label_smoothing_factor=0.1)
    assert model.config.num_hidden_layers == 4


def test_a_forward_that_a_copy_shares_is_refused(tmp_path):
    model = ZOO["bert"].model()
    own = model.forward
    model.forward = lambda input_ids=None, attention_mask=None, labels=None: own(
        input_ids=input_ids, attention_mask=attention_mask, labels=labels
    )
    with pytest.raises(ConfigError, match="a copy of the model shares"):
        train(model, tmp_path, pruning(num_blocks=2, distill=TAUGHT), num_train_epochs=1)


def test_a_hidden_term_that_reaches_nothing_is_refused(tmp_path):
    settings = {"num_blocks": 3, "protect": ["bert.encoder.layer.[023]"], "freeze": ["bert.encoder.layer.[01]"]}
    model = ZOO["bert"].model()
    model.bert.embeddings.requires_grad_(False)
    with pytest.raises(ConfigError, match="teacher has no say"):
        train(model, tmp_path, pruning(**settings, distill={"alpha": 0, "hidden": 1.0}), num_train_epochs=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 50}, r"alpha must be in \[0, 1\], found 50. Did you mean 0.5"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"hidden": -1.0}, "hidden must be 0 or more"),
        ({"alpha": 0}, "both 0"),
        ({"alhpa": 0.5}, "'alhpa' is not a setting of DistillConfig. Did you mean 'alpha'"),
        ({"dtype": "half"}, "dtype must be one of"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ConfigError, match=message):
        MPruneCallback(distill=settings)
