"""Entries of a config that name blocks by value, index or key follow a removal, as stock classes reload it; what
nothing shows is told.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deeparc_hf import find_stacks, load_pruned, remove_blocks
from deeparc_hf.architectures import Layout, describe
from deeparc_hf.checkpoint.record import current_record
from deeparc_hf.core.transaction import Transaction
from deeparc_hf.errors import DeepArcWarning, SurgeryError, UnsupportedModelError
from deeparc_hf.pruning.surgery import follow_record
from tests.zoo import CAUSAL, SEQ2SEQ, TEXT, spread

needs_gemma4 = pytest.mark.skipif(
    not hasattr(tf, "Gemma4TextConfig"), reason="this transformers has no settings by layer index"
)

SIX = {**TEXT, "num_hidden_layers": 6}
SIX_CAUSAL = {**CAUSAL, "num_hidden_layers": 6}
LED = {**SEQ2SEQ, "encoder_layers": 6, "decoder_layers": 6}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
NEO = {"vocab_size": 120, "hidden_size": 32, "num_layers": 6, "num_heads": 4, "window_size": 4}
REFORMER = {
    "hidden_size": 32,
    "attention_head_size": 8,
    "num_attention_heads": 4,
    "feed_forward_size": 48,
    "vocab_size": 120,
    "axial_pos_embds_dim": [16, 16],
    "axial_pos_shape": [8, 8],
}
GEMMA4 = {**SIX_CAUSAL, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 0, "sliding_window": 4}
QWEN_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
}
QWEN_VISION = {
    "depth": 6,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
}
DPT = {
    **{key: value for key, value in SIX.items() if key != "vocab_size"},
    "image_size": 32,
    "patch_size": 8,
    "backbone_out_indices": [0, 1, 3, 5],
    "neck_hidden_sizes": [8, 8, 16, 16],
    "fusion_hidden_size": 16,
}


def longformer(windows: list[int]) -> nn.Module:
    return tf.LongformerForSequenceClassification(tf.LongformerConfig(**SIX, attention_window=windows, pad_token_id=1))


def led() -> nn.Module:
    return tf.LEDForConditionalGeneration(tf.LEDConfig(**LED, attention_window=[4, 8, 4, 8, 4, 8]))


def gpt_neo() -> nn.Module:
    return tf.GPTNeoForCausalLM(tf.GPTNeoConfig(**NEO, attention_types=[[["global", "local"], 3]]))


def gemma4() -> nn.Module:
    return tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**GEMMA4, layer_types=["sliding_attention", "full_attention"] * 3))


def qwen2_moe() -> nn.Module:
    return tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SIX_CAUSAL, **MOE, mlp_only_layers=[1, 3]))


def reformer() -> nn.Module:
    return tf.ReformerForSequenceClassification(tf.ReformerConfig(**REFORMER, attn_layers=["local", "lsh"] * 3))


def funnel(sizes: list[int]) -> nn.Module:
    return tf.FunnelForSequenceClassification(
        tf.FunnelConfig(block_sizes=sizes, d_model=32, n_head=4, d_head=8, d_inner=48, vocab_size=120)
    )


def qwen_vl() -> nn.Module:
    ids = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
    vision = {**QWEN_VISION, "fullatt_block_indexes": [2, 5], "window_size": 112}
    return tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **ids)
    )


def dpt() -> nn.Module:
    return tf.DPTForDepthEstimation(tf.DPTConfig(**DPT))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return spread(make()).eval()


def text(length: int = 32) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(5, 120, (2, length), generator=torch.Generator().manual_seed(3))}


def image(side: int) -> dict[str, torch.Tensor]:
    """An image of side x side patches within a text, as Qwen2.5-VL takes it; a window has 8 x 8."""
    ids = torch.tensor([[5, 152, *[150] * (side * side // 4), 153, 7, 8]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(side * side, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "mm_token_type_ids": (ids == 150).long(),
    }


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = copy.deepcopy(model)(**inputs)  # a copy lies on the grid of memory, where convolutions sum in one order
        return found["logits"] if "logits" in found else found["predicted_depth"]


def without(model: nn.Module, stack: str, gone: list[int], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the original puts out with blocks skipped, whose first output is the hidden states."""
    whole = copy.deepcopy(model)
    for index in gone:
        whole.get_submodule(stack)[index].register_forward_hook(
            lambda module, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
        )
    return outputs(whole, inputs)


# the model, its stack, the blocks that go, and the entries afterwards
FOLLOW: dict[str, tuple[Callable[[], nn.Module], str, list[int], dict[str, Any]]] = {
    "a window a layer": (
        lambda: longformer([4, 8, 16, 8, 4, 8]),
        "longformer.encoder.layer",
        [2, 3],
        {"attention_window": [4, 8, 4, 8]},
    ),
    "of the encoder alone": (led, "led.encoder.layers", [1], {"attention_window": [4, 4, 8, 4, 8]}),
    "not of the decoder": (led, "led.decoder.layers", [1], {"attention_window": [4, 8, 4, 8, 4, 8]}),
    "a pattern that repeats": (
        gpt_neo,
        "transformer.h",
        [1],
        {"attention_layers": ["global", "global", "local", "global", "local"], "num_layers": 5},
    ),
    "indices": (qwen2_moe, "model.layers", [2], {"mlp_only_layers": [1, 2]}),
    "an index that goes": (qwen2_moe, "model.layers", [0, 3], {"mlp_only_layers": [0]}),
    "as many stages as blocks": (lambda: funnel([3, 3, 3]), "funnel.encoder.blocks.1", [2], {"block_sizes": [3, 2, 3]}),
}


