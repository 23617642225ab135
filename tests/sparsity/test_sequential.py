"""Calibration block by block: models whose blocks hand on more than hidden states, memory, and what a failure leaves
behind.
"""

from __future__ import annotations

import copy
import gc
import itertools

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import sparsify_model
from deeparc_hf.errors import CalibrationError
from deeparc_hf.sparsity import sequential as block_by_block
from tests import sparsity_reference as reference
from tests.zoo import CAUSAL, TEXT, VOCAB, spread

from .test_sparsify import batches, made

WAYS = ("plain", "in place", "sum", "from the first", "chosen index", "module state")


class RelayConfig(tf.PreTrainedConfig):
    model_type = "relay"

    def __init__(self, num_hidden_layers=4, way="plain", **rest):
        self.num_hidden_layers, self.way = num_hidden_layers, way
        super().__init__(**rest)


class RelayLayer(nn.Module):
    """A residual block that hands on, or leaves behind, something else too."""

    def __init__(self, way, shared):
        super().__init__()
        self.up, self.down, self.way, self.shared = nn.Linear(16, 16), nn.Linear(16, 16), way, shared

    def forward(self, hidden, extra=None):
        inner = self.up(hidden).tanh()
        if self.way == "in place":
            return hidden.mul_(0.5).add_(self.down(inner)), None
        if self.way == "sum":
            extra = inner if extra is None else extra + inner
            inner = extra
        elif self.way == "from the first":  # as values that all blocks take over from the first one
            extra = self.down(hidden) if extra is None else extra
            inner = inner + extra
        elif self.way == "chosen index":  # as positions that one block selects for the others
            extra = self.up(nn.functional.normalize(hidden, dim=-1)).topk(4).indices if extra is None else extra
            inner = inner.scatter(-1, extra, 0.0)
        elif self.way == "module state":
            inner, self.shared["last"] = inner + self.shared.get("last", 0.0), inner
        return hidden + self.down(inner), extra


