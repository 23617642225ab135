"""Models that cannot be pruned correctly are refused, with the type, what was found, why, and the way out."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
import transformers as tf
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deeparc_hf import find_stacks, remove_blocks
from deeparc_hf.errors import SurgeryError, UnsupportedModelError
from tests.zoo import TEXT, ZOO

GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 120}
ADD_A_FAMILY = "add a family: one file, see 'add a family' in CONTRIBUTING.md"


class CountlessConfig(tf.PreTrainedConfig):
    """A config that says nothing about the number of layers."""

    model_type = "countless"

    def __init__(self, width: int = 8, **kwargs) -> None:
        self.width = width
        super().__init__(**kwargs)


class CountlessLayer(GradientCheckpointingLayer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.map(hidden)


class CountlessModel(tf.PreTrainedModel):
    config_class = CountlessConfig
    base_model_prefix = "model"

    def __init__(self, config: CountlessConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(CountlessLayer(config.width) for _ in range(5))
        self.post_init()


class ListlessModel(tf.PreTrainedModel):
    """A transformers model without any list of layers."""

    config_class = CountlessConfig
    base_model_prefix = "model"

    def __init__(self, config: CountlessConfig) -> None:
        super().__init__(config)
        self.map = nn.Linear(config.width, config.width)
        self.post_init()


class NeedyModel(CountlessModel):
    """Its __init__ needs more than the config."""

    def __init__(self, config: CountlessConfig, tokenizer: object) -> None:
        super().__init__(config)
        self.tokenizer = tokenizer


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = ZOO["bert"].model(), ZOO["vit"].model()


def albert() -> nn.Module:
    return tf.AlbertForSequenceClassification(tf.AlbertConfig(**TEXT, embedding_size=16))


def quantized(settings: object) -> nn.Module:
    model = ZOO["llama"].model()
    model.config.quantization_config = settings
    return model


def lora() -> LoraConfig:
    return LoraConfig(target_modules=["query"])


def without_config(model: nn.Module) -> nn.Module:
    del model.peft_config
    return model


# the model, and what its message has to say: type, found, why, way out
UNSUPPORTED = {
    "timm_efficientnet": (
        lambda: timm.create_model("tf_efficientnet_lite0"),
        "EfficientNet (type 'tf_efficientnet_lite0')",
        "found blocks.3 (3 x InvertedResidual)",
        "takes no argument that counts these blocks",
        "AutoModelForImageClassification",
    ),
    "albert": (
        albert,
        "AlbertForSequenceClassification (type 'albert')",
        "layers that are run",
        "shared",
        "num_hidden_layers",
    ),
    "timm_mixer": (
        lambda: timm.create_model("mixer_s32_224"),
        "MlpMixer (type 'mixer_s32_224')",
        "found blocks (8 x MixerBlock)",
        "takes no argument that counts these blocks",
        "the entry point of mixer_s32_224 gives num_blocks itself",
        "pip install -U timm",
    ),
    "timm_vgg": (
        lambda: timm.create_model("vgg11"),
        "VGG (type 'vgg11')",
        "cannot be pruned by layers",
        "found no list in it of blocks that are alike",
    ),
    "torchvision": (
        torchvision.models.resnet18,
        "ResNet",
        "neither a transformers model nor a timm model",
        "rebuild them smaller",
        "CONTRIBUTING.md",
    ),
    "plain module": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        "Sequential",
        "neither a transformers model nor a timm model",
        "rebuild them smaller",
        "CONTRIBUTING.md",
    ),
    "no list of layers": (
        lambda: ListlessModel(CountlessConfig()),
        "ListlessModel (type 'countless')",
        "no list of residual layers",
        "cannot be pruned by layers",
        ADD_A_FAMILY,
    ),
    "no count in the config": (
        lambda: CountlessModel(CountlessConfig()),
        "CountlessModel (type 'countless')",
        "layers (5 x CountlessLayer)",
        "no entry of its config counts these blocks",
        ADD_A_FAMILY,
    ),
    "more than a config": (
        lambda: NeedyModel(CountlessConfig(), object()),
        "NeedyModel (type 'countless')",
        "missing 1 required positional argument: 'tokenizer'",
        "cannot be rebuilt from its own config",
        "Give the class an __init__(config)",
    ),
}
UNSUPPORTED_WITH_WEIGHTS = {
    "two models": (Pair, "Pair", "holds 2 models", "side by side (text, image)", "Prune each of them by itself"),
    "adapters without a config": (
        lambda: without_config(inject_adapter_in_model(lora(), ZOO["bert"].model())),
        "BertForSequenceClassification",
        "carries PEFT adapters without a config",
        "cannot follow",
        "merge_and_unload()",
    ),
    "4 bits": (
        lambda: quantized(tf.BitsAndBytesConfig(load_in_4bit=True)),
        "LlamaForCausalLM",
        "is quantized",
        "(bitsandbytes)",
        "Load it without quantization_config",
    ),
    "8-bit floats": (
        lambda: quantized(tf.FineGrainedFP8Config()),
        "LlamaForCausalLM",
        "is quantized",
        "(fp8)",
        "Load it without quantization_config",
    ),
    "quantized, as its config.json says": (
        lambda: quantized({"quant_method": "gptq", "bits": 4}),
        "LlamaForCausalLM",
        "is quantized",
        "(gptq)",
        "Load it without quantization_config",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_model_is_refused_with_type_finding_reason_and_way_out(name):
    make, *parts = UNSUPPORTED[name]
    with torch.device("meta"):
        model = make()
    for refused in (lambda: find_stacks(model), lambda: remove_blocks(model, {"layers": [1]})):
        with pytest.raises(UnsupportedModelError) as caught:
            refused()
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.parametrize("name", UNSUPPORTED_WITH_WEIGHTS)
def test_an_adapted_quantized_or_double_model_is_refused(name):
    make, *parts = UNSUPPORTED_WITH_WEIGHTS[name]
    with pytest.raises(UnsupportedModelError) as caught:
        find_stacks(make())
    for part in parts:
        assert part in str(caught.value)


def test_adapters_that_were_merged_are_no_obstacle():
    assert list(find_stacks(get_peft_model(ZOO["bert"].model(), lora()).merge_and_unload())) == ["bert.encoder.layer"]


@pytest.mark.parametrize("thing", ["bert-base-uncased", None, {}, 3, nn.Linear])
def test_what_is_no_model_is_refused_with_a_hint_how_to_get_one(thing):
    with pytest.raises(UnsupportedModelError, match=rf"found {type(thing).__name__}\. Load it first.*from_pretrained"):
        find_stacks(thing)


def assert_refused_and_untouched(
    model: nn.Module, removal: dict[str, list[int]], pattern: str, error: type[Exception] = SurgeryError, **settings
) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config, before = model.config, copy.deepcopy(model.config.to_dict())
    own = {
        name: copy.copy({k: v for k, v in vars(m).items() if not k.startswith("_")})
        for name, m in model.named_modules()
    }
    with pytest.raises(error, match=pattern):
        remove_blocks(model, removal, **settings)
    assert model.config is config
    assert model.config.to_dict() == before
    assert not hasattr(model.config, "pruning_config")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {
        name: {k: v for k, v in vars(m).items() if not k.startswith("_")} for name, m in model.named_modules()
    } == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gpt2_that_scales_attention_by_layer_loses_its_last_block_only():
    def make() -> nn.Module:
        torch.manual_seed(0)
        # transformers 5.0 scales in eager attention only
        config = tf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, attn_implementation="eager")
        return tf.GPT2LMHeadModel(config).eval()

    assert_refused_and_untouched(
        make(), {"transformer.h": [1]}, r"GPT2LMHeadModel.*depends on (the|a) block's place", stock_only=True
    )
    model = make()
    remove_blocks(model, {"transformer.h": [3]})  # nothing stands behind it
    assert model.config.n_layer == 3


def test_what_would_be_left_must_be_a_stack_still():
    """The last stage of NeXtViT: two convolutional blocks and one with attention. Of one each nothing tells that they
    are blocks; then the model could not be pruned or healed again.
    """
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 3), num_classes=5).eval()
    before = dict(model.named_modules())
    with pytest.raises(SurgeryError, match=r"2 blocks that are left of stages\.3\.blocks are of different kinds"):
        remove_blocks(model, {"stages.3.blocks": [1]})
    assert dict(model.named_modules()) == before


def test_deberta_whose_first_layer_has_a_convolution_keeps_its_first_layer():
    def make() -> nn.Module:
        torch.manual_seed(0)
        config = tf.DebertaV2Config(
            **TEXT, conv_kernel_size=3, relative_attention=True, position_biased_input=False, pos_att_type=["c2p"]
        )
        return tf.DebertaV2ForSequenceClassification(config).eval()

    assert_refused_and_untouched(
        make(), {"deberta.encoder.layer": [0]}, "DebertaV2ForSequenceClassification.*as it was"
    )
    model = make()
    remove_blocks(model, {"deberta.encoder.layer": [2]})
    assert model.config.num_hidden_layers == 3
