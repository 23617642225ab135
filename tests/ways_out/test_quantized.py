"""Pruned checkpoints that are quantized while they are loaded: as if the whole model had been, and pruned then."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from deeparc_hf import remove_blocks
from deeparc_hf.publish.ways_out import WAYS_OUT
from tests.zoo import CAUSAL, TEXT, ZOO, spread

from .models import logits_of, typed

# bitsandbytes packs 64 values at a time, and in 4 bits wants 32 outputs or more on some processors
WIDE = {"hidden_size": 64, "intermediate_size": 128}
MODELS = {
    "bert": (tf.BertForSequenceClassification, tf.BertConfig, {**TEXT, **WIDE, "num_labels": 32}, "bert.encoder.layer"),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, {**CAUSAL, **WIDE}, "model.layers"),
}
AUTO = {"bert": "AutoModelForSequenceClassification", "llama": "AutoModelForCausalLM"}


def folders(name, tmp_path):
    """The whole model and the pruned one, saved, with inputs."""
    torch.manual_seed(0)
    cls, config, settings, stack = MODELS[name]
    model = spread(cls(config(**settings))).eval()
    model.save_pretrained(tmp_path / "whole")
    remove_blocks(model, {stack: [1]})
    model.save_pretrained(tmp_path / "pruned")
    return ZOO[name].batches(1)[0]


def assert_alike(way, name, tmp_path, change=str):
    inputs = folders(name, tmp_path)
    auto = getattr(tf, AUTO[name])
    packed = {
        kind: typed(way, model_id=tmp_path / kind, auto_class=AUTO[name], change=change)["packed"].eval()
        for kind in ("whole", "pruned")
    }
    remove_blocks(packed["whole"], {MODELS[name][3]: [1]}, verify=False)
    found, expected = (logits_of(packed[kind], inputs) for kind in ("pruned", "whole"))
    assert torch.equal(found, expected)
    exact = logits_of(auto.from_pretrained(tmp_path / "pruned"), inputs)
    alike = torch.corrcoef(torch.stack([found.float().flatten(), exact.flatten()]))[0, 1]
    assert 0.8 < float(alike) < 1 and not torch.equal(found.float(), exact)  # it is quantized, and no noise


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", WAYS_OUT["torchao"].within)
def test_torchao(name, tmp_path):
    pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    assert_alike("torchao", name, tmp_path)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", WAYS_OUT["bitsandbytes"].within)
def test_bitsandbytes(name, bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert_alike("bitsandbytes", name, tmp_path, lambda lines: lines.replace("load_in_8bit=", f"load_in_{bits}bit="))
