"""Partial freezing on live models."""

from __future__ import annotations

import pytest
import torch

from deeparc_hf import analyze, apply_plan, find_stacks, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.pruning.freezing import freeze_blocks
from deeparc_hf.trainer.follow_checkpoint import Structure
from tests.zoo import ZOO


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_bert_trains_the_neighbours_and_the_head():
    model = ZOO["bert"].model()
    remove_blocks(model, {"bert.encoder.layer": [2]}, freeze="partial")  # kept 0 1 3; 1 and 3 are neighbours
    prefixes = ("bert.encoder.layer.1.", "bert.encoder.layer.2.", "bert.pooler.", "classifier.")
    assert trainable(model) == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def test_resnet_freezes_the_stem_and_crosses_stages():
    model = ZOO["resnet"].model()
    remove_blocks(model, {"resnet.encoder.stages.1.layers": [2]}, freeze="partial")  # the end of the stage
    blocks = {".".join(name.split(".")[:6]) for name in trainable(model) if "stages" in name}
    assert blocks == {"resnet.encoder.stages.1.layers.1", "resnet.encoder.stages.2.layers.0"}
    assert not any(name.startswith("resnet.embedder") for name in trainable(model))
    assert any(name.startswith("classifier") for name in trainable(model))


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_blocks_alone_are_frozen_where_it_is_said(name):
    model = ZOO[name].model()
    settings = {"num_blocks": sum(map(len, find_stacks(model).values())) - 1, "freeze": "partial"}
    plan = analyze(model, ZOO[name].batches(), progress=False, freeze_inputs=False, **settings)
    record = apply_plan(model, plan)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    blocks = {f"{stack}.{place}" for stack, places in record.frozen.items() for place in places}
    assert blocks and all(any(name.startswith(f"{block}.") for block in blocks) for name in frozen)
    goes_on = {
        "num_blocks": settings["num_blocks"] - 1,
        "freeze": "record",
    }  # a later pruning freezes no more than that
    apply_plan(model, analyze(model, ZOO[name].batches(), progress=False, **goes_on))
    assert {name for name, p in model.named_parameters() if not p.requires_grad and "embed" in name} == set()
    again = ZOO[name].model()  # a training that is resumed, or goes on from the record, freezes the same
    Structure(record, record.frozen).freeze(again)
    assert {name for name, p in again.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("name", sorted(ZOO))
def test_backward_stops_below_the_lowest_trainable_block(name):
    specimen = ZOO[name]
    model = specimen.model().train()
    stacks = find_stacks(model)
    first, last = next(iter(stacks)), list(stacks)[-1]
    frozen = {n: list(range(len(s))) for n, s in stacks.items()}
    frozen[last] = frozen[last][:-1]
    freeze_blocks(describe(model), frozen)
    seen = []
    for index in (0, 1):
        stacks[first].blocks[index].register_forward_hook(
            lambda m, a, o: seen.append((o if isinstance(o, torch.Tensor) else o[0]).requires_grad)
        )
    batch = specimen.batches(1)[0]
    output = model(**batch) if hasattr(model, "config") else model(batch["pixel_values"])
    tensors = [output] if isinstance(output, torch.Tensor) else [output.logits]
    tensors[0] = tensors[0][0] if isinstance(tensors[0], tuple) else tensors[0]
    assert seen == [False, False]
    tensors[0].float().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, parameter_name
    assert any(p.grad is not None for p in stacks[last].blocks[-1].parameters())


def test_statistics_of_frozen_batch_norms_stay_put_in_training():
    specimen = ZOO["resnet"]
    model = specimen.model()
    remove_blocks(model, {"resnet.encoder.stages.2.layers": [2]}, freeze="partial")
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for batch in specimen.batches(3):
        model.train()
        model(**batch).logits.sum().backward()
    for name, buffer in model.named_buffers():
        owner = model.get_submodule(name.rpartition(".")[0])
        assert torch.equal(buffer, before[name]) == (not owner.weight.requires_grad), name
    assert any(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_unfreezing_a_batch_norm_lets_its_statistics_move_again():
    specimen = ZOO["resnet"]
    model = specimen.model()
    remove_blocks(model, {"resnet.encoder.stages.2.layers": [2]}, freeze="partial")
    model.requires_grad_(True).train()
    norm = model.resnet.embedder.embedder.normalization
    before = norm.running_mean.clone()
    model(**specimen.batches(1)[0])
    assert not torch.equal(norm.running_mean, before)


def test_each_side_of_an_encoder_decoder_has_its_own_lowest_trained_block():
    model = ZOO["bart"].model()
    # the decoder's last: only block 1 is beside it
    remove_blocks(model, {"model.decoder.layers": [2]}, freeze="partial")
    parts = {".".join(name.split(".")[:4]) for name in trainable(model)}
    assert parts == {"model.decoder.layers.1"}


def test_freezing_twice_adds_nothing():
    model = ZOO["resnet"].model()
    stacks = find_stacks(model)
    frozen = {name: [0] for name in stacks}
    assert freeze_blocks(describe(model), frozen)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    assert freeze_blocks(describe(model), frozen) == []
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks > 0


def test_a_norm_that_the_user_froze_keeps_its_behaviour():
    specimen = ZOO["resnet"]
    model = specimen.model()
    norm = model.resnet.embedder.embedder.normalization
    norm.requires_grad_(False)
    remove_blocks(model, {"resnet.encoder.stages.2.layers": [2]}, freeze="partial")
    before = norm.running_mean.clone()
    model.train()(**specimen.batches(1)[0])
    assert not torch.equal(norm.running_mean, before)