@pytest.mark.parametrize("name", FOLLOW)
def test_an_entry_that_names_blocks_follows_and_stock_classes_reload_it(name, tmp_path):
    make, stack, gone, expected = FOLLOW[name]
    model, inputs = made(make), text()
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :8]
    skipped = without(model, stack, gone, inputs)
    remove_blocks(model, {stack: gone})
    config = model.config.to_dict()
    assert {key: config[key] for key in expected} == expected
    found = outputs(model, inputs)
    assert torch.allclose(found, skipped, atol=1e-5)
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs(again.eval(), inputs), found)


@needs_gemma4
def test_settings_by_index_follow(tmp_path):
    model = made(gemma4)
    before = model.config.to_dict()["per_layer_config"]
    assert list(before) == ["1", "3", "5"]
    state = copy.deepcopy(model.config.to_dict())
    remove_blocks(model, {"model.layers": [0, 3]})
    assert model.config.to_dict()["per_layer_config"] == {"0": {"head_dim": 16}, "3": {"head_dim": 16}}
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(again, text()), outputs(model, text()))
    assert made(gemma4).config.to_dict() == state


@pytest.mark.skipif(not hasattr(tf.PreTrainedConfig, "per_layer_config"), reason="came with later transformers")
def test_settings_that_skip_parts_of_a_layer_follow(tmp_path):
    """What a block that stays skips is said at its new place, and a stock class reads it."""
    skips = {2: {"skip": ["mlp"]}, 4: {"skip": ["attention"]}}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tf.LlamaConfig(vocab_size=100, num_hidden_layers=5, per_layer_config=skips, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    remove_blocks(model, {"model.layers": [0, 3]}, example={"input_ids": torch.arange(5, 15)[None]})
    assert model.config.to_dict()["per_layer_config"] == {"1": {"skip": ["mlp"]}, "2": {"skip": ["attention"]}}
    model.save_pretrained(tmp_path)
    again, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert [sorted(layer.skip) for layer in again.config.per_layer_config] == [[], ["mlp"], ["attention"]]
    inputs = {"input_ids": torch.arange(5, 15)[None]}
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_gpt_neo_says_its_pattern_anew(tmp_path):
    model = made(gpt_neo)
    remove_blocks(model, {"transformer.h": [1, 2]})
    assert model.config.attention_types == [[["global", "local", "global", "local"], 1]]
    assert [block.attn.attention_type for block in model.transformer.h] == ["global", "local"] * 2
    model.save_pretrained(tmp_path)
    assert tf.AutoConfig.from_pretrained(tmp_path).attention_layers == ["global", "local"] * 2
    remove_blocks(model, {"transformer.h": [0]})  # and once more, from the pattern that was written
    assert model.config.attention_types == [[["local", "global", "local"], 1]]


def test_a_load_by_record_follows_as_the_removal_did(tmp_path):
    model = made(gpt_neo)
    model.save_pretrained(tmp_path / "base")
    record = remove_blocks(model, {"transformer.h": [1]})
    loaded = load_pruned(tf.AutoModelForCausalLM, tmp_path / "base", record)
    assert loaded.config.attention_types == model.config.attention_types
    assert torch.equal(outputs(loaded, text()), outputs(model, text()))


@pytest.mark.parametrize(
    ("make", "stack"),
    [(gpt_neo, "transformer.h"), pytest.param(gemma4, "model.layers", marks=needs_gemma4), (qwen2_moe, "model.layers")],
)
def test_a_removal_that_is_taken_back_leaves_the_entries_as_they_were(make, stack):
    model = made(make)
    before, logits = copy.deepcopy(model.config.to_dict()), outputs(model, text())
    subject, undo = describe(model), Transaction()
    smaller = current_record(subject).compose(Layout.without(subject.lengths, {stack: [0, 3]}), {})
    follow_record(model, smaller, {}, undo)
    assert model.config.to_dict() != before
    undo.roll_back()
    assert model.config.to_dict() == before
    assert torch.equal(outputs(model, text()), logits)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([4, 4, 4], [4, 4, 4]), ([3, 4, 5], [3, 4, 5]), ([3, 3, 3], [3, 3, 3]), ([1, 2, 3], [1, 2, 3])],
)
def test_a_list_of_counts_is_no_list_of_values(sizes, expected):
    with torch.device("meta"):
        model = funnel(sizes)
    assert [len(stack) for stack in find_stacks(model).values()] == expected


