"""Surgery: in place, all or nothing, verified; configs, optimizers and frozen parameters follow."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import PrunedConfig, analyze, apply_plan, find_stacks, prune_model, remove_blocks
from deeparc_hf.core.transaction import Transaction
from deeparc_hf.errors import CalibrationError, CalibrationWarning, DeepArcWarning, PlanError, RecordError, SurgeryError
from deeparc_hf.pruning.freezing import freeze_blocks
from deeparc_hf.pruning.surgery import forget_parameters
from tests.zoo import ZOO

BERT = "bert.encoder.layer"


def snapshot(model: nn.Module) -> dict:
    """Everything that surgery might touch."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "configs": [
            id(m.config) for m in model.modules() if isinstance(getattr(m, "config", None), tf.PreTrainedConfig)
        ],
        "config": json.dumps(model.config.to_dict(), default=str, sort_keys=True) if hasattr(model, "config") else None,
        "indices": [(n, m.layer_idx) for n, m in model.named_modules() if hasattr(m, "layer_idx")],
        "extra": {
            k: copy.deepcopy(v)
            for k, v in vars(model).items()
            if k in ("_model_args", "pruning_config", "feature_info")
        },
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = snapshot(model)
    state = after.pop("state")
    assert state.keys() == before["state"].keys()
    assert all(torch.equal(value, before["state"][name]) for name, value in state.items())
    for key, value in after.items():
        assert value == before[key], key


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        (
            "bert",
            {"bert.encoder.layers": [1]},
            r"no stack 'bert\.encoder\.layers'.*Did you mean 'bert\.encoder\.layer'",
        ),
        ("bert", {BERT: [4]}, "blocks 0 to 3; there is no block 4"),
        ("bert", {BERT: [-1]}, "there is no block -1"),
        ("bert", {BERT: [0, 1, 2, 3]}, "All 4 blocks"),
        ("bert", {BERT: [1, 1]}, "named twice"),
        ("bert", {BERT: [True]}, "whole numbers"),
        ("bert", {BERT: ["1"]}, "whole numbers"),
        ("bert", {BERT: 1}, "list of whole numbers"),
        ("bert", {BERT: None}, "list of whole numbers"),
        ("bert", {BERT: [1.0]}, "whole numbers"),
        ("bert", {}, "nothing to remove"),
        ("bert", {BERT: []}, "nothing to remove"),
        ("bert", [1], "Expected a dict"),
        ("t5", {"encoder.block": [0]}, "Block 0 of encoder.block is pinned: owns .*relative_attention_bias"),
        ("resnet", {"resnet.encoder.stages.1.layers": [0, 1]}, "pinned: first block of the stage: changes shape"),
        ("timm_resnet", {"layer2": [0]}, "pinned: first block"),
    ],
)
def test_impossible_removals_are_refused_and_change_nothing(name, blocks, message):
    model = ZOO[name].model()
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=message):
        remove_blocks(model, blocks)
    assert_unchanged(model, before)


