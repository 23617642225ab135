"""A tiny Whisper that is English-only or multilingual, with its tokenizer and feature extractor, and recordings."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from tokenizers import pre_tokenizers

from .zoo import WHISPER, spread

LANGUAGES = ["en", "zh", "de"]  # in Whisper's order, which tells their tokens
HEADS = [[0, 1], [1, 2], [2, 0], [3, 3], [3, 1]]
WORDS = ["one", "two", "three", "four", "press", "star"]
RATE, CHUNK = 16_000, 1  # a second is heard at once: 100 frames


def whisper_tokenizer(multilingual: bool = False) -> tf.WhisperTokenizer:
    """Tokens of one byte each, those of Whisper's kind, and timestamps."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    told = [f"<|{name}|>" for name in ["endoftext", "startoftranscript", *(LANGUAGES if multilingual else [])]]
    told += [f"<|{name}|>" for name in ["translate", "transcribe", "startoflm", "startofprev", "nospeech"]]
    told += ["<|notimestamps|>"]
    vocab = {token: index for index, token in enumerate([*letters, *told])}
    tokenizer = tf.WhisperTokenizer(vocab, [], pad_token=told[0])
    tokenizer.add_special_tokens({"additional_special_tokens": told[1:]})
    tokenizer.add_tokens([f"<|{index * 0.02:.2f}|>" for index in range(int(CHUNK / 0.02) + 1)])
    return tokenizer


def whisper(multilingual: bool = False, seed: int = 0, **settings: Any) -> tf.WhisperForConditionalGeneration:
    """A Whisper with random weights that fits the tokenizer, with a generation config such as a checkpoint's."""
    tokenizer = whisper_tokenizer(multilingual)
    ids = tokenizer.convert_tokens_to_ids
    end, start = ids("<|endoftext|>"), ids("<|startoftranscript|>")
    known = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    shape = {"decoder_layers": 4, "vocab_size": len(tokenizer), "max_source_positions": 50, "max_target_positions": 64}
    torch.manual_seed(seed)
    config = tf.WhisperConfig(**{**WHISPER, **known, **shape, **settings})
    model = spread(tf.WhisperForConditionalGeneration(config)).eval()
    more: dict[str, Any] = {"is_multilingual": multilingual, "no_timestamps_token_id": ids("<|notimestamps|>")}
    if multilingual:
        more["lang_to_id"] = {f"<|{name}|>": ids(f"<|{name}|>") for name in LANGUAGES}
        more["task_to_id"] = {name: ids(f"<|{name}|>") for name in ("transcribe", "translate")}
    model.generation_config = tf.GenerationConfig(
        **known,
        **more,
        alignment_heads=HEADS,
        prev_sot_token_id=ids("<|startofprev|>"),
        max_initial_timestamp_index=25,
        max_length=64,
        return_timestamps=False,
    )
    return model


def whisper_processor(multilingual: bool = False) -> tf.WhisperProcessor:
    """Tokenizer and feature extractor of these."""
    extractor = tf.WhisperFeatureExtractor(feature_size=WHISPER["num_mel_bins"], chunk_length=CHUNK)
    return tf.WhisperProcessor(extractor, whisper_tokenizer(multilingual))


def sound_of(text: str, rate: int = RATE, seconds: float = 0.6) -> np.ndarray:
    """A tone for each letter, one after another."""
    steps = np.arange(int(rate * seconds))
    letters = [ord(letter) for letter in text]
    pitch = np.array([200 + 25 * (letter % 40) for letter in letters])[steps * len(letters) // len(steps)]
    return (0.3 * np.sin(2 * math.pi * pitch * steps / rate)).astype(np.float32)


def make_speech(folder: Path, multilingual: bool = False, **settings: Any) -> dict[str, Any]:
    """A model in `model`, and train.csv, validation.csv and test.csv of recordings in `sounds`, 8 kHz; the arguments
    that name them.
    """
    import soundfile

    whisper(multilingual, **settings).save_pretrained(folder / "model")
    whisper_processor(multilingual).save_pretrained(folder / "model")
    (folder / "sounds").mkdir()
    draw = random.Random(0)
    for name, count in {"train": 64, "validation": 8, "test": 10}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["audio", "text"])
            for index in range(count):
                text = " ".join(draw.choice(WORDS) for _ in range(2))
                place = f"sounds/{name}-{index}.wav"
                soundfile.write(folder / place, sound_of(text, 8000), 8000)
                writer.writerow([place, text.capitalize() + "."])
    files = {f"{use}_file": folder / f"{use}.csv" for use in ("train", "validation", "test")}
    return {"model": folder / "model", **files}
