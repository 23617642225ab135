"""Models with PEFT adapters in a Trainer: pruned beneath, taken back, resumed from checkpoints of adapters alone."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from deeparc_hf import DistillConfig, PrunedConfig, load_pruned, push_to_hub
from deeparc_hf.errors import SurgeryError, UnsupportedModelError
from tests.trainers import ROWS, pruning, train
from tests.zoo import CAUSAL, ZOO

peft = pytest.importorskip("peft")
STEPS = ROWS // 8  # of an epoch
TWICE = {"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1}
GATED = {"num_blocks": 2, "start_epoch": 1, "max_drop": 0.1, "metric": "accuracy", "keep_snapshots": True}
RUNS = {
    "two prunings": (TWICE, None, 3),
    "two prunings, frozen": ({**TWICE, "freeze": "partial"}, None, 3),
    "two prunings in the middle": ({**TWICE, "protect": ("*.0", "*.3")}, None, 3),
    "accepted": (GATED, {4: 0.9, 2: 0.85}, 3),
    "taken back": (GATED, {4: 0.9, 3: 0.1, 2: 0.1}, 4),
}


def adapted(**settings):
    torch.manual_seed(3)
    lora = {"r": 2, "lora_alpha": 8, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", **settings}
    return peft.get_peft_model(ZOO["bert"].model(), peft.LoraConfig(**lora))


def layers(model):
    return model.base_model.model.bert.encoder.layer


def run(name, folder, resume=None, lora=None, **arguments):
    settings, accuracy, epochs = RUNS[name]
    model = adapted(**(lora or {}))
    if accuracy is not None:
        measure = {"compute_metrics": lambda prediction: {"accuracy": accuracy[len(layers(model))]}}
        arguments = {"eval_strategy": "epoch", **measure, **arguments}
    callback = pruning(**settings)
    often = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2, "num_train_epochs": epochs}
    train(model, folder, callback, resume=resume, **{**often, **arguments})
    return model, callback


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The runs that are never interrupted, made once each."""
    made = {}

    def get(name, **lora):
        key = (name, str(lora))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = (folder, *run(name, folder, lora=lora))
        return made[key]

    return get


def test_the_blocks_beneath_go_and_the_adapters_train_on(whole):
    _, model, callback = whole("two prunings")
    assert len(layers(model)) == model.config.num_hidden_layers == 2
    assert callback.record.kept["bert.encoder.layer"] == PrunedConfig.from_model(model).kept["bert.encoder.layer"]
    kept = callback.record.kept["bert.encoder.layer"]
    start = adapted()
    for place, index in enumerate(kept):
        query, before = (m[i].attention.self.query for m, i in ((layers(model), place), (layers(start), index)))
        assert torch.equal(query.base_layer.weight, before.base_layer.weight)  # frozen before, frozen since
        assert not torch.equal(query.lora_B["default"].weight, before.lora_B["default"].weight)
        assert not query.base_layer.weight.requires_grad and query.lora_B["default"].weight.requires_grad


def test_a_pruning_that_is_taken_back_leaves_the_model_with_its_adapters(whole, tmp_path):
    folder, model, callback = whole("taken back")
    assert len(layers(model)) == model.config.num_hidden_layers == 4 and callback.record is None
    # the weights from before the pruning, which the checkpoint of that step holds
    untouched = adapted()
    untouched.load_adapter(folder / f"checkpoint-{STEPS}", "default", is_trainable=True)
    assert equal(state(model), state(untouched))


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name in RUNS for at in (4, 8, 12, 16, 20) if (name, at) != ("accepted", 20)]
)
def test_a_run_resumed_from_adapters_alone_ends_as_the_whole_one(whole, tmp_path, name, at):
    folder, model, callback = whole(name)
    checkpoint = folder / f"checkpoint-{at}"
    assert not (checkpoint / "model.safetensors").exists()
    resumed, again = run(name, folder, resume=str(checkpoint), save_strategy="no")
    assert equal(state(resumed), state(model))
    assert (again.record and again.record.kept) == (callback.record and callback.record.kept)


@pytest.mark.parametrize("at", [12, 20])
def test_a_run_with_adapters_in_some_blocks_is_resumed(whole, at):
    lora = {"layers_to_transform": [1, 3]}
    folder, model, _ = whole("two prunings", **lora)
    resumed, _ = run("two prunings", folder, resume=str(folder / f"checkpoint-{at}"), lora=lora, save_strategy="no")
    assert equal(state(resumed), state(model))
    assert resumed.peft_config["default"].layers_to_transform == model.peft_config["default"].layers_to_transform


@pytest.mark.parametrize("at", [12, 20])
def test_without_a_hint_which_blocks_are_meant_the_record_of_the_run_tells_it(whole, tmp_path, at):
    folder, model, callback = whole("two prunings in the middle")
    assert callback.record.kept["bert.encoder.layer"] == (0, 3)
    checkpoint = tmp_path / f"checkpoint-{at}"
    shutil.copytree(folder / checkpoint.name, checkpoint)
    (checkpoint / "config.json").unlink()  # the model follows by numbers alone at first, and takes other blocks
    resumed, _ = run("two prunings in the middle", tmp_path, resume=str(checkpoint), save_strategy="no")
    assert equal(state(resumed), state(model))