STEPS = [
    "expect",
    "follow_generation",
    "check",
    "keep_children",
    "compose",
    "freeze_blocks",
    "forget_parameters",
    "reset",
]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", ["t5", "timm_vit", "resnet"])
def test_a_failure_halfway_leaves_everything_untouched(monkeypatch, name, step, error):
    specimen = ZOO[name]
    model = specimen.model().train()
    stacks = find_stacks(model)
    optimizer = adam_with_state(model, specimen)
    state = copy.deepcopy(optimizer.state_dict())
    before = snapshot(model)
    owner = {
        "expect": "deeparc_hf.pruning.surgery",
        "follow_generation": "deeparc_hf.pruning.surgery",
        "check": "deeparc_hf.pruning.verify.Expectation",
        "keep_children": "deeparc_hf.core.transaction.Transaction",
        "compose": "deeparc_hf.checkpoint.record.PrunedConfig",
        "freeze_blocks": "deeparc_hf.pruning.surgery",
        "forget_parameters": "deeparc_hf.pruning.surgery",
        "reset": "torch.compiler",
    }[step]
    calls = []
    real = Transaction.keep_children
    done = {"freeze_blocks": freeze_blocks, "forget_parameters": forget_parameters}

    def fail(*args, **kwargs):
        calls.append(args)
        if step == "keep_children" and len(calls) < 2 and len(stacks) > 1:
            return real(*args, **kwargs)  # the second stack fails when the first is already cut
        if step in ("freeze_blocks", "forget_parameters"):
            done[step](*args, **kwargs)  # the very last moment
        raise error

    monkeypatch.setattr(f"{owner}.{step}", fail)
    with pytest.raises(type(error)):
        remove_blocks(
            model, {n: [1] for n, s in stacks.items() if 1 not in s.pinned}, freeze="partial", optimizer=optimizer
        )
    assert calls
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert all(torch.equal(after["state"][k]["exp_avg"], v["exp_avg"]) for k, v in state["state"].items())
    remove_blocks(model, {n: [1] for n, s in stacks.items() if 1 not in s.pinned})  # and it can still be done


def adam_with_state(model, specimen):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = specimen.batches(1, 4)[0]
    outputs = model(inputs["pixel_values"]) if not hasattr(model, "config") else model(**inputs)
    tensor = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    tensor.float().pow(2).mean().backward()
    optimizer.step()
    return optimizer


def test_the_optimizer_follows():
    specimen = ZOO["bert"]
    model = specimen.model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )
    model(**specimen.batches(1)[0]).logits.sum().backward()
    optimizer.step()
    gone = set(map(id, model.bert.encoder.layer[1].parameters()))
    kept_state = {id(p): copy.deepcopy(optimizer.state[p]) for p in model.bert.encoder.layer[2].parameters()}
    remove_blocks(model, {BERT: [1]}, optimizer=optimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert not gone & set(held) and set(held) == set(map(id, model.parameters()))
    assert set(map(id, optimizer.state)) == set(held)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for parameter in model.bert.encoder.layer[1].parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], kept_state[id(parameter)]["exp_avg"])
    optimizer.load_state_dict(optimizer.state_dict())
    model(**specimen.batches(1)[0]).logits.sum().backward()
    optimizer.step()


def test_forgetting_frozen_parameters_keeps_the_groups():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([a, b], lr=0.1, momentum=0.9)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    forget_parameters(optimizer, [], [a])
    assert optimizer.param_groups[0]["params"] == [a, b] and list(optimizer.state) == [b]


def test_a_shared_config_is_not_changed():
    config = tf.BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, vocab_size=120
    )
    one, other = tf.BertModel(config), tf.BertModel(config)
    remove_blocks(one, {"encoder.layer": [1, 2]})
    assert config.num_hidden_layers == 4 and other.config is config
    assert one.config.num_hidden_layers == 2 and not hasattr(config, "pruning_config")
    assert all(
        m.config is one.config for m in one.modules() if isinstance(getattr(m, "config", None), tf.PreTrainedConfig)
    )


def test_settings_made_at_run_time_stay():
    model = ZOO["t5"].model()
    model.config.use_cache = False
    model.encoder.config.my_note = "kept"
    model.config._name_or_path = "org/base"
    remove_blocks(model, {"encoder.block": [2], "decoder.block": [1]})
    assert model.config.use_cache is False and model.encoder.config.my_note == "kept"
    assert (model.config.num_layers, model.config.num_decoder_layers) == (3, 2)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (3, 2)
    assert PrunedConfig.from_model(model).base_model == "org/base"


def test_layer_lists_lose_the_same_indices():
    model = ZOO["gemma3"].model()
    kinds = list(model.config.layer_types)
    remove_blocks(model, {"model.layers": [1, 5]})
    assert model.config.layer_types == [k for i, k in enumerate(kinds) if i not in (1, 5)]
    assert "full_attention" not in model.config.layer_types[:4] and len(set(kinds)) == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(5))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart", "whisper"])
