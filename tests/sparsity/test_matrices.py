"""Which linear maps of a model weight sparsity works on, and how they look as matrices."""

from __future__ import annotations

import re

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import find_stacks
from deeparc_hf.architectures import describe
from deeparc_hf.errors import UnsupportedModelError
from deeparc_hf.sparsity.matrices import find_matrices, is_sharded
from tests import sparsity_reference as reference
from tests.zoo import CAUSAL, SEQ2SEQ, T5, ZOO

from .test_sparsify import made


def found(model, targets=None):
    subject = describe(model)
    return find_matrices(subject, targets)


@pytest.mark.parametrize("name", ZOO)
def test_the_linear_maps_of_every_block_are_found_and_nothing_else(name):
    model = ZOO[name].make()
    matrices = found(model)
    assert {m.name: m.module for m in matrices} == {
        p: m for maps in reference.linear_maps(model).values() for p, m in maps.items()
    }
    for matrix in matrices:
        assert model.get_submodule(matrix.name) is matrix.module and matrix.weight is matrix.module.weight
        assert matrix.stack.blocks[matrix.block].get_submodule(matrix.role) is matrix.module
        assert f".{matrix.block}." in matrix.name
    assert {m.stack.name for m in matrices} == set(find_stacks(model))


@pytest.mark.parametrize("name", ["bert", "t5", "resnet_basic", "gpt2"])
def test_matrices_come_in_the_order_of_the_blocks(name):
    matrices = found(made(name))
    stacks = list(find_stacks(made(name)))
    places = [(stacks.index(m.stack.name), m.block) for m in matrices]
    assert places == sorted(places)


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet", "timm_convnext", "grouped"])
def test_rows_are_what_one_output_is_made_from_and_shaped_turns_them_back(name):
    for matrix in found(made(name)):
        rows = matrix.rows()
        assert rows.shape == reference.rows(matrix.module).shape and torch.equal(rows, reference.rows(matrix.module))
        assert rows.data_ptr() == matrix.weight.data_ptr() and not rows.requires_grad  # a view
        assert torch.equal(matrix.shaped(rows), matrix.weight) and matrix.shaped(rows).shape == matrix.weight.shape
        other = torch.arange(matrix.weight.numel()).view(matrix.weight.shape)
        assert torch.equal(matrix.shaped(matrix.rows(other)), other)


def test_groups_are_those_of_a_convolution():
    groups = {m.role: m.groups for m in found(made("grouped"))}
    assert groups["conv2"] == 4 and groups["conv1"] == 1
    assert {m.groups for m in found(made("bert"))} == {1}
    assert {m.role: m.groups for m in found(made("timm_convnext"))}["conv_dw"] > 1


def test_the_shortcuts_of_a_stage_belong_to_its_first_block():
    names = [m.name for m in found(made("resnet_basic"))]
    assert [n for n in names if "shortcut" in n] == [
        f"resnet.encoder.stages.{i}.layers.0.shortcut.convolution" for i in (1, 2, 3)
    ]


PATTERNS = [
    ("bert", ["*.query"], r"bert\.encoder\.layer\.\d\.attention\.self\.query", 4),
    ("bert", ["bert.encoder.layer.[01].*"], r".*\.layer\.[01]\..*", 12),
    ("bert", ["encoder.layer.3.output.dense", "*.key"], r".*(3\.output\.dense|key)", 5),
    ("t5", ["decoder.*.EncDecAttention.?"], r"decoder\..*EncDecAttention\..", 12),
    ("wrapped_vit", ["blocks.0.*"], r"timm_model\.blocks\.0\..*", 4),
    ("wrapped_vit", ["timm_model.blocks.0.*"], r"timm_model\.blocks\.0\..*", 4),
    ("timm_vit", ["blocks.0.*"], r"blocks\.0\..*", 4),
]


@pytest.mark.parametrize(("name", "targets", "expected", "count"), PATTERNS)
def test_targets_are_patterns_of_paths_with_or_without_the_prefix(name, targets, expected, count):
    names = [m.name for m in found(made(name), targets)]
    assert len(names) == count and all(re.fullmatch(expected, n) for n in names)


def test_a_pattern_that_matches_twice_gives_a_matrix_once():
    names = [m.name for m in found(made("bert"), ["*.query", "*.self.query", "*"])]
    assert len(names) == len(set(names)) == 24


MOE = {
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(**T5, num_experts=4, num_sparse_encoder_layers=2, num_sparse_decoder_layers=1)
    ),
    "nllb_moe": lambda: tf.NllbMoeForConditionalGeneration(
        tf.NllbMoeConfig(**SEQ2SEQ, num_experts=4, encoder_sparse_step=2, decoder_sparse_step=2)
    ),
}


@pytest.mark.parametrize("name", MOE)
def test_routers_are_left_alone(name):
    assert [m.name for m in found(MOE[name](), ["*"]) if "router" in m.name] == []


def test_router_tables_beside_fused_experts_are_left_alone():
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**CAUSAL, num_local_experts=4))
    assert {m.role.partition(".")[0] for m in found(model, ["*.self_attn.*"])} == {"self_attn"}
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts"):
        found(model, ["*.mlp.*"])


def test_tables_inside_blocks_are_left_alone():
    model = made("t5")
    assert isinstance(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias, nn.Embedding)
    assert not [m.name for m in found(model) if "relative_attention_bias" in m.name]
    assert all(isinstance(m.module, nn.Linear) for m in found(model))


def test_blocks_without_linear_maps_are_refused():
    model = made("bert")
    for layer in model.bert.encoder.layer:
        for path in [p for p, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            parent, _, attribute = path.rpartition(".")
            setattr(layer.get_submodule(parent), attribute, nn.Identity())
    with pytest.raises(
        UnsupportedModelError, match=r"The blocks of BertFor.* hold no linear maps \(Linear, Conv1D, Conv1d, Conv2d\)"
    ):
        found(model)


def test_a_module_that_two_paths_lead_to_is_not_taken_for_two_that_share_a_weight():
    model = made("bert")
    model.alias = model.bert.encoder.layer[0]
    assert len(found(model)) == 24


def test_plain_models_are_not_sharded():
    assert not is_sharded(made("bert")) and not is_sharded(nn.DataParallel(made("bert")))
