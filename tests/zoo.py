"""Tiny models of every kind that is supported, with batches for them. Random weights, wide enough apart to tell blocks
apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import transformers as tf
from torch import nn

VOCAB = 120
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "d_ff": 48,
    "vocab_size": VOCAB,
    "decoder_start_token_id": 0,
}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
}
WHISPER = {
    **SEQ2SEQ,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


@dataclass(frozen=True)
class Specimen:
    """One kind of model.

    Attributes:
        make: builds it, with random weights.
        kind: "text", "causal", "seq2seq", "audio" or "image": which batches it takes, and whether it generates.
        auto: the Auto class that loads it; None for a bare timm model.
        last_norm: end of the names of the norms whose zeroing makes a block an identity (CNNs); None: zero all linear
            maps.
    """

    make: Callable[[], nn.Module]
    kind: str
    auto: str | None = None
    last_norm: str | None = None

    @property
    def generates(self) -> bool:
        return self.kind in ("causal", "seq2seq", "audio")

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return as_trained(spread(self.make())).eval()

    def batches(self, count: int = 6, size: int = 8, seed: int = 1) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [batch(self.kind, size, generator) for _ in range(count)]


def spread(model: nn.Module) -> nn.Module:
    """Enlarge the weights, so that each block changes its input a good deal (fresh models hardly do)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0.0, 1.5 / parameter[0].numel() ** 0.5)
            elif "gamma" in name or "lambda" in name or "layer_scale" in name:
                parameter.fill_(1.0)  # layer scale starts near zero
            elif name.endswith(("weight", "_scale")) and not parameter.any():
                parameter.fill_(1.0)  # timm starts the last norm of a residual branch at zero, Gemma 3n a scale
            elif not parameter.any() and "bias" not in name:  # position embeddings, gates
                parameter.normal_(0.0, 0.5) if parameter.ndim > 1 else parameter.fill_(0.5)
    return model


def as_trained(model: nn.Module) -> nn.Module:
    """Nudge a norm and the last bias: where a model has been trained they are not constant."""
    norms = [
        module.weight
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None
    ]
    biases = [
        parameter for name, parameter in model.named_parameters() if name.endswith("bias") and parameter.ndim == 1
    ]
    with torch.no_grad():
        for parameter in (*norms[-1:], *biases[-1:]):
            parameter[0] += 1e-6
    return model


