"""Inputs of single types, where no general ones (`inputs`) reach all of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["INPUTS"]

Inputs = dict[str, Any]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def _words(length: int, least: int = 5, most: int = 200) -> Tensor:
    return torch.tensor([[least + (7 * i) % (most - least) for i in range(length)]])


def _text(token: int | None, count: int, length: int = 12) -> Inputs:
    """Text with so many placeholders; their number is set right by `inputs` where the model tells it."""
    words = _words(length)
    ids = words if token is None else torch.cat([words[:, :3], torch.full((1, count), token), words[:, 3:]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _image(config: Any, *more: int) -> Tensor:
    """Of the size that a vision config names, with further dimensions in front."""
    side = config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return _noise(*more, getattr(config, "num_channels", 3), height, width)


def _aria(model: nn.Module) -> Inputs:
    # its projector knows two sizes of images; 35 x 35 patches is the smaller one
    side = 35 * model.config.vision_config.patch_size
    return {**_text(model.config.image_token_id, 128), "pixel_values": _noise(1, 3, side, side)}


def _tiles(model: nn.Module) -> Inputs:
    """An image in the tiles that the best of the model's resolutions has, with one of the whole."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, side = model.config, model.config.vision_config.image_size
    tiles = image_size_to_num_patches([side, side], config.image_grid_pinpoints, side)
    sizes = {"image_sizes": torch.tensor([[side, side]])}
    return {**_text(config.image_token_id, 4), "pixel_values": _image(config.vision_config, 1, tiles), **sizes}


def _xmod(model: nn.Module) -> Inputs:
    return {**_text(None, 0), "lang_ids": torch.zeros(1, dtype=torch.long)}


def _splinter(model: nn.Module) -> Inputs:
    return _text(model.config.question_token_id, 1)


def _lxmert(model: nn.Module) -> Inputs:
    boxes = torch.rand(1, 6, model.config.visual_pos_dim, generator=torch.Generator().manual_seed(3))
    return {**_text(None, 0), "visual_feats": _noise(1, 6, model.config.visual_feat_dim), "visual_pos": boxes}


def _speech(model: nn.Module) -> Inputs:
    return {"input_values": _noise(1, 16000), "decoder_input_ids": _words(8)}


def _decision(model: nn.Module) -> Inputs:
    steps, config = 8, model.config
    return {
        "states": _noise(1, steps, config.state_dim),
        "actions": _noise(1, steps, config.act_dim),
        "rewards": _noise(1, steps, 1),
        "returns_to_go": _noise(1, steps, 1),
        "timesteps": torch.arange(steps).unsqueeze(0),
    }


def _jev(model: nn.Module) -> Inputs:
    kinds = {"question_type_ids": torch.tensor([[0, 1]]), "num_options": torch.tensor([[2, 3]])}
    return {"input_ids": _words(12), "marks": torch.tensor([[5, 11]]), **kinds}


def _seggpt(model: nn.Module) -> Inputs:
    config: Any = model.config
    height, width = config.image_size
    pictures = _noise(3, 1, 3, height // 2, width)  # the prompt is put on top of the image
    return {"pixel_values": pictures[0], "prompt_pixel_values": pictures[1], "prompt_masks": pictures[2]}


def _qformer(model: nn.Module) -> Inputs:
    seen = _noise(1, 6, model.config.encoder_hidden_size)
    return {"query_embeds": _noise(1, 8, model.config.hidden_size), "encoder_hidden_states": seen}


def _blip(model: nn.Module) -> Inputs:
    config = model.config
    inputs = _text(config.image_token_index, config.num_query_tokens)
    inputs["pixel_values"] = _image(config.vision_config, 1)
    if config.model_type != "blip-2":
        inputs["qformer_input_ids"] = _words(6)
    return inputs


def _blip_video(model: nn.Module) -> Inputs:
    config = model.config
    text = _text(config.video_token_index, 2 * config.num_query_tokens)
    return {**text, "pixel_values": _image(config.vision_config, 1, 2), "qformer_input_ids": _words(6)}


def _idefics(model: nn.Module) -> Inputs:
    text = _text(None, 0)
    seen = torch.ones(1, text["input_ids"].shape[1], 1, dtype=torch.long)
    return {**text, "pixel_values": _image(model.config.vision_config, 1, 1), "image_attention_mask": seen}


def _kosmos(model: nn.Module) -> Inputs:
    config, ids = model.config, _words(12 + model.config.latent_query_num)
    places = (torch.arange(ids.shape[1]) < config.latent_query_num).unsqueeze(0)
    where = {"image_embeds_position_mask": places, "attention_mask": torch.ones_like(ids)}
    return {"pixel_values": _image(config.vision_config, 1), "input_ids": ids, **where}


def _kosmos_flat(model: nn.Module) -> Inputs:
    config = model.config
    ids = _words(12 + config.latent_query_num)
    places = (torch.arange(ids.shape[1]) < config.latent_query_num).long().unsqueeze(0)
    vision = config.vision_config
    patches = _noise(1, 16, vision.patch_embed_hidden_size + 2)
    patches[..., :2] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))  # the row and the column of each
    where = {"image_embeds_position_mask": places, "attention_mask": torch.ones_like(ids)}
    return {"flattened_patches": patches, "input_ids": ids, **where}