def test_cached_generation_works_after_a_removal(name):
    specimen = ZOO[name]
    model, (batch,) = specimen.model(), specimen.batches(1)
    batch.pop("labels", None), batch.pop("decoder_input_ids", None)
    remove_blocks(model, {n: [1] for n in find_stacks(model)})
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        model.generate(**batch, **kwargs, use_cache=True), model.generate(**batch, **kwargs, use_cache=False)
    )


def test_repeated_prunings_compose_to_original_indices():
    model = ZOO["gemma3"].model()
    remove_blocks(model, {"model.layers": [1, 3]})  # left: 0 2 4 5 6
    record = remove_blocks(model, {"model.layers": [1, 4]})  # these are 2 and 6
    assert record.kept == {"model.layers": (0, 4, 5)} and record.removed == {"model.layers": (1, 2, 3, 6)}
    assert [entry["removed"] for entry in record.iterations] == [{"model.layers": [1, 3]}, {"model.layers": [2, 6]}]
    assert model.config.pruning_config == record.to_dict()
    assert PrunedConfig.from_model(model).kept == record.kept


def test_the_result_is_the_original_with_these_blocks_skipped():
    specimen = ZOO["bert"]
    model, (batch,) = specimen.model(), specimen.batches(1)
    skipped = copy.deepcopy(model)
    for index in (1, 3):
        skipped.bert.encoder.layer[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    remove_blocks(model, {BERT: [1, 3]})
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, skipped(**batch).logits, atol=1e-6, rtol=0)


