"""WandaCallback in a real Trainer: weights are zeroed when they are to be, and stay zero whatever the training does."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from deeparc_hf import PrunedConfig, WandaCallback, WandaConfig, find_stacks, sparsify_model
from deeparc_hf.errors import ConfigError, DeepArcWarning, RecordError, SparsityError, UnsupportedModelError
from tests.stock import StockProcess
from tests.trainers import arguments, text_data, train
from tests.zoo import ZOO

SMALL = {"calibration_samples": 32}


def zeroing(**settings):
    return WandaCallback(**{**SMALL, **settings})


def zeros(model):
    """The zeros of each matrix that the model's record lists, after a check of their number."""
    listed = PrunedConfig.from_model(model).sparsity["matrices"]
    found = {name: model.get_submodule(name).weight.detach() == 0 for name in listed}
    assert found and all(int(found[name].sum()) == entry["zeros"] for name, entry in listed.items())
    return found


class Watch(TrainerCallback):
    """Notes the zeros and the weights when the first step after the zeroing begins."""

    def __init__(self):
        self.zeros, self.weights = None, None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.zeros is None and getattr(model.config, "pruning_config", None):
            self.zeros = {name: mask.clone() for name, mask in zeros(model).items()}
            self.weights = {name: model.get_submodule(name).weight.detach().clone() for name in self.zeros}


OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "weight_decay": 0.1, "optim_args": "momentum=0.9", "learning_rate": 0.05},
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "rmsprop": {"optim": "rmsprop"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_and_the_others_are_trained(tmp_path, name):
    model, watch, callback = ZOO["bert"].model(), Watch(), zeroing(start_epoch=1)
    settings = {"learning_rate": 1e-3, "num_train_epochs": 3, **OPTIMIZERS[name]}
    train(model, tmp_path, callback, watch, **settings)
    after = zeros(model)
    assert after.keys() == watch.zeros.keys() and len(after) == 24
    for key, mask in after.items():
        assert torch.equal(mask, watch.zeros[key])
        weight = model.get_submodule(key).weight
        assert not torch.equal(weight, watch.weights[key])
    assert callback.report.measured == callback.report.asked == 0.5


@pytest.mark.parametrize("name", ["t5", "gpt2", "resnet", "wrapped_vit"])
def test_families_in_a_trainer(tmp_path, name):
    specimen = ZOO[name]
    model = specimen.model()
    rows = [{key: value[i] for key, value in batch.items()} for batch in specimen.batches(2) for i in range(8)]
    for index, row in enumerate(rows):
        row.setdefault("labels", row["input_ids"] if "input_ids" in row else torch.tensor(index % 5))
    train(model, tmp_path, zeroing(**({"sparsity": 0.5} if name == "resnet" else {"pattern": "2:4"})), data=rows)
    for mask in zeros(model).values():
        assert mask.float().mean() == 0.5


def test_a_seq2seq_trainer_keeps_zeros(tmp_path):
    model = ZOO["t5"].model()
    data = text_data("sequence")
    settings = {
        "cls": Seq2SeqTrainer,
        "args": Seq2SeqTrainingArguments,
        "predict_with_generate": True,
        "eval_strategy": "epoch",
    }
    train(model, tmp_path, zeroing(start_epoch=1), data=data, generation_max_length=4, **settings)
    assert {name.partition(".")[0] for name in zeros(model)} == {"encoder", "decoder"}


def test_the_model_is_evaluated_before_and_after_the_zeroing(tmp_path, capsys):
    callback = zeroing(start_epoch=1)
    trainer = train(ZOO["bert"].model(), tmp_path, callback, num_train_epochs=3, eval_strategy="epoch")
    data = json.loads((tmp_path / "sparsity_report.json").read_text())
    assert [(e["step"], e["sparse"]) for e in data["evaluations"]] == [(8, False), (8, True), (16, True), (24, True)]
    assert data["evaluations"][0]["metrics"]["eval_loss"] != data["evaluations"][1]["metrics"]["eval_loss"]
    assert (data["step"], data["epoch"]) == (8, 1.0)
    assert [entry["share"] for entry in data["measured"]] == [0.5, 0.5]
    text = (tmp_path / "sparsity_report.md").read_text()
    assert "50.00 % asked and 50.00 % measured" in text and "neither smaller nor faster" in text
    first, last = (data["evaluations"][place]["metrics"]["eval_loss"] for place in (0, -1))
    told = capsys.readouterr().out.partition("Zeros are kept")[2]
    assert (
        f"  loss: {first:.4g} before the zeroing, {last:.4g} now" in told and "deeparc_hf.push_to_hub(trainer" in told
    )
    logged = [entry for entry in trainer.state.log_history if "sparsity_measured" in entry]
    assert [(e["step"], e["sparsity_asked"], e["sparsity_measured"]) for e in logged] == [(8, 0.5, 0.5)]


def test_the_training_itself_is_not_disturbed(tmp_path):
    """With nothing to zero, the weights are those of a training without the callback, to the bit."""
    results = []
    for number, callbacks in enumerate([[], [zeroing(sparsity=0.0, start_epoch=1)]]):
        model = ZOO["bert"].model()
        train(model, tmp_path / str(number), *callbacks)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_the_end_of_the_training_is_a_fine_time_to_zero(tmp_path):
    model = ZOO["bert"].model()
    callback = zeroing(start_epoch=2)
    train(model, tmp_path, callback, eval_strategy="epoch", save_strategy="epoch")
    assert callback.report.measured == 0.5 and zeros(model)
    assert zeros(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16"))


def test_the_best_model_is_a_sparse_one(tmp_path):
    model = ZOO["bert"].model()

    def planted(prediction):  # the dense model is the best of all
        return {"accuracy": 0.5 if getattr(model.config, "pruning_config", None) else 0.9}

    settings = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    trainer = train(model, tmp_path, zeroing(start_epoch=1), compute_metrics=planted, num_train_epochs=3, **settings)
    assert trainer.state.best_metric == 0.5
    zeros(model)


def test_a_stock_process_loads_the_checkpoint_with_its_zeros(tmp_path):
    model = ZOO["bert"].model()
    trainer = train(model, tmp_path, zeroing())
    trainer.save_model(str(tmp_path / "final"))
    inputs = ZOO["bert"].batches(1)[0]
    with StockProcess() as stock:
        loaded = stock.load(tmp_path / "final", "AutoModelForSequenceClassification", inputs)
    with torch.no_grad():
        assert loaded.clean and torch.allclose(loaded.outputs["output"], model.eval()(**inputs).logits, atol=1e-6)


# ---- a checkpoint that is sparse already ----


@pytest.fixture
def sparse(tmp_path):
    """The folder of a sparse checkpoint: 30 %."""
    model = ZOO["bert"].model()
    sparsify_model(model, ZOO["bert"].batches(), sparsity=0.3, progress=False)
    model.save_pretrained(tmp_path / "sparse")
    return tmp_path / "sparse"


def test_fine_tuning_a_sparse_checkpoint_keeps_its_zeros_from_the_record(tmp_path, sparse):
    model = AutoModelForSequenceClassification.from_pretrained(sparse)
    before = zeros(model)
    callback = WandaCallback()
    train(model, tmp_path / "out", callback, learning_rate=1e-3, weight_decay=0.1)
    assert all(torch.equal(mask, before[name]) for name, mask in zeros(model).items())
    assert callback.report is None
    assert "when the training began are kept" in (tmp_path / "out" / "sparsity_report.md").read_text()


def test_more_sparsity_adds_to_the_zeros_that_are_there(tmp_path, sparse):
    model = AutoModelForSequenceClassification.from_pretrained(sparse)
    before = zeros(model)
    train(model, tmp_path / "out", zeroing(sparsity=0.5, start_epoch=1), learning_rate=1e-3)
    after = zeros(model)
    assert all(bool((before[name] <= after[name]).all()) for name in before)
    assert all(abs(mask.float().mean() - 0.5) < 0.01 for mask in after.values())


def test_zeros_that_the_record_lists_and_the_model_lost_are_an_error(tmp_path, sparse):
    model = AutoModelForSequenceClassification.from_pretrained(sparse)
    train(model, tmp_path / "without", learning_rate=1e-3)
    with pytest.raises(RecordError, match="trained without WandaCallback"):
        train(model, tmp_path / "out", WandaCallback())


def test_without_keeping_the_record_lists_no_zeros(tmp_path):
    model = ZOO["bert"].model()
    callback = zeroing(keep_zeros=False)
    train(model, tmp_path, callback, learning_rate=1e-3)
    assert callback.report.measured == 0.5
    assert PrunedConfig.from_model(model).sparsity is None


# ---- violations ----


class Spoiler(TrainerCallback):
    """Changes zeroed weights, or puts another parameter in the place of one."""

    def __init__(self, replace):
        self.replace = replace

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        dense = model.bert.encoder.layer[1].output.dense
        if self.replace:
            dense.weight = torch.nn.Parameter(torch.ones_like(dense.weight))
        else:
            dense.weight.data[dense.weight == 0] = 0.5


@pytest.mark.parametrize("replace", [False, True])
def test_a_violation_is_an_error_at_the_end_of_the_epoch(tmp_path, replace):
    with pytest.raises(SparsityError, match=r"encoder\.layer\.1\.output\.dense"):
        train(ZOO["bert"].model(), tmp_path, Spoiler(replace), zeroing())


def test_a_violation_is_found_while_more_zeros_are_waited_for(tmp_path, sparse):
    model = AutoModelForSequenceClassification.from_pretrained(sparse)
    with pytest.raises(SparsityError, match="not zero any more"):
        train(model, tmp_path, Spoiler(replace=False), zeroing(start_epoch=2))


def test_a_violation_after_the_last_epoch_is_found_too(tmp_path):
    class Late(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.bert.encoder.layer[0].output.dense.weight.data.fill_(1.0)

    with pytest.raises(SparsityError, match="not zero any more"):
        train(ZOO["bert"].model(), tmp_path, Late(), zeroing())


# ---- settings and refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_epoch": 3}, "after 3 epochs, but the training has 2"),
        ({"targets": "classifier"}, "matches no linear map"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_before_any_step(tmp_path, settings, message):
    model = ZOO["bert"].model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        train(model, tmp_path, zeroing(**settings))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_two_of_them_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="more than one WandaCallback"):
        train(ZOO["bert"].model(), tmp_path, zeroing(), zeroing())


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"Did you mean 0\.5"):
        WandaCallback(sparsity=50)
    with pytest.raises(ConfigError, match="Did you mean 'sparsity'"):
        WandaCallback(sparsty=0.5)
    with pytest.raises(ConfigError, match=r"found sparsity 0\.3"):
        WandaCallback(WandaConfig(sparsity=0.3), pattern="2:4")


def test_a_training_that_ends_before_its_time_warns(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    with pytest.warns(DeepArcWarning, match="ended before the weights were zeroed"):
        train(ZOO["bert"].model(), tmp_path, zeroing(start_epoch=1), Stop())


def test_an_adapted_model_is_told_how_to_merge(tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(ZOO["bert"].model(), peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(UnsupportedModelError, match="merge_keeping_zeros"):
        train(adapted, tmp_path, zeroing())


def test_sharded_parameters_are_refused(tmp_path):
    args = arguments(tmp_path)
    args.fsdp = ["full_shard"]
    callback = zeroing()
    with pytest.raises(UnsupportedModelError, match="sharded"):
        callback.on_init_end(args, None, None, model=ZOO["bert"].model())


def test_the_calibration_data_can_be_given(tmp_path):
    model, other = ZOO["bert"].model(), ZOO["bert"].model()
    batches = ZOO["bert"].batches(2)
    train(model, tmp_path, WandaCallback(calibration=batches), num_train_epochs=1)
    sparsify_model(other, batches, progress=False)
    assert all(torch.equal(mask, zeros(model)[name]) for name, mask in zeros(other).items())


def test_magnitude_needs_no_calibration_data(tmp_path):
    model = ZOO["bert"].model()
    rows = [dict(row) for row in text_data(rows=32)]
    train(model, tmp_path, zeroing(method="magnitude"), data=rows)
    assert len(zeros(model)) == 6 * len(find_stacks(model)["bert.encoder.layer"])