def _omdet(model: nn.Module) -> Inputs:
    classes, task = _words(6).reshape(2, 3), _words(5)
    return {
        "pixel_values": _noise(1, 3, 64, 64),
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": task,
        "tasks_attention_mask": torch.ones_like(task),
        "classes_structure": torch.tensor([2]),
    }


def _oneformer(model: nn.Module) -> Inputs:
    size = model.config.backbone_config.image_size
    return {"pixel_values": _noise(1, 3, size, size), "task_inputs": _words(model.config.task_seq_len)}


def _boxes(model: nn.Module) -> Inputs:
    """Text, an image and a box in it, for the geometry encoder."""
    config = model.config
    box, shown = torch.tensor([[[0.5, 0.5, 0.4, 0.4]]]), torch.ones(1, 1, dtype=torch.long)
    inputs = {**_text(None, 0), "input_boxes": box, "input_boxes_labels": shown}
    return {**inputs, "pixel_values": _image(config.vision_config.backbone_config, 1)}


def _assistant(model: nn.Module) -> Inputs:
    config = model.config
    seen = _noise(1, 6, config.hidden_size * len(config.target_layer_ids))
    return {"noise_embeds": _noise(1, config.block_size, config.hidden_size), "context_hidden_states": seen}


def _inkling(model: nn.Module) -> Inputs:
    """Patches with their pixels in rows, each as large as a token of the text."""
    vision = getattr(model.config, "vision_config", model.config)
    side = vision.patch_size * vision.spatial_merge_size
    picture = {
        "pixel_values": _noise(16, side, side, getattr(vision, "num_channels", 3)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    return picture if vision is model.config else {**_text(model.config.image_token_id, 16), **picture}


def _granite_speech(model: nn.Module) -> Inputs:
    config, frames = model.config, 128
    windows = -(-frames // config.window_size)
    heard = windows * (config.window_size // config.downsample_rate)
    return {
        **_text(config.audio_token_id, heard),
        "input_features": _noise(1, frames, config.encoder_config.input_dim),
        "input_features_mask": torch.ones(1, heard, dtype=torch.bool),
    }


def _realtime(model: nn.Module) -> Inputs:
    # each token of the text has the sound of its time added: eight frames
    ids = _words(16)
    frames = 8 * ids.shape[1]
    return {"input_ids": ids, "input_features": _noise(1, model.config.audio_config.num_mel_bins, frames)}


def _gemma3n_audio(model: nn.Module) -> Inputs:
    mask = torch.zeros(1, 64, dtype=torch.bool)  # true where there is nothing
    return {"audio_mel": _noise(1, 64, model.config.input_feat_size), "audio_mel_mask": mask}


def _protein(model: nn.Module) -> Inputs:
    protein = _words(10, 4, 24)
    return {**_text(None, 0), "protein_input_ids": protein, "protein_attention_mask": torch.ones_like(protein)}


def _high_resolution(model: nn.Module) -> Inputs:
    config = model.config
    small, large = _image(config.vision_config, 1), _image(config.high_res_vision_config, 1)
    return {**_text(config.image_token_id, 16), "pixel_values": small, "high_res_pixel_values": large}


def _flava(model: nn.Module) -> Inputs:
    config = model.config
    side = config.image_config.image_size // config.image_config.patch_size
    return {
        **_text(None, 0),
        "input_ids_masked": _words(12),
        "pixel_values": _image(config.image_config, 1),
        "codebook_pixel_values": _noise(1, 3, 8 * side, 8 * side),
        "bool_masked_pos": (torch.arange(side * side) % 2 == 0).reshape(1, side, side),
    }


def _robot(model: nn.Module) -> Inputs:
    config = model.config
    text = _text(config.vlm_config.image_token_id, 16)
    return {
        **text,
        "state": _noise(1, config.max_state_dim),
        "noise": _noise(1, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.5]),
        "pixel_values": _image(config.vlm_config.vision_config, 1, 1),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    }


def _clap(model: nn.Module) -> Inputs:
    audio = model.config.audio_config
    channels = 4 if audio.enable_fusion else 1
    longer = {"is_longer": torch.ones(1, 1, dtype=torch.bool)} if audio.enable_fusion else {}
    return {**_text(None, 0), "input_features": _noise(1, channels, 1001, audio.num_mel_bins), **longer}


def _stacked_sound(model: nn.Module) -> Inputs:
    config = getattr(model.config, "encoder_config", model.config)
    return {"input_features": _noise(1, 32, 4 * config.num_mel_bins)}  # four frames in one


def _film(model: nn.Module) -> Inputs:
    side = model.config.max_img_size
    return {**_text(None, 0), "pixel_values": _noise(1, model.config.num_frames, 3, side, side)}


def _drawn(model: nn.Module) -> Inputs:
    """An image to start from, and the size of one to draw."""
    config, side = model.config, 8
    vision = config.vision_config
    places = [config.image_token_id] * side**2
    marked = torch.tensor([[config.image_start_token_id, *places, config.image_end_token_id]])
    ids = torch.cat([_words(4), marked, _words(4)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _noise(side**2, vision.in_channels * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side], [1, 4, 4]]),
        "images_per_sample": torch.tensor([2]),
    }


def _thinker(model: nn.Module) -> Inputs:
    """Text with an image and sound, and with places of its own: those that the model works out need further tokens."""
    config, side, frames, heard = model.config, 8, 200, 26  # Qwen3 hears 13 tokens in a hundred frames
    vision = config.vision_config
    pictured = side**2 // vision.spatial_merge_size**2
    ids = _text(config.image_token_id, pictured)["input_ids"]
    ids = torch.cat([ids, torch.full((1, heard), config.audio_token_id), _words(3)], dim=1)
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).repeat(3, 1, 1),
        "pixel_values": _noise(side**2, size),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "input_features": _noise(1, config.audio_config.num_mel_bins, frames),
        "feature_attention_mask": torch.ones(1, frames, dtype=torch.long),
    }


