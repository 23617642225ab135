"""What `find_stacks` promises, for every supported kind of model and every registered family."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from timm.models import get_model_args
from torch import Tensor, nn

from deeparc_hf import Stack, find_stacks, remove_blocks
from deeparc_hf.architectures import describe, families
from deeparc_hf.architectures.base import signature_pins
from deeparc_hf.architectures.refused import Refused
from deeparc_hf.errors import SurgeryError
from deeparc_hf.pruned_type.models import drop_blocks, set_layout
from tests.zoo import CAUSAL, IMAGE, T5, TEXT, VIT_STACK, ZOO, Specimen

STAGE = "first block of the stage: changes shape"
T5_LIKE = ("t5", "mt5", "longt5")
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "projection_dim": 16}

# number of blocks of each stack, as the model's config in zoo.py says
LENGTHS: dict[str, list[int]] = {
    "gemma3": [7],
    "resnet": [2, 3, 4, 2],
    "resnet_basic": [2, 3, 3, 2],
    "timm_convnext": [2, 2, 4, 2],
    "timm_resnet": [2, 3, 3, 2],
    "wrapped_convnext": [2, 2, 4, 2],
    "wrapped_resnext": [2, 2, 3, 2],
}
# lists side by side with parts of the same blocks, in the order in which they run
PARTS = {"xlm": ["attentions", "layer_norm1", "ffns", "layer_norm2"]}
# stages whose first block is pinned: those with a projection on the shortcut
PINNED_STAGES = {
    "resnet": [0, 1, 2, 3],
    "resnet_basic": [1, 2, 3],
    "timm_resnet": [1, 2, 3],
    "wrapped_resnext": [0, 1, 2, 3],
}
FULL_SIZE: dict[str, tuple[list[int], list[int]]] = {
    "resnet18": ([2, 2, 2, 2], [1, 2, 3]),
    "resnet50": ([3, 4, 6, 3], [0, 1, 2, 3]),
    "resnext50_32x4d": ([3, 4, 6, 3], [0, 1, 2, 3]),
    "seresnet50": ([3, 4, 6, 3], [0, 1, 2, 3]),
    "wide_resnet50_2": ([3, 4, 6, 3], [0, 1, 2, 3]),
    "vit_small_patch16_224": ([12], []),
    "deit_base_distilled_patch16_224": ([12], []),
    "convnext_tiny": ([3, 3, 9, 3], []),
}
# refused families have no stacks; a model of each, for the test that every family is met
REFUSED = {
    "albert": lambda: tf.AlbertModel(tf.AlbertConfig(**TEXT, embedding_size=16)),
    "mobilenet_v1": lambda: tf.MobileNetV1Model(tf.MobileNetV1Config()),
}


def dropped() -> nn.Module:
    model = tf.EfficientNetModel(tf.EfficientNetConfig())
    set_layout(model.config, drop_blocks(model, {"encoder.blocks": {"length": 55, "kept": [*range(50), 54]}}))
    return model


# of these no checkpoint is a stock one
DROPPED = {
    "efficientnet": lambda: tf.EfficientNetModel(tf.EfficientNetConfig()),
    "mobilenet_v2": lambda: tf.MobileNetV2Model(tf.MobileNetV2Config()),
    "deeparc_pruned": dropped,
}
OTHERS = {
    "detr": lambda: tf.GroundingDinoForObjectDetection(
        tf.GroundingDinoConfig(
            backbone_config=tf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], out_indices=[2]),
            text_config=tf.BertConfig(**TEXT),
            d_model=32,
            encoder_layers=1,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            num_feature_levels=2,
        )
    ),
    "esm": lambda: tf.EsmModel(tf.EsmConfig(**TEXT, pad_token_id=0)),
    "yolos": lambda: tf.YolosModel(
        tf.YolosConfig(**{**IMAGE, "image_size": [32, 32]}, num_detection_tokens=4, use_mid_position_embeddings=True)
    ),
}
HEADLESS: dict[str, tuple[type, Any, list[str]]] = {
    "bert": (tf.BertModel, tf.BertConfig(**TEXT), ["encoder.layer"]),
    "llama": (tf.LlamaModel, tf.LlamaConfig(**CAUSAL), ["layers"]),
    "vit": (tf.ViTModel, tf.ViTConfig(**IMAGE), [VIT_STACK.removeprefix("vit.")]),
    "t5": (tf.T5Model, tf.T5Config(**T5), ["encoder.block", "decoder.block"]),
    "t5_encoder": (tf.T5EncoderModel, tf.T5Config(**T5), ["encoder.block"]),
    "resnet": (
        tf.ResNetModel,
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[2, 3]),
        ["encoder.stages.0.layers", "encoder.stages.1.layers"],
    ),
}


class Wrapper(nn.Module):
    """Holds a model, as a user's own module does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(2, 2)


