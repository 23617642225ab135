"""Pruned language models in MLX, on the CPU."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf.publish.ways_out import FAULTS, WAYS_OUT

from .models import CAUSAL_MODELS, IN_TURN, SLIDING, VOCAB, difference, logits_of, typed

mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
WITHIN = WAYS_OUT["MLX"].within
FAR = 0.1


def furthest(model: nn.Module, folder) -> float:
    """How far MLX is from transformers, which loads the same folder as it was."""
    mlx.set_default_device(mlx.cpu)
    model.save_pretrained(folder)
    ids = torch.randint(5, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids}
    loaded = typed("MLX", model_id=folder, inputs=inputs)["mlx_model"]
    found = torch.tensor(loaded(mlx.array(ids.numpy())).astype(mlx.float32).tolist())
    expected = logits_of(model, inputs)
    assert torch.equal(logits_of(tf.AutoModelForCausalLM.from_pretrained(folder), inputs), expected)
    return difference(found, expected)


def with_theta(model: nn.Module) -> nn.Module:
    model.config.rope_theta = model.config.rope_parameters["rope_theta"]
    return model


@pytest.mark.parametrize("name", WITHIN)
def test_a_pruned_model_runs_as_in_transformers(name, tmp_path):
    model = (IN_TURN if name == "gemma3_text" else CAUSAL_MODELS)[name].pruned()
    told = {fault.remedy for fault in FAULTS if fault.way == "MLX" and fault.model_type == name}
    if any("rope_theta" in remedy for remedy in told):
        model = with_theta(model)
    assert furthest(model, tmp_path) <= WITHIN[name]


@pytest.mark.parametrize("name", ["gemma3_text", "llama", "smollm3"])
def test_what_is_said_to_run_wrongly_does(name, tmp_path):
    """Once it runs rightly the page and the cards need no longer tell of it."""
    assert [fault for fault in FAULTS if fault.way == "MLX" and fault.model_type == name]
    assert furthest(CAUSAL_MODELS[name].pruned(), tmp_path) > FAR


def test_sliding_windows_of_qwen3_are_not_there(tmp_path):
    for kind, model in (("pruned", SLIDING.pruned()), ("whole", SLIDING.whole())):
        assert furthest(model, tmp_path / kind) > FAR