class Relay(tf.PreTrainedModel):
    config_class, main_input_name, base_model_prefix = RelayConfig, "pixel_values", "relay"

    def __init__(self, config):
        super().__init__(config)
        self.shared = {}
        self.layers = nn.ModuleList(RelayLayer(config.way, self.shared) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(16, 3)
        self.post_init()

    def forward(self, pixel_values, **rest):
        hidden, extra = pixel_values.clone(), None
        self.shared.clear()
        for layer in self.layers:
            hidden, extra = layer(hidden, extra)
        return self.head(hidden)


def relay(way):
    torch.manual_seed(0)
    return spread(Relay(RelayConfig(way=way))).eval(), [{"pixel_values": torch.randn(4, 6, 16)} for _ in range(3)]


@pytest.fixture
def trials(monkeypatch):
    """What the trials on one batch found: whether blocks can be run one by one."""
    found, own = [], block_by_block.independent

    def noted(*arguments):
        found.append(own(*arguments))
        return found[-1]

    monkeypatch.setattr(block_by_block, "independent", noted)
    return found


def expect_the_papers(model, data, **settings):
    expected = reference.sparsified(model, reference.masks(model, data, **settings))
    sparsify_model(model, data, progress=False, **settings)
    assert reference.differences(model.state_dict(), expected) == []


@pytest.mark.parametrize("way", WAYS)
def test_zeros_are_the_papers_whatever_blocks_hand_on(way):
    expect_the_papers(*relay(way))


@pytest.mark.parametrize("way", WAYS)
def test_blocks_that_hand_on_more_than_hidden_states_are_not_run_one_by_one(way, trials):
    model, data = relay(way)
    sparsify_model(model, data, progress=False)
    if way == "plain":
        assert trials == [True]
    elif way != "in place":  # either may do for that one
        assert trials == [False]


@pytest.mark.skipif(not hasattr(tf, "GlmMoeDsaForCausalLM"), reason="this transformers has no model with an indexer")
def test_positions_that_one_layer_selects_for_the_others_follow_its_zeros():
    low_rank = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    index = {
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 3,
        "indexer_types": ["full", "shared", "shared", "shared"],
    }
    dense = {"num_key_value_heads": 4, "first_k_dense_replace": 4, "mlp_layer_types": ["dense"] * 4}
    torch.manual_seed(0)
    model = spread(tf.GlmMoeDsaForCausalLM(tf.GlmMoeDsaConfig(**{**CAUSAL, **dense, **low_rank, **index}))).eval()
    expect_the_papers(model, [{"input_ids": torch.randint(5, VOCAB, (3, 10))} for _ in range(2)])


def test_blocks_that_put_out_no_tensor_of_hidden_states_are_run_within_the_model():
    # LiLT's put out pairs of them, of text and layout
    config = tf.LiltConfig(**{**TEXT, "hidden_size": 48, "num_hidden_layers": 2}, channel_shrink_ratio=2)
    torch.manual_seed(0)
    expect_the_papers(spread(tf.LiltForSequenceClassification(config)).eval(), batches("bert"))


@pytest.mark.parametrize(
    "name", ["bert", "deberta_v2", "gemma3", "t5", "bart", "gpt2", "timm_vit", "resnet", "timm_convnext"]
)
def test_blocks_run_one_by_one_and_within_the_model_get_the_same_zeros(name, trials, monkeypatch):
    model, other = made(name), made(name)
    sparsify_model(model, batches(name), progress=False)
    assert trials and all(trials)
    monkeypatch.setattr(block_by_block, "independent", lambda *arguments: False)
    sparsify_model(other, batches(name), progress=False)
    assert reference.differences(model.state_dict(), other.state_dict()) == []


def test_each_block_runs_at_most_three_times_a_batch_and_a_few_times_for_the_trial():
    model, data = made("llama"), [inputs for seed in range(4) for inputs in batches("llama", seed)]
    runs = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    sparsify_model(model, data, progress=False)
    # a trial of each block, and two passes and four runs to find out what its dimensions mean
    assert max(runs) <= 3 * len(data) + 3 + 6


def living(shape):
    """Number of tensors of a shape that have storage of their own."""
    found = (tensor for tensor in gc.get_objects() if type(tensor) is torch.Tensor and tensor.shape == shape)
    return len({tensor.data_ptr() for tensor in found})


@pytest.mark.parametrize(("sequential", "held"), [(True, 8), (False, 0)])
def test_no_more_than_one_blocks_inputs_are_alive(sequential, held):
    model, shape = made("llama"), (3, 11, 32)
    data = [
        {"input_ids": torch.randint(5, VOCAB, shape[:2]), "attention_mask": torch.ones(shape[:2], dtype=torch.long)}
        for _ in range(8)
    ]
    counted, calls = [], itertools.count(1)

    def count(module, args):
        if next(calls) % 5 == 0:  # walking over all objects takes time
            counted.append(living(shape))

    for layer in model.model.layers[1:]:
        layer.mlp.down_proj.register_forward_pre_hook(count)
    before = living(shape)
    sparsify_model(model, data, sequential=sequential, progress=False)
    assert before == 0 and living(shape) == 0
    # but for the inputs that are held: those of the layer that runs, and of the layers before it for the one batch of
    # the trial
    assert len(counted) >= 4 and max(counted[2:]) <= held + 6


class Interrupt:
    """Raises at the given batch."""

    def __init__(self, data, at, error):
        self.data, self.at, self.error = data, at, error

    def __iter__(self):
        for number, inputs in enumerate(self.data):
            if number == self.at:
                raise self.error
            yield inputs


def expect_nothing_happened(model, error, data, **settings):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    model.train()
    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        sparsify_model(model, data, progress=False, **settings)
    after = model.state_dict()
    assert [k for k in before if not torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8))] == []
    assert model.config.to_dict() == config and getattr(model.config, "pruning_config", None) is None
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()], ids=["OSError", "Ctrl-C"])
def test_data_that_fail_on_the_way_leave_no_trace(error, sequential):
    expect_nothing_happened(made("bert"), error, Interrupt(batches("bert"), 1, error), sequential=sequential)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["RuntimeError", "Ctrl-C"])
def test_a_failure_after_some_blocks_have_zeros_brings_every_weight_back(error):
    model = made("t5")
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.q.weight[0, :8] = -0.0  # to come back with its sign
    last, reached = model.decoder.block[-1].layer[-1].DenseReluDense.wo, []

    def fail(module, args):
        zeros = int((model.decoder.block[1].layer[0].SelfAttention.q.weight == 0).sum())
        if zeros:
            reached.append(zeros)
            raise error

    handle = last.register_forward_pre_hook(fail)
    expect_nothing_happened(
        model, KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else Exception, batches("t5")
    )
    handle.remove()
    assert reached


@pytest.mark.parametrize("sequential", [True, False])
def test_infinite_activations_in_a_later_block_bring_every_weight_back(sequential):
    model = made("bert")
    with torch.no_grad():
        model.bert.encoder.layer[2].intermediate.dense.bias[0] = torch.inf
    expect_nothing_happened(model, CalibrationError, batches("bert"), sequential=sequential)
