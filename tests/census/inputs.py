"""Inputs for any model: those that the package makes up, else by the names of what the forward takes.

A model that merges images or sound into its text says itself how many placeholders they need, and is asked until it
runs.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from deeparc_hf.architectures import find_host

from .special_inputs import INPUTS

__all__ = ["NoInputsError", "inputs_for", "run"]

LENGTH = 40
SOUND = 19200  # samples; divisible by what codecs put in one frame
_COUNTS = re.compile(r"(?:tokens?|placeholders?)\D*\d+\D*features?\D*(?P<needed>\d+)", re.IGNORECASE)
_COUNTS_TURNED = re.compile(r"(?P<needed>\d+) feature vectors for \d+ placeholder", re.IGNORECASE)


class NoInputsError(RuntimeError):
    """The model ran on nothing that was tried; the message says what went wrong last."""


def run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """One forward pass, the same each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**inputs)


def inputs_for(model: PreTrainedModel, reach: Callable[[dict[str, Any]], list[str]] | None = None) -> dict[str, Any]:
    """Inputs on which the model runs: the first that reach all of it, else those that reach most.

    Args:
        model: the model.
        reach: told inputs on which the model runs, what they do not reach; default: the first inputs will do.

    Raises:
        NoInputsError: if there are none.
    """
    problem, found, fewest = "nothing was tried", None, 0
    used = copy.deepcopy(model)  # some keep what they have computed, and would not compute it again
    for candidate in _candidates(model):
        inputs, trouble = _running(used, candidate)
        if inputs is None:
            problem = trouble
            continue
        idle = reach(inputs) if reach is not None else []
        if not idle:
            return inputs
        if found is None or len(idle) < fewest:
            found, fewest = inputs, len(idle)
    if found is not None:
        return found
    raise NoInputsError(problem)


