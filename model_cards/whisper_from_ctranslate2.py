"""Turn a Whisper that was converted for CTranslate2 (faster-whisper) back into a checkpoint of transformers.

    python model_cards/whisper_from_ctranslate2.py FOLDER OUTPUT

FOLDER holds model.bin, config.json and tokenizer.json. Weights must be floating numbers, which become float32. Names,
fused maps and the file's layout are those of CTranslate2 4 (its `specs` and `converters/transformers.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

VERSION, SPEC, REVISION = 6, "WhisperSpec", 3
_TYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by their number in the file
_FLOATS = (np.float32, np.float16)


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a model.bin by name, aliases too.

    Raises:
        ValueError: if it is not a Whisper's, of another version, or ends too early.
    """
    with path.open("rb") as file:
        (version,), kind, (revision,) = _unpack(file, "I"), _text(file), _unpack(file, "I")
        if (version, kind, revision) != (VERSION, SPEC, REVISION):
            raise ValueError(
                f"{path} is of {kind} {revision} in the file format {version}. This reads {SPEC} {REVISION} in format "
                f"{VERSION}: convert the model again by CTranslate2 4."
            )
        found = {}
        for _ in range(*_unpack(file, "I")):
            name, (dimensions,) = _text(file), _unpack(file, "B")
            shape, (number,), (size,) = _unpack(file, "I" * dimensions), _unpack(file, "B"), _unpack(file, "I")
            if number >= len(_TYPES):
                raise ValueError(f"{path}: {name} is of the type {number}. Convert it with float16 or float32 weights.")
            found[name] = np.frombuffer(_read(file, size), _TYPES[number]).reshape(shape)
        for _ in range(*_unpack(file, "I")):
            alias, name = _text(file), _text(file)
            found[alias] = found[name]
    return found


def model_of(variables: Mapping[str, np.ndarray], told: Mapping[str, Any]) -> WhisperForConditionalGeneration:
    """The model of these arrays; `told` is CTranslate2's config.json.

    Raises:
        ValueError: if weights are quantized, or some are left over or missing.
    """
    strange = [name for name, value in variables.items() if value.ndim and value.dtype not in _FLOATS]
    if strange:
        raise ValueError(f"{strange[0]} is {variables[strange[0]].dtype}. Quantized weights cannot be turned back.")
    config = _config(variables)
    model = WhisperForConditionalGeneration(config)
    state = {name: tensor.float() for name, tensor in _state(variables, config).items()}
    model.load_state_dict(state)  # strict: all that there are, and no other
    model.generation_config = _generation(config, told)
    return model.eval()


def processor_of(folder: Path, config: WhisperConfig) -> WhisperProcessor:
    """Tokenizer and feature extractor."""
    tokenizer = WhisperTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")  # as OpenAI's on the Hub
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=config.num_mel_bins), tokenizer)


