"""What the general rule of `tiny` cannot know of a type."""

from __future__ import annotations

from typing import Any


def in_turn(*kinds: str, layers: int = 6) -> list[str]:
    """Layers of several kinds, there and back again, so that no kind has all of the odd places."""
    there_and_back = [*kinds, *reversed(kinds)] * layers
    return there_and_back[:layers]


def _layers(*kinds: str, layers: int = 6) -> dict[str, Any]:
    return {"num_hidden_layers": layers, "layer_types": in_turn(*kinds, layers=layers)}


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FORECAST = {"prediction_length": 8, "context_length": 16, "num_time_features": 2}
EFFICIENTNET = {"width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320}
# the tokens of a picture are named by the digits of their number in the codebook, as letters
PICTURE_WORDS = {"<image>": 319, **{f"IMGIMG{letter}Z": 300 + i for i, letter in enumerate("ABCDEFGHIJ")}}
NECK = {
    "intraclass_block_config": {
        "reduce_channel": [1, 1, 0],
        "return_channel": [1, 1, 0],
        **{
            f"{name}_{ratio}ratio": shape
            for ratio, size in (("long", 7), ("mid", 5), ("short", 3))
            for name, shape in (
                ("vertical_long_to_small_conv", [[size, 1], [1, 1], [size // 2, 0]]),
                ("horizontal_small_to_long_conv", [[1, size], [1, 1], [0, size // 2]]),
                ("symmetric_conv_long", [[size, size], [1, 1], [size // 2, size // 2]]),
            )
        },
    },
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
    "neck_out_channels": 64,
}
TIMM_VIT = {"architecture": "test_vit", "num_classes": 64, "model_args": {"img_size": 64}}
BLOCKS = {"layers": [3, 2, 3, 2]}  # of the stages of a timm ResNet
# one that halves both sides of a picture at each stage (the class's own is for lines of text)
LCNET = {
    "stem_channels": [3, 16, 32],
    "block_configs": [
        [[3, 32, 32, 1, True]],
        [[3, 32, 48, 2, False], [3, 48, 48, 1, False]],
        [[3, 48, 64, 2, False], [3, 64, 64, 1, True], [3, 64, 64, 1, False]],
        [[3, 64, 96, 2, False], [3, 96, 96, 1, True], [3, 96, 96, 1, False]],
    ],
    "out_indices": [1, 2, 3, 4],
}
# the last of its stages sees 2 x 2 places; a larger window does not fit there
SWIN = {"embed_dim": 16, "num_heads": [1, 2, 4, 4], "window_size": 2}
MIMI = {"upsample_groups": 64, "num_filters": 8}
# twice as many layers as are put out, so that some can go
SPREAD_OUT = {"backbone_config": {"num_hidden_layers": 8, "out_indices": [2, 4, 6, 8]}}

# entries that a type's config needs, on top of the rule's; those of a part's type hold wherever it is a part
SETTINGS: dict[str, dict[str, Any]] = {
    "align": {"projection_dim": 80},
    "align_vision_model": EFFICIENTNET,
    "apertus1p5": {
        "text_config": {"vocab_size": 640},
        "image_token_id": 100,
        "audio_token_id": 101,
        "image_token_offset": 128,
        "audio_token_offset": 384,
    },
    "apertus1p5_vision_tokenizer": {"base_channels": 32, "latent_channels": 32, "num_res_blocks": 2},
    "autoformer": FORECAST,
    "bamba": {"num_hidden_layers": 6, "attn_layer_indices": [1, 2, 5]},
    "bit": {"num_groups": 8},
    "blenderbot": {"encoder_layers": 4},
    "blip-2": {"image_token_index": 310},
    "blt": {"encoder_hash_byte_group_vocab": 500, "use_cache": False},  # its config does not suit a cache
    "chameleon": {"vocabulary_map": PICTURE_WORDS, "image_token_id": 319},
    "chameleon_vqgan": {"base_channels": 32, "latent_channels": 32, "embed_dim": 32, "num_embeddings": 10},
    "chmv2": SPREAD_OUT,
    "clap": {"audio_config": {"hidden_size": 512}},
    "clvp": {"text_config": {"num_attention_heads": 2}, "speech_config": {"num_attention_heads": 2, "vocab_size": 320}},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [2, 3, 3]}}},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [2, 2, 3]},
    "dac": {"encoder_hidden_size": 8},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64},
    },
    "deepseek_ocr2_sam_vision_model": {"output_channels": 32, "downsample_channels": [64, 64]},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "depth_anything": SPREAD_OUT,
    "depth_pro": {"intermediate_hook_ids": [3, 1]},
    "diffusion_gemma": {"canvas_length": 16},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "donut-swin": SWIN,
    "dory": {
        "num_hidden_layers": 12,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 3,
        "n_input_layers": 4,
        "n_recurrent_layers": 4,
        "n_output_layers": 4,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim")},
        "swa_qk_nope_head_dim": 8,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "dpt": {"num_hidden_layers": 8, "backbone_out_indices": [1, 3, 5, 7]},
    "edgetam_vision_model": {
        "backbone_config": {
            "architecture": "test_resnet",
            "num_classes": 2,
            "model_args": {**BLOCKS, "in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
        },
        "backbone_channel_list": [96, 192, 48, 32],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "efficientloftr": {"out_features": [16, 16, 32, 64], "num_attention_heads": 8},
    "efficientnet": EFFICIENTNET,
    "emu3": {
        "vocabulary_map": {
            "<image>": 319,
            "<|extra_200|>": 318,
            **{f"<|visual token {i:06}|>": 300 + i for i in range(10)},
        }
    },
    "emu3_vqgan": {"base_channels": 32, "hidden_size": 128, "embed_dim": 32, "codebook_size": 10},
    "encodec": {"num_filters": 8},
    "eomt": {"num_hidden_layers": 6, "num_blocks": 2},
    "eomt_dinov3": {"num_hidden_layers": 6, "num_blocks": 2},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "esm": {"pad_token_id": 1, "mask_token_id": 32},
    "fast_vlm": {"vision_config": {"architecture": "fastvit_t8", "hidden_size": 768}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma3n": {
        "vision_soft_tokens_per_image": 4,
        "audio_soft_tokens_per_image": 16,
        "image_token_id": 260,
        "audio_token_id": 290,
        "vision_config": {"vocab_offset": 256, "vocab_size": 32},
        "audio_config": {"vocab_offset": 288, "vocab_size": 32},
    },
    "gemma3n_text": {"intermediate_size": 96, "num_kv_shared_layers": 2},
    "gemma3n_vision": {"architecture": "test_resnet", "model_args": BLOCKS, "hidden_size": 96},
    "gemma4_assistant": {
        "text_config": {
            **_layers("sliding_attention", "full_attention"),
            "num_kv_shared_layers": 6,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "glm_image": {"vq_config": {"latent_channels": 64, "num_embeddings": 256}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0], [2, 1]],
        "image_grid_pinpoints": [[64, 128], [128, 64]],
    },
    # halfway its encoder hears itself: with an odd depth it does so at the same place after one layer less
    "granite_speech5_encoder": {"num_hidden_layers": 5},
    "granitemoehybrid": _layers("linear_attention", "full_attention"),
    "hgnet_v2": {
        "hidden_sizes": [32, 64, 64, 64],
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 32, 64, 64],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [32, 64, 64, 64],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "hiera": {"embed_dim": 16},
    "informer": FORECAST,
    "inkling_vision": {"patch_size": 8},
    "instructblip": {"image_token_index": 310},
    "instructblipvideo": {"video_token_index": 310},
    "jamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1},
    "janus_vqgan": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 64},
    "lfm2_moe": _layers("conv", "full_attention"),
    "lightglue": {"depth_confidence": 1.0},  # random layers are sure of all at once, and the rest would not run
    "lighton_ocr": {"vision_config": {"head_dim": 16}},
    "lilt": {"hidden_size": 96},
    "llama4": {
        "vision_config": {
            "intermediate_size": 256,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
        }
    },
    "llava_next": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "longcat_flash": {"qk_head_dim": 32, "zero_expert_num": 2},
    "lw_detr": {"projector_scale_factors": [1.0], **SPREAD_OUT},
    "mamba2": {"num_heads": 8, "n_groups": 1},
    "maskformer-swin": SWIN,
    "mimi": {**MIMI, "vector_quantization_hidden_dimension": 64},
    "mimi_decoder": MIMI,
    "mimi_encoder": MIMI,
    "mimo_v2_flash": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            kind: {**ROPE, "partial_rotary_factor": 0.5} for kind in ("full_attention", "sliding_attention")
        },
    },
    "minicpm_ocr": {"image_token_id": 310},
    "minicpmv4_6": {"image_token_id": 310},
    "minicpmv4_7": {"image_token_id": 310},
    "mistral3": {"vision_config": {"head_dim": 16}},
    "mllama": {"vision_config": {"intermediate_layers_indices": [1, 3], "vision_output_dim": 192}},
    "molmo2": {
        "image_patch_id": 310,
        "adapter_config": {"vision_feature_layer": [3, 1]},
        "vision_config": {"image_size": [56, 56]},
    },
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "muse_glimmer": {"out_hidden_size": 256},
    "muse_spark": {"out_hidden_size": 256},
    "nemo_speechlm": {"audio_token_id": 310},
    "nemotron_h": {
        "n_groups": 1,
        "layers_block_type": in_turn("linear_attention", "moe", "full_attention", "mlp", layers=8),
    },
    "nemotron_h_omni": {"image_token_id": 310, "audio_token_id": 311},
    "neucodec": {"encoder_hidden_size": 8, "quantization_dim": 128},
    # the projection of its task is made only for another width, but asked for in any case
    "omdet-turbo": {
        "text_config": {"hidden_size": 48},
        "class_embed_dim": 48,
        "text_projection_in_dim": 48,
        "text_projection_out_dim": 48,
        "apply_layernorm_after_vision_backbone": False,
        "encoder_in_channels": [32, 48, 192],
        "vision_features_channels": [64, 64, 64],
    },
    # what fits the one width to the other is no module of the model, and not saved with it
    "oneformer": {"conv_dim": 64, "mask_dim": 64},
    "paddleocr_vl_text": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}},
    "pe_video_encoder": {"vision_config": TIMM_VIT},
    "perceiver": {"d_latents": 64, "num_latents": 16, "num_self_attends_per_block": 4},
    "perception_lm": {"vision_config": {**TIMM_VIT, "model_args": {"img_size": 64, "embed_dim": 64}}},
    "phi4_multimodal": {
        "vision_config": {"image_token_id": 310},
        "audio_config": {
            "audio_token_id": 311,
            "depthwise_separable_out_channel": 64,
            "ext_pw_out_channel": 64,
            "nemo_conv_channels": 64,
        },
    },
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "pocket_tts_audio_tokenizer": MIMI,
    "pocket_tts_audio_tokenizer_decoder": MIMI,
    "pocket_tts_audio_tokenizer_encoder": MIMI,
    "pp_doclayout_v2": {"encoder_in_channels": [64, 64, 64], "class_thresholds": [0.5, 0.5], "class_order": [0, 1]},
    "pp_doclayout_v3": {"encoder_in_channels": [64, 64, 64], "x4_feat_dim": 32},
    "pp_ocrv5_server_det": NECK,
    "pp_ocrv6_medium_det": {**NECK, "backbone_config": LCNET},
    "pp_ocrv6_small_det": {"backbone_config": LCNET, "layer_list_out_channels": [32, 48, 64, 96]},
    "prompt_depth_anything": SPREAD_OUT,
    "qwen3_omni_moe": {"talker_config": {"spatial_merge_size": 2}, "code2wav_config": {"decoder_dim": 128}},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    # without a seed for its hashes no two passes are alike
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16], "hash_seed": 1},
    "rf_detr": SPREAD_OUT,
    "sam": {"vision_config": {"output_channels": 64, "num_pos_feats": 32}},
    "sam2_hiera_det_model": {
        "hidden_size": 16,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 2, 3, 2],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 4],
        "global_attention_blocks": [4, 5],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}},
    "sam_hq": {"vision_config": {"output_channels": 64, "num_pos_feats": 32}, "mask_decoder_config": {"vit_dim": 64}},
    "sapiens2": {"head_config": {"upsample_out_channels": [32, 32], "conv_out_channels": [32]}},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 300, "no_token_index": 301},
    "step3p5": {"sliding_window": 8},
    "superglue": {
        "hidden_size": 64,
        "keypoint_encoder_sizes": [32, 64],
        "gnn_layers_types": ["self", "cross"] * 3,
        "keypoint_detector_config": {"descriptor_decoder_dim": 64},
    },
    "swin": SWIN,
    "swinv2": SWIN,
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}, "mm_tokens_per_image": 4},
    "time_series_transformer": FORECAST,
    "timm_backbone": {"backbone": "test_resnet"},
    "tipsv2_dpt": SPREAD_OUT,
    "tvp": {"visual_prompt_size": 8},
    "unlimited_ocr": {"vision_config": {"sam_config": {"output_channels": 32, "downsample_channels": [64, 64]}}},
    "uvdoc": {"backbone_config": {"out_indices": [1, 2, 3, 4, 5, 6]}},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 3200},
    "videomt": {"num_hidden_layers": 6, "num_blocks": 2},
    "vipllava": {"vision_feature_layers": [-1, -2, -3, -4, 2]},
    "vitpose": {"backbone_config": {"num_hidden_layers": 6, "out_indices": [4]}},
    "voxtral": {"audio_token_id": 310, "audio_config": {"intermediate_size": 256}},
    "wavtokenizer_encoder": {"num_filters": 8},
    "xcodec": {"codebook_dim": 320},
    "xcodec2": {"encoder_hidden_size": 8, "quantization_dim": 128},
    "xlstm": {"qk_dim_factor": 1.0},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 8,
        "layers_block_type": [*["linear_attention", "linear_attention", "hybrid"] * 2, "linear_attention", "hybrid"],
    },
    "zamba2": {"num_hidden_layers": 6, "layers_block_type": in_turn("linear_attention", "hybrid")},
    "zoedepth": {"bottleneck_features": 64, **SPREAD_OUT},
}
# the class to build, where it is not that of the first task: where the whole only generates, takes more than tensors or
# cannot run in this release, one that takes a part of the config
CLASSES: dict[str, str] = {
    "bark": "BarkSemanticModel",
    "llama4": "Llama4ForCausalLM",
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
    "sam3_video": "Sam3Model",
}