def meta(make: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return make(*args, **kwargs)


def forward(model: nn.Module, specimen: Specimen) -> None:
    (batch,) = specimen.batches(1)
    with torch.no_grad():
        if specimen.auto is None:
            model(batch["pixel_values"])
        else:
            model(**batch)


def pinned_reasons(stack: Stack) -> list[tuple[int, str]]:
    return sorted(stack.pinned.items())


@pytest.mark.parametrize("name", ZOO)
def test_stacks_and_blocks_come_in_forward_order(name):
    specimen = ZOO[name]
    model = specimen.model()
    order: list[tuple[str, int]] = []
    expected = []
    for stack_name, stack in find_stacks(model).items():
        for index, block in enumerate(stack.blocks):
            expected.append((stack_name, index))
            block.register_forward_pre_hook(lambda *_, key=(stack_name, index): order.append(key))
    forward(model, specimen)
    assert order == expected


@pytest.mark.parametrize("name", ZOO)
def test_a_stack_is_named_by_its_module_path_and_as_long_as_the_config_says(name):
    specimen = ZOO[name]
    model = specimen.model()
    stacks = find_stacks(model)
    expected = LENGTHS.get(name, [4, 3] if specimen.kind in ("seq2seq", "audio") else [4])
    assert [len(stack) for stack in stacks.values()] == expected
    for stack_name, stack in stacks.items():
        assert stack.name == stack_name
        parts = [re.sub(r"\{.*\}", part, stack_name) for part in PARTS.get(name, [""])]
        assert list(map(model.get_submodule, parts)) == list(stack.containers)
        for i, block in enumerate(stack.blocks):
            held = [model.get_submodule(f"{part}.{i}") for part in parts]
            assert [block] == held if name not in PARTS else list(block.children()) == held


@pytest.mark.parametrize("name", ZOO)
def test_exactly_the_blocks_that_must_stay_are_pinned(name):
    stacks = list(find_stacks(ZOO[name].model()).values())
    for number, stack in enumerate(stacks):
        if name in T5_LIKE:
            ((index, reason),) = stack.pinned.items()
            assert index == 0
            assert reason.startswith("owns") and "relative_attention_bias" in reason
        else:
            expected = [(0, STAGE)] if number in PINNED_STAGES.get(name, []) else []
            assert pinned_reasons(stack) == expected


@pytest.mark.parametrize("name", ZOO)
def test_sides_are_those_of_an_encoder_decoder_model(name):
    sides = [stack.side for stack in find_stacks(ZOO[name].model()).values()]
    assert sides == (["encoder", "decoder"] if ZOO[name].kind in ("seq2seq", "audio") else [None] * len(sides))


@pytest.mark.parametrize("name", ZOO)
def test_find_stacks_changes_nothing(name):
    model = ZOO[name].model()
    first = next(iter(find_stacks(model).values())).blocks[0]
    first.train()  # a mixed state, which a careless eval()/train() pair would lose
    next(first.parameters()).requires_grad_(False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict()) if hasattr(model, "config") else copy.deepcopy(model._model_args)
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    random_state = torch.get_rng_state()
    find_stacks(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert (model.config.to_dict() if hasattr(model, "config") else model._model_args) == config
    assert [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == gradients


@pytest.mark.parametrize("name", ZOO)
def test_a_model_on_the_meta_device_has_the_same_stacks(name):
    real, empty = find_stacks(ZOO[name].model()), find_stacks(meta(ZOO[name].make))
    assert list(real) == list(empty)
    for stack_name, stack in empty.items():
        assert (len(stack), stack.pinned, stack.side) == (
            len(real[stack_name]),
            real[stack_name].pinned,
            real[stack_name].side,
        )
        assert all(p.is_meta for p in stack.container.parameters())


@pytest.mark.parametrize("name", HEADLESS)
def test_a_headless_model_has_the_same_stacks_without_the_prefix(name):
    make, config, expected = HEADLESS[name]
    assert list(find_stacks(meta(make, config))) == expected


@pytest.mark.parametrize("name", ["bert", "t5", "resnet", "timm_vit", "wrapped_vit"])
def test_a_wrapper_does_not_change_the_names(name):
    model = ZOO[name].model()
    inside = find_stacks(Wrapper(model))
    assert list(inside) == list(find_stacks(model))
    assert all(model.get_submodule(key) is stack.container for key, stack in inside.items())


@pytest.mark.parametrize(("text", "vision"), [(2, 5), (3, 3)])
def test_each_tower_of_clip_is_counted_by_its_own_config(text, vision):
    config = tf.CLIPConfig(
        text_config={**TOWER, "num_hidden_layers": text, "vocab_size": 120},
        vision_config={**TOWER, "num_hidden_layers": vision, "image_size": 32, "patch_size": 8},
    )
    model = tf.CLIPModel(config)
    stacks = find_stacks(model)
    assert {name: (len(stack), str(stack.count)) for name, stack in stacks.items()} == {
        "text_model.encoder.layers": (text, "text_config.num_hidden_layers"),
        "vision_model.encoder.layers": (vision, "vision_config.num_hidden_layers"),
    }
    remove_blocks(model, {"vision_model.encoder.layers": [1]})
    assert (model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers) == (
        text,
        vision - 1,
    )
    assert (config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers) == (text, vision)


@pytest.mark.parametrize("dense", [[], [1]])
def test_a_mixture_of_experts_is_one_stack(dense):
    config = tf.Qwen2MoeConfig(
        **CAUSAL,
        num_experts=4,  # as many as layers: only one of the two numbers counts layers
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=dense,
    )
    ((name, stack),) = find_stacks(meta(tf.Qwen2MoeForCausalLM, config)).items()
    assert (name, len(stack), str(stack.count)) == ("model.layers", 4, "num_hidden_layers")


def test_umt5_has_a_bias_in_every_block_and_so_no_pins():
    stacks = find_stacks(meta(tf.UMT5ForConditionalGeneration, tf.UMT5Config(**T5)))
    assert {name: (len(stack), dict(stack.pinned)) for name, stack in stacks.items()} == {
        "encoder.block": (4, {}),
        "decoder.block": (3, {}),
    }


def test_the_pin_of_a_two_layer_t5_is_found():
    stacks = find_stacks(
        meta(tf.T5ForConditionalGeneration, tf.T5Config(**{**T5, "num_layers": 2, "num_decoder_layers": 2}))
    )
    assert [list(stack.pinned) for stack in stacks.values()] == [[0], [0]]


def test_a_model_of_one_block_has_a_stack_of_one():
    ((name, stack),) = find_stacks(meta(tf.BertModel, tf.BertConfig(**{**TEXT, "num_hidden_layers": 1}))).items()
    assert (name, len(stack), dict(stack.pinned)) == ("encoder.layer", 1, {})


@pytest.mark.parametrize("name", FULL_SIZE)
def test_timm_models_in_full_size(name):
    assert name in timm.list_models()
    lengths, pinned = FULL_SIZE[name]
    stacks = list(find_stacks(meta(timm.create_model, name)).values())
    assert [len(stack) for stack in stacks] == lengths
    assert [i for i, stack in enumerate(stacks) if dict(stack.pinned) == {0: STAGE}] == pinned
    assert [i for i, stack in enumerate(stacks) if stack.pinned] == pinned


@pytest.mark.parametrize("name", ["resnet", "timm_resnet", "timm_convnext", "wrapped_resnext"])
def test_each_stage_of_a_cnn_feeds_the_next(name):
    stacks = find_stacks(ZOO[name].model())
    names = list(stacks)
    assert [stack.next_stack for stack in stacks.values()] == [*names[1:], None]


def test_every_registered_family_has_a_summary_and_a_model_in_these_tests():
    met = {describe(meta(specimen.make)).family.name for specimen in ZOO.values()}
    for name in families.names():
        family = families.get(name)
        assert family.summary and "\n" not in family.summary
        if name in REFUSED:
            with pytest.raises(TypeError, match="cannot be pruned by layers"):
                find_stacks(meta(REFUSED[name]))
        elif name in DROPPED:
            assert describe(meta(DROPPED[name])).family.name == name
        elif name in OTHERS:
            assert describe(meta(OTHERS[name])).family.name == name
        else:
            assert name in met, f"no model of the family {name!r} in tests/zoo.py"
            assert not issubclass(family, Refused)


class Block(nn.Module):
    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(Tensor(*shape)))


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([{"a": (2,)}] * 3, {}),
        ([{"a": (2,), "b": (1,)}, {"a": (2,)}, {"a": (2,)}], {0: "owns b, which"}),
        ([{"a": (2,)}, {"a": (2,), "b": (1,)}, {"a": (2,), "b": (1,)}], {0: "lacks b, which"}),
        ([{"a": (2,)}, {"a": (2,)}, {"a": (3,)}], {2: "changes shape: its a differs"}),
        ([{"a": (3,)}, {"a": (2,)}], {0: "changes shape: its a differs"}),
        ([{"a": (1,)}, {"a": (2,)}, {"a": (3,)}], {}),
        ([{"a": (1,)}, {"a": (2,)}] * 2, {}),  # in turn
        ([{"b": (1,)}, *[{"a": (1,)}, {"a": (2,)}] * 2], {0: "owns b, which"}),
        ([{"a": (1,)}], {}),
        ([], {}),
    ],
)
def test_a_block_unlike_all_others_is_pinned(blocks, expected):
    pins = signature_pins([Block(**shapes) for shapes in blocks])
    assert list(pins) == list(expected)
    assert all(pins[index].startswith(reason) for index, reason in expected.items())


