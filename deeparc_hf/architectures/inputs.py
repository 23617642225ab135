"""Made-up inputs for a transformers model: plain, valid, and long enough to show windows and switches by length."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.offload import device_of

__all__ = ["example_inputs", "merges_inputs", "most_positions", "pixels"]

# positions that a model has: its inputs may not be longer
_LIMIT = re.compile(
    r"^(max_position_embeddings|max_(encoder|decoder|text|target)_position(s|_embeddings)|n_positions|n_ctx|max_seq_len)$"
)
_LENGTH, _DECODED = 128, 16
_FRAMES = 64


def merges_inputs(config: PreTrainedConfig) -> bool:
    """Whether images take the place of tokens in the text, so that inputs cannot be made up."""
    return hasattr(config, "vision_config") and any(hasattr(config, f"image_token_{end}") for end in ("id", "index"))


def main_input(root: PreTrainedModel) -> str:
    """The name of what a model reads first of all (OneFormer has a list of such)."""
    name = root.main_input_name
    return name if isinstance(name, str) else next(iter(name), "input_ids")


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The settings of what reads the text: the encoder's, where a decoder of something else has them too (MusicGen)."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(encoder=True)


def example_inputs(root: PreTrainedModel) -> dict[str, Tensor] | None:
    """Small valid inputs on the model's device; None where they cannot be known."""
    taken = inspect.signature(root.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    main: str | None = main_input(root)
    if main not in taken:
        # a vision tower that is a model of its own may still have the name of the base class
        towers = (name for name in ("pixel_values", "input_features") if name in taken)
        main = next(towers, main if open_ended else None)
    makers = {
        "input_ids": _text,
        "pixel_values": _images,
        "pixel_values_videos": _videos,
        "input_features": _features,
        "input_values": _sound,
    }
    maker = makers.get(main) if isinstance(main, str) else None
    inputs = maker(root.config) if maker else None
    if inputs is None:
        return None
    if "decoder_input_ids" in taken and root.config.is_encoder_decoder and maker is not _text:
        inputs["decoder_input_ids"] = _ids(root.config, min(_DECODED, _length(root.config)))
    single = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {name for name, p in taken.items() if p.default is p.empty and p.kind in single}
    if needed - inputs.keys():
        return None
    device = device_of(root)
    return {
        name: value.to(device, root.dtype) if value.is_floating_point() else value.to(device)
        for name, value in inputs.items()
        if name in taken or open_ended
    }


def _text(config: PreTrainedConfig) -> dict[str, Tensor] | None:
    if _vocabulary(config) is None:
        return None
    length = _length(config)
    ids = _ids(config, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : max(length // 2, 1)]
    if hasattr(config, "vision_config"):
        # where the image goes into the text differs from family to family; CLIP and its like take it by itself
        images = None if merges_inputs(config) else pixels(config.vision_config)
        return None if images is None else {**inputs, "pixel_values": images}
    return inputs


def _vocabulary(config: PreTrainedConfig) -> int | None:
    text = _text_config(config)
    size = getattr(text, "vocab_size", None)
    if size is None and hasattr(text, "num_hash_buckets"):
        return 1000  # CANINE reads characters: any number is one
    return size if type(size) is int else None


def _ids(config: PreTrainedConfig, length: int) -> Tensor:
    """Plain ids, away from the special tokens at the start of most vocabularies."""
    vocabulary = _vocabulary(config) or 6
    return (torch.arange(length) * 7 + vocabulary // 2).remainder(vocabulary).view(1, length)


def most_positions(config: PreTrainedConfig) -> int | None:
    """How long a text may be for all parts of the model; None if the config names no limit."""
    text = _text_config(config)
    limits = [v for part in (config, text) for k, v in _entries(part) if _LIMIT.search(k) and type(v) is int and v > 0]
    if hasattr(text, "axial_pos_shape"):  # Reformer
        limits.append(math.prod(text.axial_pos_shape) + 2)
    if type(getattr(text, "num_hash_buckets", None)) is int:  # CANINE has as many positions of characters
        limits.append(text.num_hash_buckets)
    # RoBERTa numbers positions from behind its padding token, so two of them are no places
    return min((max(1, limit - 2) if limit > 4 else limit for limit in limits), default=None)


def _length(config: PreTrainedConfig) -> int:
    """How long a made-up text is: `_LENGTH`, or what attention by blocks takes, and no more than its positions."""
    text = _text_config(config)
    length = _LENGTH
    if type(getattr(text, "index_topk", None)) is int:  # an indexer chooses nothing in a text as short as its choice
        length = max(length, text.index_topk + _FRAMES)
    if getattr(text, "attention_type", None) == "block_sparse":  # BigBird attends to everything in shorter texts
        length = (6 + 2 * text.num_random_blocks) * text.block_size
    return min(length, most_positions(config) or length)


def _entries(config: PreTrainedConfig) -> list[tuple[str, Any]]:
    mapped = {public: vars(config).get(own) for public, own in config.attribute_map.items()}
    return [*vars(config).items(), *mapped.items()]


def pixels(vision: PreTrainedConfig) -> Tensor | None:
    """One image of the size that a config names; None if it names none."""
    known = getattr(vision, "pretrained_cfg", None) or {}
    size = getattr(vision, "image_size", None) or known.get("input_size", (3, 64, 64))[1:]
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    sides = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(vision, "num_channels", 3)
    if len(sides) != 2 or not all(type(side) is int for side in (*sides, channels)):
        return None
    return _random(1, channels, *sides)


def _images(config: PreTrainedConfig) -> dict[str, Tensor] | None:
    vision = getattr(config, "vision_config", config)
    images = pixels(vision)
    frames = getattr(vision, "num_frames", None)
    films = type(frames) is int and any(hasattr(vision, name) for name in ("tubelet_size", "attention_type"))
    if images is not None and films:
        images = images.unsqueeze(1) * _random(1, frames, 1, 1, 1)  # VideoMAE, ViViT, TimeSformer
    return None if images is None else {"pixel_values": images}


def _videos(config: PreTrainedConfig) -> dict[str, Tensor] | None:
    frames, size = getattr(config, "frames_per_clip", None), getattr(config, "crop_size", None)
    if type(frames) is not int or type(size) is not int:
        return None
    return {"pixel_values_videos": _random(1, frames, getattr(config, "in_chans", 3), size, size)}


def _features(config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """Spectrograms, in the layout that the config's names tell of."""
    mels, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if mels and positions:  # Whisper
        return {"input_features": _random(1, mels, 2 * positions)}
    if hasattr(config, "input_feat_per_channel"):  # Speech2Text, which shortens them fourfold
        frames = min(_FRAMES, positions) if positions else _FRAMES
        values = config.input_feat_per_channel * getattr(config, "input_channels", 1)
        return {"input_features": _random(1, frames, values)}
    if hasattr(config, "feature_projection_input_dim"):  # Wav2Vec2-BERT
        return {"input_features": _random(1, _FRAMES, config.feature_projection_input_dim)}
    return None


def _sound(config: PreTrainedConfig) -> dict[str, Tensor] | None:
    """Raw sound for wav2vec 2.0 and its like, long enough for some frames; spectrograms for AST."""
    strides, kernels = getattr(config, "conv_stride", None), getattr(config, "conv_kernel", None)
    if isinstance(strides, (list, tuple)) and isinstance(kernels, (list, tuple)):
        return {"input_values": _random(1, math.prod(strides) * _FRAMES // 2 + max(kernels))}
    spectrograms = hasattr(config, "num_mel_bins") and hasattr(config, "frequency_stride")
    if spectrograms and type(getattr(config, "max_length", None)) is int:
        return {"input_values": _random(1, config.max_length, config.num_mel_bins)}
    return None


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