def test_the_checkpoint_of_adapters_tells_which_blocks_it_is_of(whole, tmp_path):
    ZOO["bert"].model().save_pretrained(tmp_path)
    folder, model, _ = whole("two prunings")
    checkpoint = folder / f"checkpoint-{3 * STEPS}"
    base = load_pruned(AutoModelForSequenceClassification, tmp_path, checkpoint)
    again = peft.PeftModel.from_pretrained(base, checkpoint)
    batch = {"input_ids": torch.arange(5, 15)[None]}
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_checkpoint_of_other_adapters_is_refused(whole, tmp_path):
    folder, _, _ = whole("two prunings")
    with pytest.raises(SurgeryError, match=r"adapters in the checkpoint.*with an adapter of the same settings"):
        run("two prunings", tmp_path, str(folder / f"checkpoint-{2 * STEPS + 4}"), {"layers_to_transform": [0]})


def test_healing_beneath_adapters_is_refused_before_any_step(tmp_path):
    model = adapted()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"weights beneath the PEFT adapters.*heal=None.*merge_and_unload"):
        train(model, tmp_path, pruning(num_blocks=3, heal="lstsq"))
    assert equal(state(model), before) and len(layers(model)) == 4


def test_a_teacher_teaches_adapters(tmp_path):
    model = adapted()
    callback = pruning(num_blocks=3, start_epoch=1, distill=DistillConfig())
    train(model, tmp_path, callback, learning_rate=1e-2)
    assert len(layers(model)) == 3
    assert json.loads((tmp_path / "pruning_report.json").read_text())


def test_the_end_of_a_training_tells_that_checkpoints_hold_adapters_alone(tmp_path, capsys):
    train(adapted(), tmp_path, pruning(num_blocks=3, start_epoch=1), save_strategy="epoch")
    told = capsys.readouterr().out
    assert "checkpoints hold its adapters alone: deeparc_hf.save_pruned(trainer.model, folder)" in told
    assert "push_to_hub" not in told


@pytest.mark.parametrize("settings", [{}, {"max_drop": 0.1, "metric": "accuracy"}], ids=["stays", "taken back"])
def test_adapters_are_trained_and_pruned_on_packed_weights(settings, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    config = tf.LlamaConfig(**{**CAUSAL, "hidden_size": 64, "intermediate_size": 128})
    tf.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "whole")
    quantization = tf.BitsAndBytesConfig(load_in_8bit=True)
    base = tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "whole", quantization_config=quantization)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False), lora)
    stack = base.model.layers
    before = {key: value.clone() for key, value in stack.state_dict().items() if "lora" not in key}
    measure = {"compute_metrics": lambda prediction: {"accuracy": 0.9 if len(stack) == 4 else 0.1}}
    gate = {"eval_strategy": "epoch", **measure} if settings else {}
    callback = pruning(num_blocks=3, start_epoch=1, **settings)
    train(model, tmp_path / "run", callback, num_train_epochs=3, learning_rate=1e-2, **gate)
    assert len(stack) == base.config.num_hidden_layers == (4 if settings else 3)
    kept = range(4) if settings else callback.record.kept["model.layers"]
    after = stack.state_dict()
    for place, index in enumerate(kept):
        own = {key.partition(".")[2]: value for key, value in before.items() if key.startswith(f"{index}.")}
        assert own and all(torch.equal(after[f"{place}.{key}"], value) for key, value in own.items())


def test_packed_weights_that_no_snapshot_can_hold_are_refused_when_training_begins(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    tf.LlamaForSequenceClassification(tf.LlamaConfig(**CAUSAL)).save_pretrained(tmp_path / "whole")
    quantization = tf.TorchAoConfig(torchao.Int8WeightOnlyConfig())
    base = tf.LlamaForSequenceClassification.from_pretrained(tmp_path / "whole", quantization_config=quantization)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
    callback = pruning(num_blocks=3, start_epoch=1, max_drop=0.1, metric="loss")
    with pytest.raises(UnsupportedModelError, match=r"quantized \(torchao\).*snapshot.*Leave max_drop and distill out"):
        train(model, tmp_path / "run", callback, num_train_epochs=3, eval_strategy="epoch")
    assert len(base.model.layers) == 4


def test_the_best_adapters_come_back_at_the_end(tmp_path):
    model = adapted()
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = train(model, tmp_path, pruning(num_blocks=3), num_train_epochs=3, learning_rate=1e-2, **arguments)
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    assert len(layers(model)) == 3
    live = peft.get_peft_model_state_dict(model)
    assert live.keys() == best.keys() and all(torch.equal(value, best[key]) for key, value in live.items())


def test_the_first_callback_of_the_readme_is_refused_for_its_healing_and_searches_without(tmp_path):
    goal = {"metric": "accuracy", "max_drop": 0.1, "calibration_samples": 32}
    model = adapted()
    measure = {
        "eval_strategy": "epoch",
        "compute_metrics": lambda prediction: {"accuracy": {4: 0.9, 3: 0.85}.get(len(layers(model)), 0.1)},
        "learning_rate": 1e-2,
        "num_train_epochs": 6,
    }
    with pytest.raises(UnsupportedModelError, match=r"weights beneath the PEFT adapters.*heal=None"):
        train(model, tmp_path, pruning(**goal), **measure)
    train(model, tmp_path, pruning(**goal, search="greedy", heal=None), **measure)
    assert len(layers(model)) == model.config.num_hidden_layers == 3


def test_a_push_of_adapters_keeps_their_own_card(tmp_path):
    model, callback = adapted(), pruning(num_blocks=3)
    trainer = train(model, tmp_path, callback, num_train_epochs=1)
    (tmp_path / "README.md").unlink(missing_ok=True)
    callback.on_push_begin(trainer.args, trainer.state, trainer.control, model=model)
    assert not (tmp_path / "README.md").exists()
    with pytest.raises(UnsupportedModelError, match=r"carries PEFT adapters.*merge_and_unload"):
        push_to_hub(trainer, "somebody/something")
