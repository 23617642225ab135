"""A model from a GGUF file is dequantized: its copy carries no sign of quantization."""

from __future__ import annotations

import torch
import transformers as tf

from deeparc_hf import find_stacks
from experiment.models import load_model
from tests.zoo import ZOO


class FromGguf:
    """Stands for an Auto class: what transformers gives for a GGUF file,
    whose reader is no dependency of this project.
    """

    @staticmethod
    def from_pretrained(name, **settings):
        assert settings["gguf_file"] == "tiny.gguf" and settings["dtype"] == torch.float32
        model = ZOO["llama"].model()
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    from_config = staticmethod(tf.AutoModelForCausalLM.from_config)


def test_the_copy_can_be_pruned_and_saved(tmp_path):
    model = load_model(FromGguf, "folder", gguf_file="tiny.gguf")
    assert not hasattr(model.config, "quantization_config") or model.config.quantization_config is None
    assert len(find_stacks(model)["model.layers"]) == 4
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in ZOO["llama"].model().state_dict().items())
