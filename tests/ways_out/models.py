"""Tiny pruned models for the tools that checkpoints are taken to, and how far apart two outputs are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from deeparc_hf import remove_blocks
from deeparc_hf.errors import DeepArcWarning
from deeparc_hf.publish.ways_out import WAYS_OUT
from tests.reloading import inputs_of, middle_blocks
from tests.zoo import CAUSAL, ZOO, Specimen, spread

VOCAB = 300  # 256 bytes, and some
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 6], "num_heads": [2, 4], "window_size": 2}
TEXT = {**CAUSAL, "vocab_size": VOCAB, "num_hidden_layers": 8, "head_dim": 8}
GEMMA = {**TEXT, "sliding_window": 4, "query_pre_attn_scalar": 8}
QWEN_SLIDING = {**TEXT, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}  # of Llama 3, which is no default


@dataclass(frozen=True)
class Causal:
    """A language model: the names of its classes, its settings, and the blocks that go."""

    model: str
    config: str
    settings: dict[str, Any]
    gone: list[int]

    def whole(self) -> nn.Module:
        """It before the removal."""
        config = getattr(tf, self.config)(**self.settings)
        return Specimen(lambda: getattr(tf, self.model)(config), "causal", "AutoModelForCausalLM").model()

    def pruned(self) -> nn.Module:
        """It without these blocks."""
        model = self.whole()
        remove_blocks(model, {"model.layers": self.gone})
        return model.eval()


# blocks go that do not come in turn: whatever counts layers by a period gives them other kinds than they have
CAUSAL_MODELS = {
    "gemma3_text": Causal("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, [1, 3]),
    "llama": Causal("LlamaForCausalLM", "LlamaConfig", {**TEXT, **THETA}, [2, 5]),
    "qwen3": Causal("Qwen3ForCausalLM", "Qwen3Config", TEXT, [1, 5]),
    "smollm3": Causal("SmolLM3ForCausalLM", "SmolLM3Config", TEXT, [1, 4]),
}
SLIDING = Causal("Qwen3ForCausalLM", "Qwen3Config", QWEN_SLIDING, [1, 5])
# and blocks that are whole turns
IN_TURN = {
    "gemma3_text": Causal("Gemma3ForCausalLM", "Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 12}, [*range(1, 7)]),
    "smollm3": Causal("SmolLM3ForCausalLM", "SmolLM3Config", TEXT, [*range(1, 5)]),
}


def swin() -> nn.Module:
    """A Swin without three blocks of a stage, which no config of transformers describes."""
    torch.manual_seed(0)
    model = spread(tf.SwinForImageClassification(tf.SwinConfig(**SWIN, num_labels=3))).eval()
    with pytest.warns(DeepArcWarning, match="can only be loaded where deeparc_hf is installed"):
        remove_blocks(model, {"swin.encoder.layers.1.blocks": [1, 2, 3]})
    return model.eval()


@functools.cache
def case(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A pruned model of a type, with inputs; of language models one pass, without a cache."""
    if name == "swin":
        return swin(), {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))}
    if name in ("sliding", *CAUSAL_MODELS):
        model = (SLIDING if name == "sliding" else CAUSAL_MODELS[name]).pruned()
        return without_cache(model), inputs_of(ZOO["llama"])
    specimen = ZOO[name]
    model = specimen.model()
    remove_blocks(model, middle_blocks(model))
    return without_cache(model.eval()), inputs_of(specimen)


def without_cache(model: nn.Module) -> nn.Module:
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def other_sizes(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fewer samples, and of texts longer ones."""
    other = {key: value[:3] for key, value in inputs.items()}
    if "attention_mask" in other:
        other["input_ids"] = torch.cat([other["input_ids"]] * 2, dim=1)
        other["attention_mask"] = torch.ones_like(other["input_ids"])
    return other


def logits_of(model: Callable[..., Any], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def difference(found: Tensor, expected: Tensor, inputs: dict[str, Tensor] | None = None) -> float:
    """The largest difference, as a share of the largest value; of texts at the positions that are no padding."""
    mask = (inputs or {}).get("attention_mask")
    if mask is not None and expected.ndim == 3 and expected.shape[:2] == mask.shape:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert found.shape == expected.shape and bool(found.isfinite().all())
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def typed(
    way: str, *, model_id: Any = "", auto_class: str = "", change: Callable[[str], str] = str, **names: Any
) -> dict[str, Any]:
    """What the lines that the page and the cards give for a way out leave behind, typed where these names are known."""
    lines = (
        change(WAYS_OUT[way].lines)
        .replace("{model}", str(model_id))
        .replace("FOLDER", str(model_id))
        .replace("{auto_class}", auto_class)
    )
    exec(compile(lines, way, "exec"), names)
    return names
