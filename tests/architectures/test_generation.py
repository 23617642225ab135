"""Generation settings that name decoder layers keep naming the same heads of the same original layers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import load_pruned, remove_blocks
from deeparc_hf.architectures import Layout, describe
from deeparc_hf.architectures.generation import follow_generation
from deeparc_hf.core.transaction import Transaction
from deeparc_hf.errors import DeepArcWarning, SurgeryError
from tests import speech
from tests.zoo import WHISPER, ZOO, spread

DECODER, ENCODER = "model.decoder.layers", "model.encoder.layers"
HEADS = [[0, 1], [1, 2], [2, 0], [2, 3], [4, 1]]
CONFIG = {**WHISPER, "decoder_layers": 5}


def whisper(heads: list[list[int]] = HEADS) -> nn.Module:
    torch.manual_seed(0)
    model = spread(tf.WhisperForConditionalGeneration(tf.WhisperConfig(**CONFIG))).eval()
    model.generation_config.alignment_heads = copy.deepcopy(heads)
    model.generation_config._from_model_config = False  # as a checkpoint's own generation_config.json
    return model


def named(model: nn.Module, original: list[nn.Module]) -> list[tuple[int, int]]:
    """The heads as (index of the original layer, head)."""
    layers = list(model.model.decoder.layers)
    return [(original.index(layers[layer]), head) for layer, head in model.generation_config.alignment_heads]


@pytest.mark.parametrize("gone", [[1], [0, 2], [3], [1, 2, 3]])
def test_heads_of_kept_layers_stay_the_same_heads(gone, tmp_path):
    model = whisper()
    original = list(model.model.decoder.layers)
    remove_blocks(model, {DECODER: gone})
    expected = [tuple(pair) for pair in HEADS if pair[0] not in gone]
    assert named(model, original) == expected
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text("utf-8"))["alignment_heads"]
    assert stored == model.generation_config.alignment_heads
    again = tf.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert again.generation_config.alignment_heads == stored
    second = [index for index in range(len(again.model.decoder.layers)) if index > 0][:1]
    kept = [layer for layer in range(5) if layer not in gone]
    remove_blocks(again, {DECODER: second})
    lost = kept[second[0]]
    left = [layer for layer in kept if layer != lost]
    assert [(left[layer], head) for layer, head in again.generation_config.alignment_heads] == [
        p for p in expected if p[0] != lost
    ]


def test_blocks_of_the_encoder_do_not_count():
    model = whisper()
    remove_blocks(model, {ENCODER: [1]})
    assert model.generation_config.alignment_heads == HEADS


def test_where_no_head_is_left_the_entry_goes_and_it_is_said():
    model = whisper([[1, 0], [1, 2]])
    with pytest.warns(DeepArcWarning, match=r"word timestamps .*no longer possible\. Keep one of the blocks \[1\]"):
        remove_blocks(model, {DECODER: [1]})
    assert not hasattr(model.generation_config, "alignment_heads")


def test_word_timestamps_are_made_of_the_heads_that_are_left():
    model = whisper()
    remove_blocks(model, {DECODER: [4]})  # the stock code would ask for layer 4 of 4
    features = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
    found = model.generate(
        features,
        attention_mask=torch.ones(1, 32, dtype=torch.long),
        return_token_timestamps=True,
        max_new_tokens=4,
        num_beams=1,
        use_cache=True,
    )
    assert torch.isfinite(found["token_timestamps"]).all()


class Skipped(nn.Module):
    """A block whose attention is still seen, and whose output is its input."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states, *args, **kwargs):
        output = self.block(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states


@pytest.mark.parametrize("gone", [{DECODER: [1]}, {DECODER: [0, 2]}, {ENCODER: [1, 2], DECODER: [2]}])
def test_words_have_the_times_of_the_whole_model_with_the_blocks_skipped(gone):
    """The whole model's heads keep their numbers, but for those of the skipped blocks: nothing there is renumbered."""
    processor, whole = speech.whisper_processor(), speech.whisper(seed=1)
    pruned = copy.deepcopy(whole)
    remove_blocks(pruned, gone)
    for name, indices in gone.items():
        blocks = whole.get_submodule(name)
        for index in indices:
            blocks[index] = Skipped(blocks[index])
    heads = [pair for pair in speech.HEADS if pair[0] not in gone[DECODER]]
    assert 0 < len(heads) < len(speech.HEADS)
    whole.generation_config.alignment_heads = heads
    misread = copy.deepcopy(pruned)
    others = [[layer, head] for layer in range(len(pruned.model.decoder.layers)) for head in range(4)]
    misread.generation_config.alignment_heads = [
        pair for pair in others if pair not in pruned.generation_config.alignment_heads
    ]
    found = [words_heard(model, processor) for model in (pruned, whole, misread)]
    assert found[0] == found[1] and len({end for _, _, end in found[0]}) > 2
    assert found[0] != found[2]  # other heads give other times
    times = [token_times(model, processor) for model in (pruned, whole)]
    assert torch.equal(times[0]["sequences"], times[1]["sequences"])
    assert torch.equal(times[0]["token_timestamps"], times[1]["token_timestamps"])


def words_heard(model: nn.Module, processor: tf.WhisperProcessor) -> list[tuple[str, float, float]]:
    """The words of a recording with their times, by transformers' pipeline."""
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    pipe = tf.pipeline("automatic-speech-recognition", model, **parts)
    recording = {"raw": speech.sound_of("press one and star", seconds=0.9), "sampling_rate": speech.RATE}
    return [(word["text"], *word["timestamp"]) for word in pipe(recording, return_timestamps="word")["chunks"]]


def token_times(model: nn.Module, processor: tf.WhisperProcessor) -> dict[str, torch.Tensor]:
    sounds = [speech.sound_of(text, seconds=0.9) for text in ("press one", "three")]
    inputs = processor.feature_extractor(
        sounds, sampling_rate=speech.RATE, return_tensors="pt", return_attention_mask=True
    )
    return model.generate(**inputs, return_timestamps=True, return_token_timestamps=True)


def test_a_generation_config_that_others_hold_is_left_alone_and_comes_back():
    model = whisper()
    shared = model.generation_config
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    undo = Transaction()
    follow_generation(host.root, stacks, Layout.without(subject.lengths, {DECODER: [1]}), undo)
    assert model.generation_config.alignment_heads == [[0, 1], [1, 0], [1, 3], [3, 1]]
    assert shared.alignment_heads == HEADS
    undo.roll_back()
    assert model.generation_config is shared


def test_a_refused_removal_leaves_the_heads(monkeypatch):
    model = whisper()
    shared = model.generation_config

    def fail(self: object) -> None:
        raise SurgeryError("no")

    monkeypatch.setattr("deeparc_hf.pruning.verify.Expectation.check", fail)
    with pytest.raises(SurgeryError):
        remove_blocks(model, {DECODER: [1]})
    assert model.generation_config is shared
    assert shared.alignment_heads == HEADS


def test_a_load_by_record_renumbers_the_heads_of_the_base(tmp_path):
    model = whisper()
    model.save_pretrained(tmp_path / "base")
    record = remove_blocks(model, {DECODER: [1]})
    loaded = load_pruned(tf.AutoModelForSpeechSeq2Seq, tmp_path / "base", record)
    assert (
        loaded.generation_config.alignment_heads
        == model.generation_config.alignment_heads
        == [[0, 1], [1, 0], [1, 3], [3, 1]]
    )


def test_other_settings_that_may_name_blocks_are_named():
    model = ZOO["gpt2"].model()
    model.generation_config.assistant_early_exit = 3
    with pytest.warns(
        DeepArcWarning,
        match=r"generation_config\.assistant_early_exit = 3 may name blocks.*the 3 blocks of transformer\.h",
    ):
        remove_blocks(model, {"transformer.h": [1]})
    assert model.generation_config.assistant_early_exit == 3


def test_heads_beyond_the_decoder_are_not_touched():
    model = whisper([[0, 1], [7, 1]])
    with pytest.warns(DeepArcWarning, match="alignment_heads = .* may name blocks"):
        remove_blocks(model, {DECODER: [1]})
    assert model.generation_config.alignment_heads == [[0, 1], [7, 1]]