def batch(kind: str, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if kind == "image":
        return {"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)}
    if kind == "audio":
        features = torch.randn(size, 8, 32, generator=generator)
        return {
            "input_features": features,
            "decoder_input_ids": torch.randint(5, VOCAB, (size, 6), generator=generator),
        }
    length = 10
    ids = torch.randint(5, VOCAB, (size, length), generator=generator)
    lengths = torch.randint(4, length + 1, (size, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    ids = torch.where(mask.bool(), ids, 0)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind == "seq2seq":
        inputs["labels"] = torch.randint(5, VOCAB, (size, 7), generator=generator)
    return inputs


def _timm(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


def _wrapped(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: tf.TimmWrapperForImageClassification(
        tf.TimmWrapperConfig(architecture=name, num_labels=5, model_args=kwargs)
    )


def _hf(cls: str, config: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: getattr(tf, cls)(getattr(tf, config)(**kwargs))


CLASSIFY, CAUSAL_LM, SEQ2SEQ_LM = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
PICTURE = "AutoModelForImageClassification"
TINY_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
TINY_RESNET = {"layers": [2, 3, 3, 2], "channels": (64, 24, 32, 48)}  # as wide as its stem at first, as resnet18
TINY_RESNEXT = {"layers": [2, 2, 3, 2], "channels": (24, 24, 32, 48)}
TINY_CONVNEXT = {"depths": [2, 2, 4, 2], "dims": [16, 24, 32, 48]}

ZOO: dict[str, Specimen] = {
    "bart": Specimen(_hf("BartForConditionalGeneration", "BartConfig", **SEQ2SEQ), "seq2seq", SEQ2SEQ_LM),
    "bert": Specimen(_hf("BertForSequenceClassification", "BertConfig", **TEXT), "text", CLASSIFY),
    "deberta_v2": Specimen(
        _hf(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            **TEXT,
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
        ),
        "text",
        CLASSIFY,
    ),
    "deit": Specimen(_hf("DeiTForImageClassification", "DeiTConfig", **IMAGE), "image", PICTURE),
    "dinov2": Specimen(_hf("Dinov2ForImageClassification", "Dinov2Config", **IMAGE), "image", PICTURE),
    "distilbert": Specimen(
        _hf(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            dim=32,
            n_layers=4,
            n_heads=4,
            hidden_dim=48,
            vocab_size=VOCAB,
        ),
        "text",
        CLASSIFY,
    ),
    "electra": Specimen(
        _hf("ElectraForSequenceClassification", "ElectraConfig", **TEXT, embedding_size=16), "text", CLASSIFY
    ),
    "gemma": Specimen(_hf("GemmaForCausalLM", "GemmaConfig", **CAUSAL, head_dim=8), "causal", CAUSAL_LM),
    "gemma3": Specimen(
        _hf(
            "Gemma3ForCausalLM", "Gemma3TextConfig", **{**CAUSAL, "num_hidden_layers": 7}, head_dim=8, sliding_window=4
        ),
        "causal",
        CAUSAL_LM,
    ),
    "gpt2": Specimen(
        _hf(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=32,
            n_layer=4,
            n_head=4,
            vocab_size=VOCAB,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "causal",
        CAUSAL_LM,
    ),
    "llama": Specimen(_hf("LlamaForCausalLM", "LlamaConfig", **CAUSAL), "causal", CAUSAL_LM),
    "longt5": Specimen(
        _hf("LongT5ForConditionalGeneration", "LongT5Config", **T5, local_radius=3), "seq2seq", SEQ2SEQ_LM
    ),
    "mistral": Specimen(_hf("MistralForCausalLM", "MistralConfig", **CAUSAL), "causal", CAUSAL_LM),
    "mpnet": Specimen(_hf("MPNetForSequenceClassification", "MPNetConfig", **TEXT), "text", CLASSIFY),
    "mt5": Specimen(_hf("MT5ForConditionalGeneration", "MT5Config", **T5), "seq2seq", SEQ2SEQ_LM),
    "qwen2": Specimen(_hf("Qwen2ForCausalLM", "Qwen2Config", **CAUSAL), "causal", CAUSAL_LM),
    "qwen3": Specimen(_hf("Qwen3ForCausalLM", "Qwen3Config", **CAUSAL, head_dim=8), "causal", CAUSAL_LM),
    "resnet": Specimen(
        _hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[16, 24, 32, 48],
            depths=[2, 3, 4, 2],
            num_labels=5,
        ),
        "image",
        PICTURE,
        "layer.2.normalization",
    ),
    "resnet_basic": Specimen(
        _hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=16,
            hidden_sizes=[16, 24, 32, 48],
            depths=[2, 3, 3, 2],
            layer_type="basic",
            num_labels=5,
        ),
        "image",
        PICTURE,
        "layer.1.normalization",
    ),
    "roberta": Specimen(_hf("RobertaForSequenceClassification", "RobertaConfig", **TEXT), "text", CLASSIFY),
    "t5": Specimen(_hf("T5ForConditionalGeneration", "T5Config", **T5), "seq2seq", SEQ2SEQ_LM),
    "timm_convnext": Specimen(_timm("convnext_atto", **TINY_CONVNEXT), "image"),
    "timm_deit": Specimen(_timm("deit_tiny_distilled_patch16_224", **TINY_VIT), "image"),
    "timm_resnet": Specimen(_timm("resnet18", **TINY_RESNET), "image", None, "bn2"),
    "timm_vit": Specimen(_timm("vit_tiny_patch16_224", **TINY_VIT), "image"),
    "vit": Specimen(_hf("ViTForImageClassification", "ViTConfig", **IMAGE), "image", PICTURE),
    "whisper": Specimen(
        _hf("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), "audio", "AutoModelForSpeechSeq2Seq"
    ),
    "wrapped_convnext": Specimen(_wrapped("convnext_atto", **TINY_CONVNEXT), "image", PICTURE),
    "wrapped_resnext": Specimen(_wrapped("resnext50_32x4d", **TINY_RESNEXT), "image", PICTURE, "bn3"),
    "wrapped_vit": Specimen(_wrapped("vit_tiny_patch16_224", **TINY_VIT), "image", PICTURE),
    "xlm": Specimen(
        _hf("XLMForSequenceClassification", "XLMConfig", emb_dim=32, n_layers=4, n_heads=4, vocab_size=VOCAB),
        "text",
        CLASSIFY,
    ),
}

VIT_STACK = (
    "vit.layers"
    if hasattr(tf.ViTModel(tf.ViTConfig(**{**IMAGE, "num_hidden_layers": 1})), "layers")
    else "vit.encoder.layer"
)