class HiddenOrder(tf.BertForSequenceClassification):
    """Uses a block's place in a way that no attribute shows."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.logits = output.logits * len(self.bert.encoder.layer)
        return output


def test_a_model_that_depends_on_the_number_of_blocks_is_refused():
    specimen = ZOO["bert"]
    model = HiddenOrder(specimen.model().config)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match="does not compute what the original computes"):
        remove_blocks(model, {BERT: [2]})
    assert_unchanged(model, before)


def test_a_model_that_is_not_what_its_config_says_is_refused():
    model = ZOO["bert"].model()
    model.bert.encoder.layer[2].intermediate.dense = nn.Linear(32, 64)
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=r"not what its settings describe: bert\.encoder\.layer\.2\.intermediate"):
        remove_blocks(model, {BERT: [1]})
    assert_unchanged(model, before)


def test_a_malformed_record_in_the_config_stops_everything():
    model = ZOO["bert"].model()
    model.config.pruning_config = {"format_version": 1, "stacks": {BERT: {"length": 6, "kept": [0, 1, 1, 2]}}}
    before = snapshot(model)
    for act in (lambda: remove_blocks(model, {BERT: [1]}), lambda: PrunedConfig.from_model(model)):
        with pytest.raises(RecordError, match="rising block indices"):
            act()
    assert_unchanged(model, before)


def test_plans_are_applied_only_to_models_that_they_fit():
    specimen = ZOO["bert"]
    plan = analyze(specimen.model(), specimen.batches(), num_blocks=2)
    smaller = specimen.model()
    remove_blocks(smaller, {BERT: [1]})
    with pytest.raises(PlanError, match=r"4 blocks in bert\.encoder\.layer; .* has 3 blocks. Call analyze"):
        apply_plan(smaller, plan)
    with pytest.raises(PlanError, match="no such stack"):
        apply_plan(ZOO["llama"].model(), plan)


def test_an_empty_plan_changes_nothing_and_gives_an_empty_record():
    specimen = ZOO["bert"]
    model = specimen.model()
    before = snapshot(model)
    plan = prune_model(model, specimen.batches(), threshold=1.0, freeze="partial")
    assert plan.removed == {} and plan.num_frozen == 0
    assert apply_plan(model, plan) == PrunedConfig({})
    assert_unchanged(model, before)


def test_a_threshold_that_takes_more_than_half_of_the_blocks_warns():
    specimen = ZOO["bert"]
    with pytest.warns(CalibrationWarning, match=r"threshold 0\.01 takes 3 of 4 blocks.*num_blocks or keep_ratio"):
        plan = analyze(specimen.model(), specimen.batches(), threshold=0.01)
    assert plan.num_kept == 1
    assert analyze(specimen.model(), specimen.batches(), num_blocks=1).num_kept == 1  # asked for by number: no warning


def test_prune_model_does_nothing_when_the_analysis_fails():
    specimen = ZOO["bert"]
    model = specimen.model()
    before = snapshot(model)
    with pytest.raises(CalibrationError):
        prune_model(model, [], num_blocks=2)
    with pytest.raises(PlanError, match="at most"):
        prune_model(model, specimen.batches(), num_blocks=9)
    assert_unchanged(model, before)


def test_wrapped_models_are_pruned_inside():
    model = ZOO["bert"].model()
    wrapper = nn.ModuleDict({"encoder": model})
    remove_blocks(wrapper, {BERT: [1]})
    assert len(model.bert.encoder.layer) == 3 == model.config.num_hidden_layers


def test_a_compiled_model_is_pruned_and_runs():
    specimen = ZOO["bert"]
    model, (batch,) = specimen.model(), specimen.batches(1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch)
        remove_blocks(compiled, {BERT: [1]})
        assert torch.equal(compiled(**batch).logits, model(**batch).logits)
    assert len(model.bert.encoder.layer) == 3


def test_half_precision_models_are_pruned():
    specimen = ZOO["llama"]
    model = specimen.model().to(torch.bfloat16)
    remove_blocks(model, {"model.layers": [1]})
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 3


@pytest.mark.parametrize("setting", ["output_hidden_states", "output_attentions"])
def test_outputs_of_every_block_do_not_hinder_the_verification(setting):
    model = ZOO["bert"].model()
    model.set_attn_implementation("eager")
    setattr(model.config, setting, True)
    remove_blocks(model, {BERT: [1]})
    assert len(model(input_ids=torch.tensor([[5, 6]]))[setting.removeprefix("output_")]) in (3, 4)


def test_blocks_that_the_example_does_not_reach_are_not_removed():
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    text = {**sizes, "model_type": "llama", "vocab_size": 120, "num_key_value_heads": 4}
    vision = {**sizes, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
    model = tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=119)
    ).eval()
    with pytest.raises(SurgeryError, match=r"merges images into its text.*example=batch"):
        remove_blocks(model, {next(iter(find_stacks(model))): [1]})
    of_images, of_text = sorted(find_stacks(model), key=lambda name: "vision" not in name)
    example = {"input_ids": torch.tensor([[5, 6], [7, 8]])}
    before = snapshot(model)
    with pytest.raises(SurgeryError, match=r"inputs \(input_ids\) do not reach .*vision.*\.1\. Give a batch that does"):
        remove_blocks(model, {of_images: [1]}, example=example)
    assert_unchanged(model, before)
    with pytest.raises(SurgeryError, match=r"do not reach .*vision"):  # whose features may reach a block by its place
        remove_blocks(model, {of_text: [1]}, example=example)
    seen = {"input_ids": torch.tensor([[5, *[119] * 16, 6]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    remove_blocks(model, {of_text: [1]}, example=seen)
    assert model.config.text_config.num_hidden_layers == 2


def test_t5_with_fewer_encoder_than_decoder_blocks_warns_of_cached_generation():
    """A limit of stock transformers, met by a fresh model of that shape too."""
    specimen = ZOO["t5"]
    config = copy.deepcopy(specimen.model().config)
    config.num_layers, config.num_decoder_layers = 2, 3
    fresh = tf.T5ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 7]])
    try:
        fresh.generate(ids, max_new_tokens=2)
    except IndexError:
        with pytest.warns(DeepArcWarning, match="no longer generate with a cache.*use_cache=False"):
            model = specimen.model()
            remove_blocks(model, {"encoder.block": [2, 3]})
        assert model.generate(ids, max_new_tokens=2, use_cache=False).shape[1] > 1
    else:
        remove_blocks(specimen.model(), {"encoder.block": [2, 3]})  # no warning where it works