def _phi(model: nn.Module) -> Inputs:
    """An image in one tile and as a whole, and sound."""
    config = model.config
    vision, audio, frames = config.vision_config, config.audio_config, 64
    side = vision.image_size // vision.patch_size  # of a tile, in patches; the model halves it
    pictured = 2 * (side // 2) * (side // 2 + 1) + 1
    heard = -(-frames // audio.time_reduction)
    ids = _text(vision.image_token_id, pictured)["input_ids"]
    ids = torch.cat([ids, torch.full((1, heard), audio.audio_token_id), _words(3)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "image_pixel_values": _image(vision, 1, 2),
        "image_sizes": torch.tensor([[vision.crop_size, vision.crop_size]]),
        "image_attention_mask": torch.ones(1, 2, side, side, dtype=torch.long),
        "audio_input_features": _noise(1, frames, audio.input_size),
        "audio_embed_sizes": torch.tensor([heard]),
    }


def _tiled(model: nn.Module) -> Inputs:
    """An image of one tile of those that there is room for, seen by all of the text."""
    vision = model.config.vision_config
    tiles, text = vision.max_num_tiles, _text(model.config.image_token_index, 1)
    return {
        **text,
        "pixel_values": _image(vision, 1, 1, tiles),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": (torch.arange(tiles) == 0).long().reshape(1, 1, tiles),
        "cross_attention_mask": torch.ones(1, text["input_ids"].shape[1], 1, tiles, dtype=torch.long),
    }


def _forecast(model: nn.Module) -> Inputs:
    """A series with the past that its lags reach back to, and the future that a decoder is given."""
    config = model.config
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": _noise(1, past).abs(),
        "past_time_features": _noise(1, past, config.num_time_features),
        "past_observed_mask": torch.ones(1, past),
        "future_values": _noise(1, future).abs(),
        "future_time_features": _noise(1, future, config.num_time_features),
    }


def _codebooks(model: nn.Module) -> Inputs:
    """At each place a word, and a code of each book."""
    ids = torch.stack([_words(12).roll(book, 1) for book in range(model.config.num_codebooks + 1)], dim=2)
    return {"input_ids": ids, "attention_mask": torch.ones(1, ids.shape[1], dtype=torch.long)}


def _two_ways(model: nn.Module) -> Inputs:
    """The same sound as samples and as features, with one frame of features for each code."""
    config, codes = model.config, 20
    size = config.semantic_model_config.feature_projection_input_dim
    return {"input_values": _noise(1, 1, 320 * codes), "input_features": _noise(1, codes, size)}


def _samples(model: nn.Module) -> Inputs:
    return {"hidden_states": _noise(1, 1, 6400)}


def _latents(model: nn.Module) -> Inputs:
    return {"hidden_states": _noise(1, model.config.hidden_size, 2)}


def _line(model: nn.Module) -> Inputs:
    return {"pixel_values": _noise(1, 3, 96, 320)}  # a line of text: wider than high


def _gemma3n(model: nn.Module) -> Inputs:
    config, frames = model.config, 64
    ids = _text(config.image_token_id, config.vision_soft_tokens_per_image)["input_ids"]
    heard = torch.full((1, config.audio_soft_tokens_per_image), config.audio_token_id)
    ids = torch.cat([ids, heard, _words(3)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _noise(1, 3, 64, 64),
        "input_features": _noise(1, frames, config.audio_config.input_feat_size),
        "input_features_mask": torch.ones(1, frames, dtype=torch.bool),
    }


def _music(model: nn.Module) -> Inputs:
    """What to play, and the codes of each book; for the type that follows a melody, the pitches of one."""
    config = model.config
    inputs = {**_text(None, 0), "decoder_input_ids": _words(8).repeat(config.decoder.num_codebooks, 1)}
    pitches = getattr(config, "num_chroma", None)
    return inputs if pitches is None else {**inputs, "input_features": _noise(1, 16, pitches)}


def _note(model: nn.Module) -> Inputs:
    """Text with an image and sound, as patches of a grid and as frames with the number of their samples."""
    config, side = model.config, 8
    vision, audio = config.vision_config, config.audio_config
    samples = 4 * audio.samples_per_token
    ids = _text(config.image_token_id, side**2 // vision.spatial_merge_size**2)["input_ids"]
    ids = torch.cat([ids, torch.full((1, 4), config.audio_token_id), _words(3)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _noise(side**2, vision.num_channels * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "input_features": _noise(1, audio.feature_size, samples // audio.hop_length),
        "chunk_sample_lengths": torch.tensor([samples]),
    }


def _video_llava(model: nn.Module) -> Inputs:
    """An image and a video, each seen by a tower of its own."""
    config, vision, frames = model.config, model.config.vision_config, 2
    patches = (vision.image_size // vision.patch_size) ** 2
    shown = torch.full((1, frames * (patches + 1)), config.video_token_id)  # with the class token of each frame
    ids = torch.cat([_text(config.image_token_id, patches)["input_ids"], shown, _words(3)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _image(vision, 1),
        "pixel_values_videos": _image(vision, 1, frames),
    }


def _pooled(model: nn.Module) -> Inputs:
    """The patches of one crop, four of which are pooled to a token."""
    config, vision = model.config, model.config.vision_config
    side = vision.image_size[0] // vision.patch_size
    places = torch.arange(side**2).reshape(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
    text = _text(config.image_token_id, len(places))
    return {
        **text,
        "pixel_values": _noise(1, side**2, vision.num_channels * vision.patch_size**2),
        "image_token_pooling": places,
        "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]]),
        "mm_token_type_ids": (text["input_ids"] == config.image_token_id).long(),
    }


def _inkling_mm(model: nn.Module) -> Inputs:
    """Patches, each as large as a token of the text, with their times in front and their channels behind."""
    vision = model.config.vision_config
    patches = _noise(4, vision.temporal_patch_size, vision.patch_size, vision.patch_size, vision.num_channels)
    return {**_text(model.config.image_token_id, len(patches)), "pixel_values": patches}


def _apertus(model: nn.Module) -> Inputs:
    """An image and sound, which become words of the text."""
    config, side, codes = model.config, 64, 4
    samples = codes * config.audio_config.hop_length
    pictured = (side // config.vision_config.spatial_scale_factor) ** 2
    ids = _text(config.image_token_id, pictured)["input_ids"]
    ids = torch.cat([ids, torch.full((1, codes), config.audio_token_id), _words(3)], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _noise(1, 3, side, side),
        "image_sizes": torch.tensor([[side, side]]),
        "input_values": _noise(1, 1, samples),
        "padding_mask": torch.ones(1, samples, dtype=torch.long),
    }


def _canvas(model: nn.Module) -> Inputs:
    """Text with an image as patches with their places, nine of which are pooled to a token."""
    config, side = model.config, 6
    vision = config.vision_config
    text = _text(config.image_token_id, side**2 // vision.pooling_kernel_size**2)
    return {
        **text,
        "mm_token_type_ids": (text["input_ids"] == config.image_token_id).long(),
        "pixel_values": _noise(1, side**2, 3 * vision.patch_size**2),
        "image_position_ids": torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1).unsqueeze(0),
        "decoder_input_ids": _words(config.canvas_length),
    }


def _voice(model: nn.Module) -> Inputs:
    """Text with sound, as samples."""
    config, heard = model.config, 4
    samples = heard * config.audio_config.hop_length
    return {
        **_text(config.audio_token_id, heard),
        "input_values": _noise(1, 1, samples),
        "padding_mask": torch.ones(1, samples, dtype=torch.bool),
    }


def _spoken(model: nn.Module) -> Inputs:
    """Text with sound, as samples, and where it ends."""
    config, heard = model.config, 6
    samples = heard * config.codec_config.frame_size
    return {
        **_text(config.audio_token_id, heard),
        "input_values": _noise(1, 1, samples),
        "input_values_cutoffs": torch.tensor([[samples]]),
    }


# by model type, a function of the model
INPUTS: dict[str, Callable[[nn.Module], Inputs]] = {
    "apertus1p5": _apertus,
    "aria": _aria,
    "autoformer": _forecast,
    "blip-2": _blip,
    "blip_2_qformer": _qformer,
    "clap": _clap,
    "csm": _spoken,
    "decision_transformer": _decision,
    "deepseek_vl_hybrid": _high_resolution,
    "diffusion_gemma": _canvas,
    "dots3_note": _note,
    "evolla": _protein,
    "flava": _flava,
    "gemma3n": _gemma3n,
    "gemma3n_audio": _gemma3n_audio,
    "glm_image": _drawn,
    "granite_speech": _granite_speech,
    "granite_speech5_ctc": _stacked_sound,
    "granite_speech5_encoder": _stacked_sound,
    "granite_speech_plus": _granite_speech,
    "idefics": _idefics,
    "informer": _forecast,
    "inkling2": _inkling,
    "inkling2_loop": _inkling,
    "inkling2_vision": _inkling,
    "inkling_mm_model": _inkling_mm,
    "instructblip": _blip,
    "instructblipvideo": _blip_video,
    "jev": _jev,
    "kosmos-2": _kosmos,
    "kosmos-2.5": _kosmos_flat,
    "kyutai_speech_to_text": _codebooks,
    "llava_next": _tiles,
    "llava_next_video": _tiles,
    "llava_onevision": _tiles,
    "lxmert": _lxmert,
    "mllama": _tiled,
    "molmo2": _pooled,
    "muse_glimmer_assistant": _assistant,
    "musicgen": _music,
    "musicgen_melody": _music,
    "neucodec": _two_ways,
    "omdet-turbo": _omdet,
    "oneformer": _oneformer,
    "phi4_multimodal": _phi,
    "pi0": _robot,
    "pp_ocrv5_mobile_rec": _line,
    "qwen2_5_omni_thinker": _thinker,
    "qwen3_omni_moe_thinker": _thinker,
    "sam3": _boxes,
    "sam3_lite_text": _boxes,
    "seggpt": _seggpt,
    "speech-encoder-decoder": _speech,
    "splinter": _splinter,
    "time_series_transformer": _forecast,
    "tvp": _film,
    "vibevoice": _voice,
    "vibevoice_acoustic_tokenizer_decoder": _latents,
    "vibevoice_acoustic_tokenizer_encoder": _samples,
    "video_llava": _video_llava,
    "voxtral_realtime": _realtime,
    "xcodec2": _two_ways,
    "xmod": _xmod,
}
