"""Inputs are made up for most kinds of models, are valid and long enough; where they cannot be, there are none, and
nothing is raised.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import remove_blocks
from deeparc_hf.architectures import describe, find_host
from deeparc_hf.architectures.inputs import main_input, most_positions
from tests.zoo import IMAGE, SEQ2SEQ, TEXT, ZOO

PLAIN = {key: value for key, value in TEXT.items() if key != "vocab_size"}
SPEECH = {
    **SEQ2SEQ,
    "conv_channels": 16,
    "input_feat_per_channel": 8,
    "max_source_positions": 64,
    "max_target_positions": 24,
}
BIG = {**TEXT, "block_size": 4, "num_random_blocks": 1}
VJEPA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": 4,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 4,
    "pred_num_hidden_layers": 2,
}


def vision_tower() -> nn.Module:
    """A tower that is a model of its own, and takes packed patches under names of its own."""
    vision = {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [],
    }
    return tf.AutoModel.from_config(tf.Qwen2_5_VLConfig(vision_config=vision).vision_config)


# the model, and the input that counts with its shape
VALID: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "canine": (lambda: tf.CanineForSequenceClassification(tf.CanineConfig(**PLAIN)), "input_ids", (1, 128)),
    "canine of few positions": (
        lambda: tf.CanineForSequenceClassification(tf.CanineConfig(**PLAIN, num_hash_buckets=64)),
        "input_ids",
        (1, 62),
    ),
    "speech_to_text": (
        lambda: tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(**SPEECH)),
        "input_features",
        (1, 64, 8),
    ),
    "wav2vec2-bert": (lambda: tf.Wav2Vec2BertForCTC(tf.Wav2Vec2BertConfig(**TEXT)), "input_features", (1, 64, 160)),
    "wav2vec2": (
        lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**TEXT, conv_dim=[16] * 7)),
        "input_values",
        (1, 5 * 2**6 * 32 + 10),
    ),
    "audio-spectrogram-transformer": (
        lambda: tf.ASTForAudioClassification(tf.ASTConfig(**PLAIN, max_length=64, num_mel_bins=32)),
        "input_values",
        (1, 64, 32),
    ),
    "videomae": (
        lambda: tf.VideoMAEForVideoClassification(tf.VideoMAEConfig(**IMAGE, num_frames=4)),
        "pixel_values",
        (1, 4, 3, 32, 32),
    ),
    "timesformer": (
        lambda: tf.TimesformerForVideoClassification(tf.TimesformerConfig(**IMAGE, num_frames=4)),
        "pixel_values",
        (1, 4, 3, 32, 32),
    ),
    "vjepa2": (lambda: tf.VJEPA2Model(tf.VJEPA2Config(**VJEPA)), "pixel_values_videos", (1, 4, 3, 32, 32)),
    "idefics3_vision": (
        lambda: tf.AutoModel.from_config(tf.AutoConfig.for_model("idefics3_vision", **IMAGE)),
        "pixel_values",
        (1, 3, 32, 32),
    ),
    "bigbird, longer than its blocks": (
        lambda: tf.BigBirdForSequenceClassification(tf.BigBirdConfig(**BIG)),
        "input_ids",
        (1, 32),
    ),
    "few positions": (
        lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT, max_position_embeddings=20)),
        "input_ids",
        (1, 18),
    ),
    "wrapped_vit": (ZOO["wrapped_vit"].make, "pixel_values", (1, 3, 32, 32)),
    "bert": (ZOO["bert"].make, "input_ids", (1, 128)),
}
NONE: dict[str, Callable[[], nn.Module]] = {
    "bark": lambda: tf.BarkModel(tf.BarkConfig()),
    "a vision tower": vision_tower,
    "patchtst": lambda: tf.PatchTSTForPrediction(tf.PatchTSTConfig()),
}


@pytest.mark.parametrize("name", VALID)
def test_made_up_inputs_are_valid(name):
    make, key, shape = VALID[name]
    model = make().eval()
    inputs = find_host(model).example_inputs()
    assert inputs is not None and tuple(inputs[key].shape) == shape
    kind = getattr(getattr(model, "bert", None), "attention_type", None)
    with torch.no_grad():
        assert len(model(**inputs)) > 0
    assert getattr(getattr(model, "bert", None), "attention_type", None) == kind


@pytest.mark.parametrize("name", NONE)
def test_where_nothing_is_known_there_are_no_inputs(name):
    with torch.device("meta"):
        model = NONE[name]()
    assert find_host(model).example_inputs() is None


def test_a_config_that_holds_nonsense_raises_nothing():
    model = ZOO["vit"].model()
    model.config.__dict__["image_size"] = object()
    assert find_host(model).example_inputs() is None


@pytest.mark.parametrize("freeze", ["none", "partial"])
@pytest.mark.parametrize("name", ["canine", "speech_to_text"])
def test_models_without_a_vocabulary_or_mels_are_pruned(name, freeze):
    model = VALID[name][0]().eval()
    stack = next(iter(describe(model).stacks))
    remove_blocks(model, {stack: [2]}, freeze)
    assert len(model.get_submodule(stack)) == 3


def test_the_first_of_several_main_inputs_counts():
    assert isinstance(tf.OneFormerForUniversalSegmentation.main_input_name, list)
    assert main_input(tf.OneFormerForUniversalSegmentation) == "pixel_values"
    assert main_input(tf.BertModel) == "input_ids"


def test_two_configs_of_text_are_told_apart():
    """MusicGen has a text encoder, and a decoder of music that looks like one of text."""
    text, sound, music = tf.T5Config(n_positions=77), tf.EncodecConfig(), tf.MusicgenDecoderConfig()
    config = tf.MusicgenConfig(text_encoder=text, audio_encoder=sound, decoder=music)
    with pytest.raises(ValueError, match="ambiguous"):
        config.get_text_config()
    assert most_positions(config) == most_positions(text)
