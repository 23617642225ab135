"""The comparison of skeletons, and their build: shared modules, lists that blocks hold whole, parts with an attention
of their own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deeparc_hf import find_stacks, remove_blocks
from deeparc_hf.architectures import Layout
from deeparc_hf.architectures.skeleton import compare
from tests.zoo import spread

DETR = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [16, 24],
    "depths": [2, 2],
    "layer_type": "basic",
    "out_features": ["stage2"],
}


class SharingConfig(tf.PreTrainedConfig):
    model_type = "sharing"

    def __init__(self, num_hidden_layers: int = 4, **kwargs: Any) -> None:
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class Angles(nn.Module):
    """Without weights, and one for all blocks."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.arange(number), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.steps.to(hidden.dtype).cos()


class SharingLayer(GradientCheckpointingLayer):
    def __init__(self, angles: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.map, self.angles, self.act = nn.Linear(4, 4), angles, act

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.act(self.map(self.angles(hidden)))


class SharingModel(tf.PreTrainedModel):
    config_class = SharingConfig
    base_model_prefix = "model"
    main_input_name = "hidden"

    def __init__(self, config: SharingConfig) -> None:
        super().__init__(config)
        angles, act = Angles(4), nn.Tanh()
        self.angles = angles
        self.layers = nn.ModuleList(SharingLayer(angles, act) for _ in range(config.num_hidden_layers))
        self.post_init()

    def forward(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            hidden = layer(hidden)
        return {"last_hidden_state": hidden}


class Aliased(SharingModel):
    """Its list has a second name."""

    def __init__(self, config: SharingConfig) -> None:
        super().__init__(config)
        self.alias = self.layers


class Tied(SharingModel):
    """All blocks share a map."""

    def __init__(self, config: SharingConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.map = self.layers[0].map


@pytest.mark.parametrize("gone", [[0], [1], [3], [0, 2]])
def test_a_module_without_weights_that_all_blocks_share_is_no_obstacle(gone):
    torch.manual_seed(0)
    model = SharingModel(SharingConfig()).eval()
    hidden = torch.randn(2, 3, 4)
    whole = copy.deepcopy(model)
    for index in gone:
        whole.layers[index].forward = lambda hidden: hidden
    expected = whole(hidden)["last_hidden_state"]
    remove_blocks(model, {"layers": gone}, example={"hidden": hidden})
    assert torch.equal(model(hidden)["last_hidden_state"], expected)
    assert all(layer.angles is model.angles for layer in model.layers)


def test_a_second_name_of_a_stack_is_not_compared():
    with torch.device("meta"):
        before, after = Aliased(SharingConfig()), Aliased(SharingConfig(num_hidden_layers=3))
    assert compare(before, after, Layout({"layers": 4}, {"layers": (0, 2, 3)})).problems == []


def test_a_list_that_a_build_of_other_settings_lacks_is_a_problem():
    def build(inner: int) -> nn.Module:
        root = nn.Module()
        root.outer = nn.ModuleList([nn.Module() for _ in range(inner)])
        for member in root.outer:
            member.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        return root

    layout = Layout.whole({"outer.0.blocks": 2})
    found = compare(build(1), build(0), layout)
    assert any("a reload would lack outer.0" in problem for problem in found.problems)


def test_parameters_that_kept_blocks_share_are_not_counted_as_removed():
    model = Tied(SharingConfig()).eval()
    record = remove_blocks(model, {"layers": [0]}, example={"hidden": torch.randn(2, 3, 4)})
    assert record.iterations[0]["parameters"] == {"before": 20, "after": 20}


@pytest.mark.parametrize(("after", "follows"), [([5, 7, 8], True), ([5, 6, 7], False), ([5, 7], False)])
def test_a_list_of_all_blocks_within_a_block_follows_if_it_lost_their_values(after, follows):
    def skeleton(values: list[int], length: int) -> nn.Module:
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(length))
        for layer in model.layers:
            layer.values = values
        return model

    found = compare(skeleton([5, 6, 7, 8], 4), skeleton(after, 3), Layout({"layers": 4}, {"layers": (0, 2, 3)}))
    assert (found.problems == []) is follows
    assert [update[2] for update in found.updates] == ([after] * 3 if follows else [])


def detr() -> nn.Module:
    backbone = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    return tf.DetrForObjectDetection(tf.DetrConfig(**DETR, **backbone, backbone_config=tf.ResNetConfig(**RESNET)))


def test_each_part_keeps_the_attention_that_it_has(tmp_path):
    torch.manual_seed(0)
    model = spread(detr()).eval()
    assert model.config._attn_implementation != model.config.backbone_config._attn_implementation
    pixels = torch.randn(1, 3, 64, 64)
    remove_blocks(model, {"model.encoder.layers": [1], "model.decoder.layers": [0]})
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(pixels).logits, copy.deepcopy(model)(pixels).logits, atol=1e-5)


def test_a_model_that_knows_no_fast_attention_is_found():
    config = tf.TrOCRConfig(d_model=32, decoder_layers=4, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=120)
    with torch.device("meta"):
        assert [len(stack) for stack in find_stacks(tf.TrOCRForCausalLM(config)).values()] == [4]


class Ends(nn.Module):
    """Notes its first and last block in a set; only the last block has a norm behind it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.ends = {0, number - 1}
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Identity()) for _ in range(number))
        self.layers[-1][1] = nn.LayerNorm(2)


def test_what_a_set_notes_of_blocks_follows():
    found = compare(Ends(4), Ends(3), Layout.without({"layers": 4}, {"layers": [1]}))
    assert not found.problems
    assert found.updates == [("", "ends", {0, 2})]


def test_a_module_that_a_reload_would_build_where_a_block_has_none_is_a_problem():
    """FunASR's last block has a norm that the one before it has not."""
    found = compare(Ends(4), Ends(3), Layout.without({"layers": 4}, {"layers": [3]}))
    assert found.problems == ["layers.2.1 does nothing, but a reload would build a LayerNorm there"]
