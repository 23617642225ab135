"""sparsify_model zeroes just what the paper says, by a reference that shares no code with it."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
import transformers as tf

from deeparc_hf import sparsify_model
from tests import sparsity_reference as reference
from tests.zoo import IMAGE, TEXT, VOCAB, ZOO, spread

SETTINGS = [{"sparsity": s} for s in (0.1, 0.2, 0.3, 0.4, 0.5)] + [{"pattern": p} for p in ("2:4", "4:8")]
FAMILIES = ("bert", "t5", "bart", "llama", "gpt2", "vit", "resnet_basic", "timm_vit", "grouped")


@functools.cache
def _made(name):
    if name != "grouped":
        return ZOO[name].model()
    torch.manual_seed(0)
    arguments = {"layers": [1, 2, 1, 1], "cardinality": 4, "base_width": 8}
    config = tf.TimmWrapperConfig(architecture="resnext50_32x4d", num_labels=5, model_args=arguments)
    return spread(tf.TimmWrapperForImageClassification(config)).eval()


def made(name):
    return copy.deepcopy(_made(name))


def batches(name, seed=3):
    """Batches of 5 and 2 samples; texts are padded right and left, and encoder and decoder are equally long."""
    generator = torch.Generator().manual_seed(seed)
    kind = ZOO[name].kind if name in ZOO else "image"
    if kind == "image":
        return [{"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)} for size in (5, 2)]
    result = []
    for size, length, left in ((5, 9, False), (2, 6, True)):
        ids = torch.randint(5, VOCAB, (size, length), generator=generator)
        places = torch.arange(length).flip(0) if left else torch.arange(length)
        mask = (places < torch.randint(3, length, (size, 1), generator=generator)).long()
        inputs = {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}
        if kind == "seq2seq":
            labels = torch.randint(5, VOCAB, (size, length), generator=generator)
            labels[torch.arange(length) >= torch.randint(2, length, (size, 1), generator=generator)] = -100
            inputs["labels"] = labels
        result.append(inputs)
    return result


def check(model, data, *, wanted=None, targets=None, **settings):
    """Sparsify the model, and compare the whole of it with the reference."""
    chosen = reference.masks(model, data, wanted=wanted or (lambda path: True), **settings)
    expected = reference.sparsified(model, chosen)
    report = sparsify_model(
        model, None if settings.get("method") == "magnitude" else data, progress=False, targets=targets, **settings
    )
    assert reference.differences(model.state_dict(), expected) == []
    assert {name: m.asked for name, m in report.matrices.items()} == {
        name: int(mask.sum()) for name, mask in chosen.items()
    }
    return report


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: str(next(iter(s.values()))))
@pytest.mark.parametrize("name", FAMILIES)
def test_wanda_is_the_papers(name, settings, sequential):
    check(made(name), batches(name), sequential=sequential, **settings)


@pytest.mark.parametrize("settings", [{"sparsity": 0.3}, {"pattern": "2:4"}], ids=["0.3", "2:4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_magnitude_needs_no_data(name, settings):
    assert check(made(name), batches(name), method="magnitude", **settings).samples == 0


@pytest.mark.parametrize("name", ["resnet", "timm_convnext"])
def test_depthwise_and_bottleneck_convolutions_are_the_papers_in_one_pass(name):
    check(made(name), batches(name), sequential=False, sparsity=0.3)


def test_patterns_hold_where_targets_leave_out_what_does_not_divide():
    def wanted(path):
        return ".mlp." in path

    check(made("wrapped_convnext"), batches("wrapped_convnext"), pattern="4:8", targets=["*.mlp.*"], wanted=wanted)


def test_of_equal_scores_the_earlier_go():
    model = made("bert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embeddings.weight"):
                parameter[:, 8:16] = parameter[:, :8]  # equal columns of inputs in the first block
            elif parameter.ndim == 2:
                parameter.copy_(parameter.round(decimals=1))
    first = model.bert.encoder.layer[0].attention.self.query.weight
    with torch.no_grad():
        first[:, 8:16] = -first[:, :8]
    check(copy.deepcopy(model), batches("bert"), sparsity=0.3)
    check(copy.deepcopy(model), batches("bert"), pattern="4:8", sequential=False)
    check(model, [], method="magnitude", sparsity=0.3)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_decoders_mask_counts_where_it_is_given(name):
    data = batches(name)
    for inputs in data:
        labels = inputs.pop("labels")
        inputs["decoder_input_ids"] = labels.clamp(min=0)
        inputs["decoder_attention_mask"] = (labels != -100).long()
    check(made(name), data, sparsity=0.4)


def test_a_decoder_without_labels_or_mask_counts_every_position():
    data = [{**inputs, "decoder_input_ids": inputs.pop("labels").clamp(min=0)} for inputs in batches("bart")]
    check(made("bart"), data, sparsity=0.4)


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_a_decoder_that_a_composite_model_adds_cross_attention_to_is_the_papers(decoder):
    own = {"is_decoder": True, "add_cross_attention": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    small = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB}
    settings = tf.BertConfig(**TEXT, **own) if decoder == "bert" else tf.GPT2Config(**small, **own)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.BertConfig(**TEXT), settings)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    check(spread(tf.EncoderDecoderModel(config)).eval(), batches("t5"))


@pytest.mark.parametrize("length", [10, 17])
def test_the_padding_of_a_text_says_nothing_of_the_patches_of_an_image(length):
    text, vision = ({**sizes, "num_hidden_layers": 2} for sizes in (TEXT, IMAGE))
    torch.manual_seed(0)
    model = tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**text, "eos_token_id": 2, "pad_token_id": 0}, vision_config=vision, projection_dim=16
        )
    )
    mask = (torch.arange(length) < torch.randint(3, length, (4, 1))).long()  # 17 is the number of patches
    data = {
        "input_ids": torch.randint(5, VOCAB, (4, length)),
        "attention_mask": mask,
        "pixel_values": torch.randn(4, 3, 32, 32),
    }
    check(spread(model).eval(), [data])


@pytest.mark.parametrize(
    "setting",
    [{"return_dict": False}, {"output_hidden_states": True}, {"use_cache": True}],
    ids=lambda s: next(iter(s)),
)
def test_what_the_config_has_the_model_put_out_makes_no_difference(setting):
    model = made("bert")
    for key, value in setting.items():
        setattr(model.config, key, value)
    check(model, batches("bert"))


def test_gradient_checkpointing_makes_no_difference():
    model = made("llama")
    expected = reference.sparsified(model, reference.masks(model, batches("llama")))
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    sparsify_model(model.train(), batches("llama"), progress=False)
    assert reference.differences(model.state_dict(), expected) == []
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_tuples_and_wrapped_models_are_taken_too():
    (first, _), model = batches("bert"), made("bert")
    expected = reference.sparsified(model, reference.masks(model, [first]))
    wrapped = torch.nn.DataParallel(model)
    report = sparsify_model(wrapped, [(first["input_ids"], first["attention_mask"], torch.zeros(5))], progress=False)
    assert reference.differences(model.state_dict(), expected) == []
    assert "bert.encoder.layer.0.attention.self.query" in report.matrices


def test_padding_makes_no_difference():
    data = batches("bert")
    longer = [{key: torch.nn.functional.pad(value, (0, 4)) for key, value in inputs.items()} for inputs in data]
    loud = made("bert")
    with torch.no_grad():
        loud.bert.embeddings.word_embeddings.weight[0] = 50.0  # what stands at padding would be heard
    chosen, other = (reference.masks(loud, given, sparsity=0.3) for given in (data, longer))
    assert all(torch.equal(chosen[path], other[path]) for path in chosen)
    check(loud, longer, sparsity=0.3)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_types_are_the_papers(dtype, sequential):
    check(made("llama").to(dtype), batches("llama"), sequential=sequential)
    assert made("llama").dtype == torch.float32


@pytest.mark.parametrize("sequential", [True, False])
def test_the_last_batch_is_cut_and_no_further_one_is_asked_for(sequential):
    data, asked = ZOO["bert"].batches(3, 4), []

    def loader():
        for number, inputs in enumerate(data):
            asked.append(number)
            yield inputs

    used = [data[0], {key: value[:2] for key, value in data[1].items()}]
    model = made("bert")
    expected = reference.sparsified(model, reference.masks(model, used, sequential=sequential))
    report = sparsify_model(model, loader(), calibration_samples=6, sequential=sequential, progress=False)
    assert reference.differences(model.state_dict(), expected) == []
    assert report.samples == 6 and asked == [0, 1]


@pytest.mark.parametrize(
    ("name", "targets", "wanted"),
    [
        ("bert", ["*.query", "*.layer.3.output.dense"], lambda path: path.endswith(("query", "layer.3.output.dense"))),
        ("bert", ["encoder.layer.2.*"], lambda path: ".layer.2." in path),  # without the prefix of the headless model
        ("bart", ["model.decoder.layers.1.encoder_attn.*"], lambda path: ".decoder.layers.1.encoder_attn." in path),
        ("timm_vit", "*.attn.*", lambda path: ".attn." in path),
    ],
)
def test_targets_are_all_that_is_zeroed(name, targets, wanted):
    report = check(made(name), batches(name), targets=targets, wanted=wanted)
    assert report.matrices and all(map(wanted, report.matrices))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_lies_outside_the_blocks_and_what_is_no_linear_map_stays_bit_for_bit(name):
    model = made(name)
    inside = {f"{path}.weight" for maps in reference.linear_maps(model).values() for path in maps}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sparsify_model(model, batches(name), progress=False)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == inside


@pytest.mark.parametrize("sequential", [True, False])
def test_the_model_is_left_as_it_was_but_for_the_zeros(sequential):
    model = ZOO["bert"].make().train()
    model.bert.pooler.eval()
    model.bert.embeddings.requires_grad_(False)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes, grads = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    identities = [id(p) for p in model.parameters()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

    def loader():
        for inputs in batches("bert"):
            torch.rand(1), np.random.rand(), random.random()
            yield inputs

    sparsify_model(model, loader(), sequential=sequential, progress=False)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads and all(p.grad is None for p in model.parameters())
    assert [id(p) for p in model.parameters()] == identities
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_dropout_is_off_while_inputs_are_measured():
    model = ZOO["bert"].model()
    expected = reference.sparsified(model, reference.masks(model, batches("bert")))
    sparsify_model(model.train(), batches("bert"), progress=False)
    assert reference.differences(model.state_dict(), expected) == []


def test_a_batch_that_is_overwritten_by_the_next_one_counts_as_it_was():
    data = ZOO["bert"].batches(3, 4)

    def loader():
        buffer = {key: value.clone() for key, value in data[0].items()}
        for inputs in data:
            for key, value in inputs.items():
                buffer[key].copy_(value)
            yield buffer

    model = made("bert")
    expected = reference.sparsified(model, reference.masks(model, data))
    sparsify_model(model, loader(), progress=False)
    assert reference.differences(model.state_dict(), expected) == []


def test_sparsity_zero_zeroes_nothing():
    report = check(made("bert"), batches("bert"), sparsity=0.0)
    assert report.asked == report.measured == 0
