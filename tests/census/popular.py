"""A hundred types that are downloaded much, of all kinds, for the quick part of the census."""

from __future__ import annotations

__all__ = ["POPULAR"]

_TEXT = """bert roberta distilbert deberta deberta-v2 electra xlm-roberta mpnet camembert modernbert big_bird
 longformer funnel nomic_bert esm layoutlm layoutlmv3 lilt xlnet ernie rembert roformer canine"""
_CAUSAL = """gpt2 gpt_neo gpt_neox gptj opt bloom falcon llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma
 gemma2 gemma3_text phi phi3 olmo2 granite cohere deepseek_v3 mamba mamba2 jamba bamba starcoder2 stablelm smollm3
 glm4 gpt_oss nemotron_h xglm"""
_BOTH = "t5 umt5 mt5 bart mbart pegasus marian led m2m_100 whisper speech_to_text"
_VISION = """vit deit beit dinov2 dinov3_vit convnext convnextv2 resnet regnet bit swin swinv2 segformer mobilevit
 efficientnet mobilenet_v2 yolos detr rt_detr depth_anything hiera vit_mae"""
_SOUND = "wav2vec2 hubert wavlm audio-spectrogram-transformer"
_MANY = "clip siglip blip llava qwen2_vl paligemma"

POPULAR = " ".join((_TEXT, _CAUSAL, _BOTH, _VISION, _SOUND, _MANY)).split()