def test_lists_of_sizes_of_a_chain_make_no_stack_of_its_layers():
    config = tf.Wav2Vec2Config(**{**TEXT, "vocab_size": 32, "num_hidden_layers": 7}, conv_dim=[32] * 7)
    with torch.device("meta"):
        stacks = find_stacks(tf.Wav2Vec2ForCTC(config))
    assert {name: (len(stack), stack.entries) for name, stack in stacks.items()} == {"wav2vec2.encoder.layers": (7, ())}


def test_a_refusal_names_what_else_changes_with_the_count():
    """A tensor with a part between each two layers, of which no family knows what it does; UnivNet's parts in parts."""

    class Between(tf.BertModel):
        def __init__(self, config: tf.BertConfig) -> None:
            super().__init__(config)
            self.between = nn.Parameter(torch.zeros(config.num_hidden_layers - 1, 2))

    with torch.device("meta"):
        unknown, univnet = Between(tf.BertConfig(**TEXT)), tf.UnivNetModel(tf.UnivNetConfig())
    with pytest.raises(UnsupportedModelError, match="num_hidden_layers counts them, but between changes with it"):
        find_stacks(unknown)
    assert find_stacks(univnet)["resblocks"].count is None
    with pytest.raises(SurgeryError, match=r"kernel_predictor_num_blocks counts them, but resblocks\.0\."):
        remove_blocks(univnet, {"resblocks": [1]}, verify=False, stock_only=True)


def test_windows_that_only_a_forward_pass_shows_need_an_example_that_shows_them():
    model = made(qwen_vl)
    stack = "model.visual.blocks"
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(
        SurgeryError, match=r"fullatt_block_indexes .* by number .*example=batch\. The model is as it was"
    ):
        remove_blocks(model, {stack: [1]}, example=image(8))
    assert model.config.to_dict() == before
    assert model.model.visual.fullatt_block_indexes == [2, 5]
    skipped = [without(model, stack, [1], image(side)) for side in (8, 16)]
    remove_blocks(model, {stack: [1]}, example=image(16))
    assert model.model.visual.fullatt_block_indexes == model.config.vision_config.fullatt_block_indexes == [1, 4]
    for side, expected in zip((8, 16), skipped, strict=True):
        assert torch.allclose(outputs(model, image(side)), expected, atol=1e-4)


def test_an_index_list_that_the_forward_pass_asks_follows_where_it_shows():
    model = made(dpt)
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    skipped = without(model, "dpt.encoder.layer", [2], pixels)
    remove_blocks(model, {"dpt.encoder.layer": [2]})
    assert model.config.backbone_out_indices == [0, 1, 2, 4]
    assert torch.allclose(outputs(model, pixels), skipped, atol=1e-5)
    with pytest.raises(SurgeryError, match="as it was before"):
        remove_blocks(model, {"dpt.encoder.layer": [1]})  # its output is taken
    assert model.config.backbone_out_indices == [0, 1, 2, 4]


class ScaledConfig(tf.PreTrainedConfig):
    """A config with one value per block that no block reads when it is built."""

    model_type = "scaled"

    def __init__(
        self, num_hidden_layers: int = 4, strengths: tuple[float, ...] = (1.0, 0.5, 2.0, 1.0), **kwargs: Any
    ) -> None:
        self.num_hidden_layers, self.strengths = num_hidden_layers, list(strengths)
        super().__init__(**kwargs)


class ScaledLayer(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor, strength: float) -> torch.Tensor:
        return hidden + strength * self.map(hidden)


class ScaledModel(tf.PreTrainedModel):
    config_class = ScaledConfig
    base_model_prefix = "model"
    main_input_name = "hidden"

    def __init__(self, config: ScaledConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(ScaledLayer() for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, self.config.strengths[index])
        return {"last_hidden_state": hidden}


def test_what_nothing_shows_is_named_and_stays():
    model = ScaledModel(ScaledConfig()).eval()
    (entry,) = find_stacks(model)["layers"].entries
    assert (str(entry), entry.form, entry.proof) == ("strengths", "values", "none")
    example = {"hidden": torch.randn(2, 3, 4)}
    with pytest.warns(DeepArcWarning, match=r"strengths may name blocks of layers.*stays as it is"):
        remove_blocks(model, {"layers": [3]}, example=example)  # nothing stands behind it
    assert model.config.strengths == [1.0, 0.5, 2.0, 1.0]
    model = ScaledModel(ScaledConfig()).eval()
    with pytest.raises(SurgeryError, match="does not compute"):
        remove_blocks(model, {"layers": [0]}, example=example)


def test_equal_values_and_values_that_nobody_asks_for_are_not_named():
    for strengths in ((1.0,) * 4, (1.0,) * 3):
        assert find_stacks(ScaledModel(ScaledConfig(strengths=strengths)))["layers"].entries == ()
    assert find_stacks(ScaledModel(ScaledConfig(heights=[1, 2, 4, 8], strengths=(1.0,) * 4)))["layers"].entries == ()


def test_a_model_without_such_entries_is_silent():
    model = made(reformer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stack = find_stacks(model)["reformer.encoder.layers"]
    assert [(str(entry), entry.proof) for entry in stack.entries] == [("attn_layers", "build")]