def _config(variables: Mapping[str, np.ndarray]) -> WhisperConfig:
    """Told by the shapes; the tokens are Whisper's, which stand behind those of the text in a fixed order."""
    vocab, width = variables["decoder/embeddings/weight"].shape
    end = 50257 if vocab >= 51865 else 50256  # English-only models have one text token less
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        layers = {name.split("/")[1] for name in variables if re.match(rf"{side}/layer_\d+/", name)}
        sides[f"{side}_layers"] = len(layers)
        sides[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        sides[f"{side}_ffn_dim"] = len(variables[f"{side}/layer_0/ffn/linear_0/weight"])
    return WhisperConfig(
        **sides,
        vocab_size=vocab,
        d_model=width,
        num_mel_bins=variables["encoder/conv1/weight"].shape[1],
        max_source_positions=len(variables["encoder/position_encodings/encodings"]),
        max_target_positions=len(variables["decoder/position_encodings/encodings"]),
        decoder_start_token_id=end + 1,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )


def _generation(config: WhisperConfig, told: Mapping[str, Any]) -> GenerationConfig:
    """Without languages and tasks: those of English-only models."""
    if config.vocab_size >= 51865:
        raise ValueError(f"{config.vocab_size} tokens are those of a multilingual Whisper. Give an English-only one.")
    first = config.decoder_start_token_id
    return GenerationConfig(
        alignment_heads=told["alignment_heads"],
        suppress_tokens=told["suppress_ids"],
        begin_suppress_tokens=told["suppress_ids_begin"],
        bos_token_id=first,
        decoder_start_token_id=first,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        prev_sot_token_id=first + 103,
        no_timestamps_token_id=first + 105,
        max_initial_timestamp_index=50,
        max_length=config.max_target_positions,
        is_multilingual=False,
        return_timestamps=False,
    )


def _state(variables: Mapping[str, np.ndarray], config: WhisperConfig) -> dict[str, Tensor]:
    """The tensors by their names in transformers. Queries, keys and values lie in one map there; keys have no bias."""
    arrays = {name: torch.from_numpy(value.copy()) for name, value in variables.items() if value.ndim}
    found: dict[str, Tensor] = {"proj_out.weight": arrays["decoder/embeddings/weight"]}

    def take(ours: str, theirs: str, weight: str = "weight", bias: str = "bias") -> None:
        found[f"{ours}.weight"], found[f"{ours}.bias"] = arrays[f"{theirs}/{weight}"], arrays[f"{theirs}/{bias}"]

    def attention(ours: str, theirs: str, norm: str, fused: list[list[str]]) -> None:
        take(norm, f"{theirs}/layer_norm", "gamma", "beta")
        for number, names in enumerate(fused):
            for kind in ("weight", "bias"):
                parts = arrays[f"{theirs}/linear_{number}/{kind}"].chunk(len(names))
                found.update({f"{ours}.{name}.{kind}": part for name, part in zip(names, parts, strict=True)})
        if found.pop(f"{ours}.k_proj.bias").any():
            raise ValueError(f"{theirs}: the keys have a bias, which Whisper's have not.")

    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = arrays[f"{side}/position_encodings/encodings"]
        take(f"model.{side}.layer_norm", f"{side}/layer_norm", "gamma", "beta")
        for index in range(getattr(config, f"{side}_layers")):
            ours, theirs = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            fused = [["q_proj", "k_proj", "v_proj"], ["out_proj"]]
            attention(f"{ours}.self_attn", f"{theirs}/self_attention", f"{ours}.self_attn_layer_norm", fused)
            if side == "decoder":
                fused = [["q_proj"], ["k_proj", "v_proj"], ["out_proj"]]
                attention(f"{ours}.encoder_attn", f"{theirs}/attention", f"{ours}.encoder_attn_layer_norm", fused)
            take(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", "gamma", "beta")
            take(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            take(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
    for name in ("conv1", "conv2"):
        take(f"model.encoder.{name}", f"encoder/{name}")
    found["model.decoder.embed_tokens.weight"] = arrays["decoder/embeddings/weight"]
    return found


def _unpack(file: BinaryIO, kinds: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{kinds}", _read(file, struct.calcsize(f"<{kinds}")))


def _text(file: BinaryIO) -> str:
    return _read(file, *_unpack(file, "H"))[:-1].decode()  # a zero ends it


def _read(file: BinaryIO, size: int) -> bytes:
    found = file.read(size)
    if len(found) < size:
        raise ValueError("The file ends too early: it is no whole model.bin.")
    return found


def main() -> None:
    """Convert one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the converted model")
    parser.add_argument("output", type=Path, help="folder for the checkpoint")
    args = parser.parse_args()
    told = json.loads((args.folder / "config.json").read_text("utf-8"))
    model = model_of(read_variables(args.folder / "model.bin"), told)
    processor = processor_of(args.folder, model.config)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    sys.stdout.write(f"{args.output}: {model.num_parameters():,} parameters\n")


if __name__ == "__main__":
    main()
