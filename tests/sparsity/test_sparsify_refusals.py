"""What sparsify_model refuses: each message says what is wrong, what was found and what to do,
and nothing is changed.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.utils import parametrizations, prune

from deeparc_hf import WandaConfig, find_stacks, sparsify_model
from deeparc_hf.errors import CalibrationError, CalibrationWarning, ConfigError, RecordError, UnsupportedModelError
from tests import sparsity_reference as reference
from tests.zoo import CAUSAL, TEXT, VOCAB, ZOO, spread

from .test_sparsify import batches, check, made


def refused(model, error, message, data="text", **settings):
    """Check the message, and that the model is what it was."""
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    with pytest.raises(error, match=message) as caught:
        sparsify_model(model, batches("bert") if data == "text" else data, progress=False, **settings)
    after = model.state_dict()
    changed = [
        key
        for key, old in before.items()
        if old.device.type != "meta" and not torch.equal(old.nan_to_num(7), after[key].nan_to_num(7))
    ]
    assert changed == []
    assert getattr(getattr(model, "config", None), "pruning_config", None) is None
    assert str(caught.value).endswith((".", "?"))
    return str(caught.value)


MOE = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**CAUSAL, num_local_experts=4)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**CAUSAL, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    ),
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**CAUSAL, num_local_experts=4, head_dim=8)),
}


@pytest.mark.parametrize("name", MOE)
def test_fused_experts_are_refused_by_name_and_can_be_left_out(name):
    torch.manual_seed(0)
    model = spread(MOE[name]()).eval()
    message = refused(
        model, UnsupportedModelError, r"weights of model\.layers\.0\.mlp\.experts of .* cannot be zeroed one by one"
    )
    assert (
        "several matrices in one tensor (4, " in message
        and "targets=[...]" in message
        and "'*.self_attn.q_proj'" in message
    )
    report = check(model, batches("llama"), targets=["*.self_attn.*"], wanted=lambda path: ".self_attn." in path)
    assert len(report.matrices) == 16


def test_matrices_that_are_kept_as_tensors_of_several_heads_are_refused():
    model = tf.XLNetForSequenceClassification(
        tf.XLNetConfig(d_model=32, n_layer=3, n_head=4, d_inner=48, vocab_size=VOCAB)
    )
    refused(
        model,
        UnsupportedModelError,
        r"transformer\.layer\.0\.rel_attn of .*XLNetRelativeAttention\.q holds .* \(32, 4, 8\)",
    )
    report = sparsify_model(model, batches("bert"), targets=["*.ff.*"], progress=False)
    assert len(report.matrices) == 6 and report.measured == 0.5


def replaced(path, make):
    """A BERT with another module in the place of one map."""
    model = made("bert")
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, make(model.get_submodule(path)))
    return model


class Standardized(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(
            x, (self.weight - self.weight.mean(1, keepdim=True)) / self.weight.std(1, keepdim=True), self.bias
        )


def packed(linear):
    linear.weight = nn.Parameter((linear.weight * 20).to(torch.int8), requires_grad=False)
    return linear


class Wrapped(torch.Tensor):
    """Stands for what torchao and others keep as a weight."""


def subclassed(linear):
    linear._parameters["weight"] = nn.Parameter(torch.Tensor._make_subclass(Wrapped, linear.weight.detach()))
    return linear


def standardized(linear):
    other = Standardized(linear.in_features, linear.out_features)
    other.load_state_dict(linear.state_dict())
    return other


ODD = {
    "packed": (packed, "it is packed by quantization .Linear.; sparsify the model first and quantize it afterwards"),
    "subclass": (subclassed, "it stores its weight as Wrapped of torch.float32, and not as plain numbers"),
    "weight norm": (parametrizations.weight_norm, "its weight is computed from something else .ParametrizedLinear"),
    "mask": (lambda m: prune.l1_unstructured(m, "weight", 0.2), "its weight is computed from something else .Linear"),
    "standardized": (standardized, "Standardized does not compute with its weight as it is stored"),
    "fused attention": (
        lambda m: nn.MultiheadAttention(32, 4),
        "nn.MultiheadAttention computes with its matrices in one fused call",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_maps_whose_weights_are_not_plain_are_refused_by_name(kind):
    make, reason = ODD[kind]
    path = "bert.encoder.layer.2.attention.self.key"
    message = refused(
        replaced(path, make),
        UnsupportedModelError,
        rf"The weights of {path}.* of Bert.*cannot be zeroed one by one: .*{reason}",
    )
    assert "Nothing was changed. To leave it out, name the maps that are meant: targets=[...]" in message


@pytest.mark.parametrize("kind", ["packed", "weight norm", "standardized", "subclass"])
def test_maps_whose_weights_are_not_plain_can_be_left_out(kind):
    model = replaced("bert.encoder.layer.2.attention.self.key", ODD[kind][0])
    report = sparsify_model(model, method="magnitude", targets=["*.query", "*.output.dense"], progress=False)
    assert len(report.matrices) == 12 and report.measured == 0.5


def test_dynamically_quantized_models_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(made("bert"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        UnsupportedModelError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query.*packed by quantization"
    ):
        sparsify_model(model, batches("bert"), progress=False)


def test_standardized_convolutions_are_refused():
    import timm

    model = timm.create_model("resnet18", num_classes=5, layers=[1, 1, 1, 1])
    conv = timm.layers.StdConv2d(64, 64, 3, padding=1)
    model.layer1[0].conv2 = conv
    refused(
        model,
        UnsupportedModelError,
        r"layer1\.0\.conv2 of ResNet .*StdConv2d does not compute with its weight as it is stored",
    )


def test_weights_that_two_maps_share_are_refused():
    model = made("bert")
    layers = model.bert.encoder.layer
    layers[2].attention.self.key.weight = layers[1].attention.self.key.weight
    refused(
        model,
        UnsupportedModelError,
        r"layer\.1\.attention\.self\.key .*its weight is tied to that of .*layer\.2\.attention\.self\.key",
    )


def test_a_weight_that_the_embeddings_share_is_refused():
    model = tf.BertForSequenceClassification(tf.BertConfig(**{**TEXT, "vocab_size": 48}))
    model.bert.encoder.layer[0].intermediate.dense.weight = model.bert.embeddings.word_embeddings.weight
    data = [{"input_ids": torch.randint(5, 48, (2, 6))}]
    refused(
        model, UnsupportedModelError, r"intermediate\.dense .* tied to that of bert\.embeddings\.word_embeddings", data
    )


def test_models_without_weights_are_refused():
    with torch.device("meta"):
        model = ZOO["bert"].make()
    refused(model, UnsupportedModelError, r"bert\..* has no weights \(meta device\)\. Load the model's checkpoint")


def test_sharded_models_are_refused(tmp_path):
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = made("bert")
        linear = model.bert.encoder.layer[0].output.dense
        linear.weight = nn.Parameter(
            distributed.tensor.distribute_tensor(linear.weight.detach(), mesh, [distributed.tensor.Shard(0)])
        )
        with pytest.raises(
            UnsupportedModelError,
            match=r"parameters of Bert.* are sharded \(FSDP, DeepSpeed\).*before the model is wrapped",
        ):
            sparsify_model(model, batches("bert"), progress=False)
    finally:
        distributed.destroy_process_group()


def test_models_that_deepspeed_has_partitioned_are_refused():
    model = made("bert")
    model.classifier.weight.ds_id = 0
    refused(model, UnsupportedModelError, "are sharded")


def test_adapted_models_are_refused_with_advice_that_is_about_zeros():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(made("bert"), LoraConfig(target_modules=["query"]))
    message = refused(model, UnsupportedModelError, "carries PEFT adapters.*merge_and_unload")
    assert "removing blocks" not in message


def test_a_model_that_says_it_is_quantized_is_refused():
    model = made("bert")
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    refused(model, UnsupportedModelError, r"is quantized \(gptq\)\. Load it without quantization_config")


NO_DATA = {
    "none": (lambda: None, r"The method 'wanda' needs calibration data\. Give a dataloader, or method='magnitude'"),
    "empty": (
        list,
        r"The calibration data gave no samples\. Give a dataloader that is not empty; an iterator can be used only "
        r"once",
    ),
    "used up": (lambda: iter(()), r"The calibration data gave no samples"),
    "empty batches": (
        lambda: [{key: value[:0] for key, value in b.items()} for b in batches("bert")],
        "The calibration data gave no samples",
    ),
    "texts": (lambda: [["hello"]], r"Cannot use a calibration batch of type list: found \[str\]"),
    "no ids": (lambda: [{"pixel_values": torch.ones(2, 3)}], r"has no 'input_ids' for BertForSequenceClassification"),
    "too long": (
        lambda: [{"input_ids": torch.full((2, 600), 7)}],
        r"cannot run on a calibration batch \(input_ids: \(2, 600\)\)",
    ),
}


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("kind", NO_DATA)
def test_data_that_give_nothing_to_measure_are_refused(kind, sequential):
    data, message = NO_DATA[kind]
    refused(made("bert"), CalibrationError, message, data(), sequential=sequential)


def test_a_pattern_that_does_not_fit_is_refused_before_any_work():
    message = refused(
        made("resnet"), ConfigError, r"The pattern 4:8 needs .* divisible by 8, but .* has \d+\.", [], pattern="4:8"
    )
    assert "targets=[...]" in message and "Nothing was changed" in message


TARGETS = [
    (
        ["*.quary"],
        r"'\*\.quary' matches no linear map .*'\*\.query', say\. Found, for example: "
        r"bert\.encoder\.layer\.0\.attention\.self\.query",
    ),
    (
        ["bert.encoder.layer.0.attention.self.quary"],
        r"Did you mean 'bert\.encoder\.layer\.0\.attention\.self\.query'\?",
    ),
    (["*.query", "classifier"], r"'classifier' matches no linear map .*\(embeddings, heads, stems are left alone\)"),
    (["*.embeddings.*"], "matches no linear map"),
    (["query"], r"A pattern covers the whole path: '\*\.query', say"),
]


@pytest.mark.parametrize(("targets", "message"), TARGETS)
def test_targets_that_match_nothing_are_refused(targets, message):
    refused(made("bert"), ConfigError, message, targets=targets)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_map_that_never_runs_is_refused_by_name(sequential):
    model = made("bert")
    model.bert.encoder.layer[1].output.spare = nn.Linear(32, 32)
    message = refused(
        model,
        CalibrationError,
        r"bert\.encoder\.layer\.1\.output\.spare did not run in the forward",
        sequential=sequential,
    )
    assert "targets=[...]" in message
    sparsify_model(model, batches("bert"), targets=["*.query"], sequential=sequential, progress=False)


@pytest.mark.parametrize("sequential", [True, False])
def test_inputs_that_are_not_numbers_are_refused_by_the_first_map_that_meets_them(sequential):
    data = [{"pixel_values": torch.full((2, 3, 32, 32), torch.nan)}]
    message = refused(
        made("vit"),
        CalibrationError,
        r"The inputs of vit\..*0\.[a-z_.]+ hold NaN or infinity",
        data,
        sequential=sequential,
    )
    assert "torch.float32" in message and "Load the model in float32 or bfloat16" in message


@pytest.mark.filterwarnings("default::deeparc_hf.errors.CalibrationWarning")
def test_padding_in_a_convolution_over_positions_is_warned_of():
    torch.manual_seed(0)
    model = spread(tf.ConvBertForSequenceClassification(tf.ConvBertConfig(**TEXT, embedding_size=32))).eval()
    with pytest.warns(CalibrationWarning, match=r"key_conv_attn_layer\.depthwise.*padding counts among its inputs"):
        sparsify_model(model, batches("bert"), progress=False)


def test_no_warning_for_tables_of_distances_beside_a_single_padded_text():
    data = [{key: value[:1] for key, value in inputs.items()} for inputs in batches("deberta_v2")]
    check(made("deberta_v2"), data)


def test_padding_without_a_mask_is_warned_of():
    data = [{"input_ids": inputs["input_ids"]} for inputs in batches("bert")]
    with pytest.warns(CalibrationWarning, match=r"padding \(token 0\) but no attention_mask"):
        sparsify_model(made("bert"), data, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 50}, r"sparsity must be in \[0, 1\), found 50\. Did you mean 0\.5\?"),
        ({"sparsty": 0.5}, r"Did you mean 'sparsity'\?"),
        ({"pattern": "2:5"}, "pattern must be one of '2:4', '4:8'"),
        ({"pattern": "2:4", "sparsity": 0.3}, "zeroes one half, found sparsity 0.3 beside it"),
        ({"method": "wandb"}, "wanda"),
        ({"targets": []}, "targets is an empty list"),
        ({"calibration_samples": 0}, "calibration_samples must be at least 1"),
        (
            {"config": {"sparsity": 0.5}},
            "config must be an WandaConfig, found dict|config must be a WandaConfig, found dict",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    refused(made("bert"), ConfigError, message, **settings)


def test_settings_by_keyword_go_over_those_of_the_config():
    report = sparsify_model(
        made("bert"), None, WandaConfig(method="magnitude", sparsity=0.2), sparsity=0.5, progress=False
    )
    assert report.config == WandaConfig(method="magnitude", sparsity=0.5)


def test_a_record_that_does_not_fit_the_model_is_refused_before_any_work():
    model = made("bert")
    record = {"format_version": 1, "stacks": {"bert.encoder.layer": {"length": 9, "kept": [0, 1]}}}
    model.config.pruning_config = record
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RecordError, match=r"2 of 9 blocks of bert.encoder.layer are left, but the model has 4"):
        sparsify_model(model, batches("bert"), progress=False)
    assert model.config.pruning_config == record and reference.differences(model.state_dict(), before) == []


def test_models_that_find_stacks_refuses_are_refused_alike():
    model = tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16))
    with pytest.raises(UnsupportedModelError) as found:
        find_stacks(model)
    with pytest.raises(UnsupportedModelError) as sparsified:
        sparsify_model(model, batches("bert"), progress=False)
    assert str(sparsified.value) == str(found.value)