def levit(depth=4):
    config = tf.LevitConfig(
        image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[2, 3, depth], key_dim=[8] * 3
    )
    return tf.LevitForImageClassification(config).eval()


def test_a_number_that_counts_pairs_of_blocks():
    """LeViT's attention and its feed-forward network are residual blocks each, and counted as one."""
    name, model = "levit.encoder.stages.2.layers", levit()
    stack = find_stacks(model)[name]
    assert len(stack) == 8 and str(stack.count) == "depths[2]" and not stack.pinned
    remove_blocks(model, {name: [2, 3]}, stock_only=True)
    assert model.config.depths == [2, 3, 3] and len(find_stacks(model)[name]) == 6
    with pytest.raises(SurgeryError, match=r"depths\[2\] counts 2 blocks as one"):
        remove_blocks(model, {name: [2]}, stock_only=True)
    with pytest.raises(SurgeryError, match="cannot express"):
        remove_blocks(model, {name: [1, 3]}, stock_only=True)


def test_a_number_that_counts_pairs_beside_others():
    """LeViT's first stages end in what leads to the next: an attention that subsamples, and a network of another
    width.
    """
    name, model = "levit.encoder.stages.1.layers", levit()
    stack = find_stacks(model)[name]
    assert len(stack) == 8 and list(stack.pinned) == [6, 7] and str(stack.count) == "depths[1]"
    remove_blocks(model, {name: [1, 2]}, stock_only=True)
    assert model.config.depths == [2, 2, 4] and list(find_stacks(model)[name].pinned) == [4, 5]
    with pytest.raises(SurgeryError, match=r"depths\[1\] counts 2 blocks as one"):
        remove_blocks(model, {name: [2]}, stock_only=True)
    with pytest.raises(SurgeryError, match=r"Block 4 of .* is pinned"):
        remove_blocks(model, {name: [0, 4]}, stock_only=True)
    remove_blocks(model, {name: [0, 1]}, stock_only=True)
    assert model.config.depths == [2, 1, 4] and len(find_stacks(model)[name]) == 4