def _running(model: PreTrainedModel, inputs: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """The inputs with the number of placeholders that the model wants; None, and why, if it does not run on them."""
    for _ in range(4):
        try:
            run(model, inputs)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            more = _with_placeholders(model.config, inputs, str(error))
            if more is None:
                break
            inputs = more
            continue
        return inputs, ""
    return None, problem


def _candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    kind = model.config.model_type
    if kind in INPUTS:
        yield INPUTS[kind](model)
    try:
        made_up = find_host(model).example_inputs()
    except Exception:
        made_up = None
    merged = list(_merged(model))
    if not merged and made_up is not None:
        yield made_up
    yield from merged
    if merged and made_up is not None:
        yield made_up
    yield from _by_name(model)
    try:
        dummy = {key: value for key, value in model.dummy_inputs.items() if isinstance(value, Tensor)}
    except Exception:
        return
    if _required(model) <= dummy.keys():
        yield dummy


def _taken(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _required(model: nn.Module) -> set[str]:
    taken = inspect.signature(model.forward).parameters.values()
    return {p.name for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _open_ended(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _find(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these entries that a config, or one in it, has."""
    parts = [config]
    while parts:
        part = parts.pop(0)
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
        parts += [value for value in vars(part).values() if isinstance(value, PreTrainedConfig)]
    return None


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What reads or writes the text: the decoder where there is an encoder of another type beside it."""
    try:
        return config.get_text_config()
    except ValueError:  # several would do
        return config.get_text_config(decoder=True)


def length_of(config: PreTrainedConfig) -> int:
    """Of a text: shorter than usual where a text model has few positions."""
    positions = _find(_text_config(config), "max_position_embeddings", "max_text_len")
    return min(LENGTH, positions) if type(positions) is int and positions > 4 else LENGTH


def ids(config: PreTrainedConfig, length: int | None = None) -> Tensor:
    length = length_of(config) if length is None else length
    vocabulary = _find(_text_config(config), "vocab_size") or 100
    special = {value for key, value in _tokens(config)}
    plain = [i for i in range(5, min(vocabulary, 250)) if i not in special] or [0]
    return torch.tensor([[plain[(7 * i) % len(plain)] for i in range(length)]])


def _tokens(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    for key in dir(config):
        if re.search(r"token_(id|index)$", key):
            value = getattr(config, key, None)
            if type(value) is int:
                yield key, value


def _vision(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the images."""
    return _find(config, "vision_config", "backbone_config") or config


def _channels(config: PreTrainedConfig) -> int:
    channels = _find(_vision(config), "num_channels", "in_channels", "in_chans")
    return channels if type(channels) is int and 0 < channels <= 16 else 3


def _patch(config: PreTrainedConfig) -> int:
    patch = _find(_vision(config), "patch_size")
    return patch if type(patch) is int else 14


def pixels(config: PreTrainedConfig) -> Tensor:
    size = _find(_vision(config), "image_size", "img_size", "crop_size", "input_size") or 64
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    sides = list(size)[-2:] if isinstance(size, (list, tuple)) else [size, size]
    return torch.randn(1, _channels(config), *sides, generator=torch.Generator().manual_seed(1))


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def _pictures(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """One image, in each layout that models take which have the arguments of this one."""
    config, taken, needed = model.config, _taken(model), _required(model)
    found: list[dict[str, Tensor]] = []
    if taken & {"grid_thw", "image_grid_thw", "image_grid_hws", "image_grid_hw"}:
        found += _packed(config, taken, needed)
    patch, channels = _patch(config), _channels(config)
    if "spatial_shapes" in taken:
        mask = {"pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}
        shape = {"spatial_shapes": torch.tensor([[4, 4]])}
        found.append({"pixel_values": noise(1, 16, channels * patch**2), **mask, **shape})
    if "target_sizes" in taken:
        found.append({"pixel_values": noise(1, channels, patch, 64 * patch), "target_sizes": torch.tensor([[8, 8]])})
    places = taken & {"pixel_position_ids", "image_position_ids"}
    if places:
        at = torch.cartesian_prod(torch.arange(12), torch.arange(12)).flip(-1).unsqueeze(0)
        found.append({"pixel_values": noise(1, 144, channels * patch**2), places.pop(): at})
    keys = [key for key in ("pixel_values", "images", "pixel_values_images") if key in taken]
    wanted = needed if keys else taken
    videos = [key for key in ("pixel_values_videos", "pixel_values_video") if key in wanted]
    if not keys and not videos and _open_ended(model):
        keys = ["pixel_values"]
    image = pixels(config)
    frames = image.unsqueeze(1).repeat(1, _find(config, "num_frames", "frames_per_clip") or 2, 1, 1, 1)
    found += [{key: frames} for key in videos]
    for key in keys:
        size = torch.tensor([list(image.shape[-2:])])
        found += [{key: value} for value in (image, image.unsqueeze(1), frames)]
        if "pixel_attention_mask" in taken:  # of tiles, or of pixels
            masks = [torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, *image.shape[-2:], dtype=torch.bool)]
            found += [{key: image.unsqueeze(1), "pixel_attention_mask": mask} for mask in masks]
        if "image_sizes" in taken or _open_ended(model):
            found += [{key: value, "image_sizes": size} for value in (image, image.unsqueeze(1))]
            found.append({key: image.repeat(3, 1, 1, 1).unsqueeze(0), "image_sizes": size})
    return found


def _packed(config: PreTrainedConfig, taken: set[str], needed: set[str]) -> list[dict[str, Tensor]]:
    """The patches of one image in one row, with their grid, as Qwen-VL takes them."""
    vision, patch, channels, side = _vision(config), _patch(config), _channels(config), 16
    key = "hidden_states" if "hidden_states" in needed else "pixel_values"
    grid = torch.tensor([[1, side, side]])
    more: dict[str, Tensor] = {}
    for name in taken & {"grid_thw", "image_grid_thw"}:
        more[name] = grid
    for name in taken & {"image_grid_hws", "image_grid_hw"}:
        more[name] = grid[:, 1:]
    for name in taken & {"merge_sizes", "image_merge_sizes"}:
        more[name] = torch.tensor([2])
    found = []
    for times in dict.fromkeys([getattr(vision, "temporal_patch_size", None) or 1, 1, 2]):
        found.append({key: noise(side * side, channels * times * patch * patch), **more})
    found.append({key: found[0][key].unsqueeze(0), **more})
    return [*found, {key: noise(side * side, channels, patch, patch), **more}]


def _sounds(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """One second of sound, or so, in each layout that models take which have the arguments of this one."""
    config, taken = model.config, _taken(model)
    if "input_features" not in taken and "input_values" in taken:
        long = torch.ones(1, SOUND, dtype=torch.long)
        mask: dict[str, Tensor] = {key: long for key in ("padding_mask", "attention_mask") if key in _required(model)}
        shapes = [(1, SOUND), (1, 1, SOUND)]
        mels = _find(config, "num_mel_bins")
        if type(mels) is int:
            shapes.append((1, _find(config, "max_length") or 128, mels))
        return [{"input_values": noise(*shape), **mask} for shape in shapes]
    if "input_features" not in taken and not _open_ended(model):
        return []
    positions = _find(config, "max_source_positions")
    lengths = [128, 300, *([2 * positions] if type(positions) is int else [])]
    names = ("num_mel_bins", "input_feat_per_channel", "input_dim", "feature_size", "input_size", "n_mels", "mel_bins")
    sizes = dict.fromkeys(value for value in (*(_find(config, name) for name in names), 80) if type(value) is int)
    found = []
    for mels in sizes:
        for length in lengths:
            ones = torch.ones(1, length, dtype=torch.long)
            masks = [{key: ones} for key in ("input_features_mask", "feature_attention_mask") if key in taken]
            for features in (noise(1, mels, length), noise(1, length, mels)):
                found += [{"input_features": features, **mask} for mask in [*masks, {}]]
    return found


def _by_name(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """What the forward takes, by the names of its arguments: images and sound in any layout, the rest as it comes."""
    taken, needed = _taken(model), _required(model)
    plain = {key: _value(model.config, key) for key in taken if key in needed or key in _WANTED}
    plain = {key: value for key, value in plain.items() if value is not None}
    if "decoder_input_ids" in plain and not model.config.is_encoder_decoder:
        del plain["decoder_input_ids"]
    pictures = [one for one in _pictures(model) if one.keys() <= taken] or [{}]
    sounds = [one for one in _sounds(model) if one.keys() <= taken] or [{}]
    bare = {key: value for key, value in plain.items() if key in needed}
    for picture in pictures:
        for sound in sounds:
            yield {**plain, **picture, **sound}
            if plain.keys() != bare.keys() and (picture or sound or bare):
                yield {**bare, **picture, **sound}
    if pictures != [{}] or sounds != [{}]:
        yield plain


_WANTED = {"input_ids", "attention_mask", "decoder_input_ids", "bbox", "pixel_mask", "flattened_patches"}


def _value(config: PreTrainedConfig, name: str) -> Tensor | None:
    width = _find(config, "hidden_size", "d_model", "embed_dim") or 64
    if name.endswith("input_ids") or name == "prompt_ids":
        return ids(config, 12 if name.startswith("decoder_") else None)
    if name == "attention_mask" or name == "mask" or name.endswith("input_ids_mask"):
        return torch.ones(1, length_of(config), dtype=torch.long)
    if name == "bbox":
        return torch.arange(4).add(1).repeat(1, length_of(config), 1)
    if name == "past_values":
        channels = _find(config, "num_input_channels")
        length = _find(config, "context_length") or 128
        return noise(1, length, channels) if channels else noise(1, length)
    if name == "latents":  # what a codec hands from its encoder to its decoder
        return noise(1, width, 16)
    if name in ("hidden_states", "inputs_embeds", "encoder_hidden_states", "query_embeds"):
        return noise(1, 16, width)
    if name == "flattened_patches":  # each with its row and its column in front
        size = _find(config, "patch_embed_hidden_size") or _channels(config) * _patch(config) ** 2
        at = torch.cartesian_prod(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)).unsqueeze(0)
        return torch.cat([at, noise(1, 16, size)], dim=2)
    return None


def _merged(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Text with places for an image, or for sound."""
    config, taken = model.config, _taken(model)
    image, sound = _placeholder(config, "image"), _placeholder(config, "audio")
    if (image is None and sound is None) or "input_ids" not in taken:
        return
    text = _with(ids(config), image, 4) if image is not None else ids(config)
    text = _with(text, sound, 4) if sound is not None else text
    pictures = _pictures(model) if image is not None else [{}]
    sounds = _sounds(model) if sound is not None else [{}]
    for picture in pictures or [{}]:
        for heard in sounds or [{}]:
            whole = {"input_ids": text, "attention_mask": torch.ones_like(text), **picture, **heard}
            if "decoder_input_ids" in taken and config.is_encoder_decoder:
                whole["decoder_input_ids"] = ids(config, 12)
            if "mm_token_type_ids" in taken and image is not None:
                whole["mm_token_type_ids"] = (text == image).long()
            if "token_type_ids" in taken and image is not None:
                yield {**whole, "token_type_ids": (text == image).long()}
            yield whole


def _placeholder(config: PreTrainedConfig, kind: str) -> int | None:
    value = _find(config, f"{kind}_token_id", f"{kind}_token_index")
    return value if type(value) is int else None


def _with(text: Tensor, token: int, count: int) -> Tensor:
    """The text with so many placeholders in it."""
    plain = text[:, text[0] != token]
    return torch.cat([plain[:, :3], torch.full((1, count), token), plain[:, 3:]], dim=1)


def _with_placeholders(config: PreTrainedConfig, inputs: dict[str, Any], problem: str) -> dict[str, Any] | None:
    """The inputs with as many placeholders as the model says that it needs; None if it says nothing of the kind."""
    counts = _COUNTS.search(problem) or _COUNTS_TURNED.search(problem)
    if counts is None or "input_ids" not in inputs:
        return None
    kind = "audio" if "audio" in problem.lower() else "image"
    token = _placeholder(config, kind)
    needed = int(counts["needed"])
    if token is None or int((inputs["input_ids"] == token).sum()) == needed or needed > 4096:
        width = _find(_text_config(config), "hidden_size") or 0
        if not (token is not None and width and needed % width == 0):
            return None
        needed //= width  # it counts numbers, not vectors
        if int((inputs["input_ids"] == token).sum()) == needed:
            return None
    text = _with(inputs["input_ids"], token, needed)
    more = {**inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}
    for key in ("mm_token_type_ids", "token_type_ids"):
        if key in inputs:
            more[key] = (text == token).long()
    if "position_ids" in inputs:
        places = inputs["position_ids"].shape[:-1]
        more["position_ids"] = torch.arange(text.shape[1]).expand(*places, -1).contiguous()
    return more
