"""Merging LoRA adapters into a sparse model keeps its zeros."""

from __future__ import annotations

import pytest
import torch

from deeparc_hf import PrunedConfig, WandaCallback, sparsify_model
from deeparc_hf.errors import SparsityError, UnsupportedModelError
from deeparc_hf.sparsity.adapters import merge_keeping_zeros
from tests.trainers import train
from tests.zoo import ZOO

peft = pytest.importorskip("peft")


def adapted(name="bert", sparse=True, **lora):
    model = ZOO[name].model()
    if sparse:
        sparsify_model(model, ZOO[name].batches(2), progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    return peft.get_peft_model(
        model, peft.LoraConfig(**{"target_modules": ["query", "dense"], "r": 4, "init_lora_weights": False, **lora})
    ), before


@pytest.mark.parametrize("dora", [False, True])
def test_zeros_stay_and_the_rest_is_what_a_plain_merge_gives(dora):
    model, before = adapted(use_dora=dora)
    plain = (
        {key: value.clone() for key, value in adapted(use_dora=dora)[0].merge_and_unload().state_dict().items()}
        if not dora
        else None
    )
    merged = merge_keeping_zeros(model)
    record = PrunedConfig.from_model(merged)
    assert len(record.sparsity["matrices"]) == 24
    changed = 0
    for name, entry in record.sparsity["matrices"].items():
        weight, old = merged.get_submodule(name).weight, before[f"{name}.weight"]
        assert torch.equal(weight == 0, old == 0) and int((weight == 0).sum()) == entry["zeros"]
        changed += not torch.equal(weight, old)
        if plain is not None and ("query" in name or "dense" in name):
            assert plain[f"{name}.weight"].shape == weight.shape
    assert changed == 16


def test_after_training_the_adapters(tmp_path):
    model, before = adapted(init_lora_weights=True, task_type="SEQ_CLS")
    train(model, tmp_path, learning_rate=1e-2)
    merged = merge_keeping_zeros(model)
    name = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(merged.get_submodule(name).weight == 0, before[f"{name}.weight"] == 0)
    assert not torch.equal(merged.get_submodule(name).weight, before[f"{name}.weight"])
    train(merged.requires_grad_(True), tmp_path / "on", WandaCallback())


def test_gpt2_whose_matrices_are_stored_the_other_way(tmp_path):
    model, before = adapted("gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    merged = merge_keeping_zeros(model)
    name = "transformer.h.1.attn.c_attn"
    assert torch.equal(merged.get_submodule(name).weight == 0, before[f"{name}.weight"] == 0)
    assert not torch.equal(merged.get_submodule(name).weight, before[f"{name}.weight"])


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(UnsupportedModelError, match="not a PEFT model"):
        merge_keeping_zeros(ZOO["bert"].model())
    with pytest.raises(SparsityError, match="lists no zeros"):
        merge_keeping_zeros(adapted(sparse=False)[0])
    model, _ = adapted()
    model.merge_adapter()
    with pytest.raises(SparsityError, match="unmerge_adapter"):
        merge_keeping_zeros(model)