def test_stages_that_other_entries_tell_are_no_blocks():
    """HGNetV2: with its lists of values a build loses a stage, whatever the first of its depths is."""
    config = tf.HGNetV2Config(
        embedding_size=16,
        stem_channels=[3, 8, 8],
        hidden_sizes=[16, 16, 16, 16],
        depths=[3, 1, 1, 1],
        stage_in_channels=[8, 16, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 16, 16],
        stage_num_blocks=[1, 1, 3, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
    )
    stacks = find_stacks(tf.HGNetV2ForImageClassification(config))
    assert "hgnet_v2.encoder.stages" not in stacks and "encoder.stages" not in stacks
    assert any(name.endswith("encoder.stages.2.blocks") for name in stacks)


def test_kinds_in_turn_go_by_whole_turns():
    """Jamba: every fourth layer attends, every second has experts."""
    config = tf.JambaConfig(
        **{**CAUSAL, "num_hidden_layers": 12, "num_key_value_heads": 2},
        attn_layer_period=4,
        attn_layer_offset=2,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    )
    model = tf.JambaForCausalLM(config).eval()
    assert not find_stacks(model)["model.layers"].pinned
    with pytest.raises(SurgeryError, match="cannot express"):
        remove_blocks(model, {"model.layers": [5]}, stock_only=True)
    remove_blocks(model, {"model.layers": [4, 5, 6, 7]}, stock_only=True)
    assert model.config.num_hidden_layers == 8


def test_without_turns_all_kinds_but_the_most_frequent_are_pinned():
    blocks = [Block(a=(size,)) for size in (1, 2, 1, 2, 1)]
    assert signature_pins(blocks) == {} and list(signature_pins(blocks, in_turn=False)) == [1, 3]


# blocks in stages, in sequences, and side by side with other lists, with what counts them
LISTS: dict[str, tuple[Any, list[str]]] = {
    "regnet": (
        lambda: tf.RegNetForImageClassification(
            tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[2, 3, 3, 2], groups_width=8)
        ),
        [f"regnet.encoder.stages.{i}.layers: depths[{i}]" for i in range(4)],
    ),
    "pvt_v2": (
        lambda: tf.PvtV2ForImageClassification(
            tf.PvtV2Config(hidden_sizes=[16] * 4, num_attention_heads=[1, 1, 2, 2], depths=[2] * 4, mlp_ratios=[2] * 4)
        ),
        [f"pvt_v2.encoder.layers.{i}.blocks: depths[{i}]" for i in range(4)],
    ),
    "swin": (
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(image_size=32, embed_dim=16, depths=[2, 6], num_heads=[2, 4], window_size=2)
        ),
        [f"swin.encoder.layers.{i}.blocks: depths[{i}]" for i in range(2)],
    ),
    "squeezebert": (
        lambda: tf.SqueezeBertForSequenceClassification(
            tf.SqueezeBertConfig(**{**TEXT, "hidden_size": 32, "embedding_size": 32}, q_groups=2, k_groups=2)
        ),
        ["transformer.encoder.layers: num_hidden_layers"],
    ),
    "timm_beit": (lambda: timm.create_model("beit_base_patch16_224", depth=3), ["blocks: depth"]),
    "timm_davit": (
        lambda: timm.create_model("davit_tiny", depths=(1, 1, 3, 1)),
        [f"stages.{i}.blocks: depths[{i}]" for i in range(4)],
    ),
    # stages that stand in one list of blocks
    "timm_hiera": (lambda: timm.create_model("hiera_tiny_224"), ["blocks: stages"]),
    # a part is built before the model, so that the build stops in it
    "timm_hybrid": (lambda: timm.create_model("vit_tiny_r_s16_p8_224"), ["blocks: depth"]),
    # its config is optional, and single arguments overrule it
    "timm_naflexvit": (lambda: timm.create_model("naflexvit_base_patch16_gap"), ["blocks: depth"]),
    # the first of the numbers counts no list of blocks, and in some stages one block more stands before those counted
    "timm_efficientvit": (
        lambda: timm.create_model("efficientvit_b0"),
        [f"stages.{i}.blocks: depths[{i + 1}]" for i in range(4)],
    ),
    # numbers in lists in a list
    "timm_crossvit": (
        lambda: timm.create_model("crossvit_tiny_240"),
        [f"blocks.{i}.blocks.{j}: depth[{i}][{j}]" for i in range(3) for j in range(2)],
    ),
    # a list with a value a block
    "timm_xception": (lambda: timm.create_model("xception41p"), ["blocks: block_cfg"]),
}


def test_numbers_of_blocks_of_another_kind_follow_a_removal_in_timm_models():
    """ConViT's first blocks attend by place, and so many are told by an argument that stands in no settings."""
    model = timm.create_model("convit_tiny", num_classes=5).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for end in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2):
            end.weight.zero_()
            end.bias.zero_()
        expected = model(images)
        remove_blocks(model, {"blocks": [0]})
        assert (len(model.blocks), model.local_up_to_layer) == (11, 9)
        assert get_model_args(model)["local_up_to_layer"] == 9
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("name", LISTS)
def test_blocks_in_stages_and_sequences_are_found_by_what_counts_them(name):
    make, expected = LISTS[name]
    assert [f"{stack.name}: {stack.count}" for stack in find_stacks(meta(make)).values()] == expected
