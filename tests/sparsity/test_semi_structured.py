"""2:4 sparsity as torch's semi-structured tensors, where a device can."""

from __future__ import annotations

import pytest
import torch

from deeparc_hf import sparsify_model
from deeparc_hf.errors import UnsupportedModelError
from deeparc_hf.sparsity.semi_structured import has_pattern, to_semi_structured
from tests.zoo import CAUSAL, ZOO

CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
REASON = "needs a CUDA device of compute capability 8.0 or higher"


def test_the_pattern_is_found_where_it_is():
    model = ZOO["bert"].model()
    sparsify_model(model, ZOO["bert"].batches(2), pattern="2:4", progress=False)
    for block in model.bert.encoder.layer:
        assert has_pattern(block.output.dense.weight) and not has_pattern(block.output.dense.weight[:, 1:])
    assert not has_pattern(model.classifier.weight)
    unstructured = ZOO["bert"].model()
    sparsify_model(unstructured, method="magnitude", progress=False)
    assert not has_pattern(unstructured.bert.encoder.layer[0].output.dense.weight)


@pytest.mark.skipif(CAPABLE, reason="the device can")
def test_without_such_a_device_it_is_refused_and_nothing_changes():
    model = ZOO["llama"].model()
    sparsify_model(model, method="magnitude", pattern="2:4", progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match=r"compute capability 8\.0 or higher, found cpu"):
        to_semi_structured(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def large():
    """A Llama whose matrices are large enough for torch's kernels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**{**CAUSAL, **sizes})).eval()


@pytest.mark.skipif(not CAPABLE, reason=REASON)
def test_outputs_are_those_of_the_dense_zeros():
    model = large().to("cuda", torch.float16)
    batch = {key: value.cuda() for key, value in ZOO["llama"].batches(1)[0].items()}
    sparsify_model(model, [batch], pattern="2:4", progress=False)
    with torch.no_grad():
        dense = model(**batch).logits
        assert to_semi_structured(model) == {}
        sparse = model(**batch).logits
    assert torch.allclose(dense, sparse, atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(not CAPABLE, reason=REASON)
def test_a_model_without_the_pattern_is_refused():
    with pytest.raises(UnsupportedModelError, match="do not follow the 2:4 pattern"):
        to_semi_structured(large().to("cuda", torch.float16))
