"""The scripts that make ready what the speech recognition recipe is tried on: a converted model, and recordings."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, WhisperProcessor

from tests.speech import HEADS, whisper, whisper_tokenizer

SCRIPTS = Path(__file__).parents[2] / "model_cards"
VOCAB, END = 51864, 50256  # of English-only Whispers
TYPES = {"float32": 0, "int8": 1, "float16": 4}


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"model_cards_{name}", SCRIPTS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look their module up
    spec.loader.exec_module(found)
    return found


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def write_model(path: Path, arrays: dict[str, np.ndarray], version: int = 6) -> None:
    """A file as CTranslate2 writes it."""
    with path.open("wb") as file:
        file.write(struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(arrays)))
        for name, value in arrays.items():
            file.write(text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape))
            content = value.tobytes()
            file.write(struct.pack("<BI", TYPES.get(str(value.dtype), 2), len(content)) + content)
        file.write(struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight"))


def converted(model: torch.nn.Module, dtype: str) -> dict[str, np.ndarray]:
    """The arrays that CTranslate2's converter makes of a model: queries, keys (whose bias is zero) and values fused."""
    state = {name: value.detach().numpy().astype(dtype) for name, value in model.state_dict().items()}
    found: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}

    def put(theirs: str, *ours: str) -> None:
        found[f"{theirs}/weight"] = np.concatenate([state[f"{name}.weight"] for name in ours])
        biases = [state.get(f"{name}.bias", np.zeros(len(state[f"{name}.weight"]), dtype)) for name in ours]
        found[f"{theirs}/bias"] = np.concatenate(biases)

    def norm(theirs: str, ours: str) -> None:
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for side in ("encoder", "decoder"):
        found[f"{side}/num_heads"] = np.array(4, np.int16)
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(len(model.get_submodule(f"model.{side}.layers"))):
            theirs, ours = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            own = f"{ours}.self_attn"
            norm(f"{theirs}/self_attention/layer_norm", f"{own}_layer_norm")
            put(f"{theirs}/self_attention/linear_0", f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
            put(f"{theirs}/self_attention/linear_1", f"{own}.out_proj")
            if side == "decoder":
                own = f"{ours}.encoder_attn"
                norm(f"{theirs}/attention/layer_norm", f"{own}_layer_norm")
                put(f"{theirs}/attention/linear_0", f"{own}.q_proj")
                put(f"{theirs}/attention/linear_1", f"{own}.k_proj", f"{own}.v_proj")
                put(f"{theirs}/attention/linear_2", f"{own}.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            put(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            put(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for name in ("conv1", "conv2"):
        found[f"encoder/{name}/weight"] = state[f"model.encoder.{name}.weight"]
        found[f"encoder/{name}/bias"] = state[f"model.encoder.{name}.bias"]
    return found


@pytest.fixture
def made(tmp_path):
    tokens = {"pad_token_id": END, "bos_token_id": END, "eos_token_id": END, "decoder_start_token_id": END + 1}
    model = whisper(vocab_size=VOCAB, **tokens)
    whisper_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # there is tokenizer.json alone
    told = {"alignment_heads": HEADS, "suppress_ids": [1, 2], "suppress_ids_begin": [220], "lang_ids": [50259]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    return model, tmp_path


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_converted_whisper_is_turned_back(made, dtype, monkeypatch, capsys):
    model, folder = made
    write_model(folder / "model.bin", converted(model, dtype))
    output = folder / "output"
    monkeypatch.setattr(sys, "argv", ["script", str(folder), str(output)])
    module("whisper_from_ctranslate2").main()
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out
    found = AutoModelForSpeechSeq2Seq.from_pretrained(output).eval()
    assert found.dtype == torch.float32
    wanted = {name: value.to(getattr(torch, dtype)).float() for name, value in model.state_dict().items()}
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    generator = torch.Generator().manual_seed(0)
    batch = {"input_features": torch.randn(2, 8, 100, generator=generator)}
    batch["decoder_input_ids"] = torch.randint(0, VOCAB, (2, 5), generator=generator)
    with torch.no_grad():
        one, other = found(**batch).logits, model(**batch).logits
    assert torch.equal(one, other) if dtype == "float32" else (one - other).abs().max() < 0.1 * other.abs().max()
    told = found.generation_config
    assert told.alignment_heads == HEADS and told.suppress_tokens == [1, 2] and not told.is_multilingual
    assert (told.decoder_start_token_id, told.no_timestamps_token_id, told.prev_sot_token_id) == (50257, 50362, 50360)
    tokenizer = WhisperProcessor.from_pretrained(output).tokenizer
    assert len(tokenizer) == len(whisper_tokenizer()) and tokenizer.pad_token == "<|endoftext|>"


def test_what_cannot_be_turned_back_is_refused(made):
    model, folder = made
    script, arrays = module("whisper_from_ctranslate2"), converted(model, "float32")
    read, path = script.read_variables, folder / "model.bin"
    write_model(path, arrays, version=5)
    with pytest.raises(ValueError, match="file format 5"):
        read(path)
    write_model(path, arrays)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="ends too early"):
        read(path)
    told = json.loads((folder / "config.json").read_text())
    name = "encoder/layer_0/ffn/linear_0/weight"
    with pytest.raises(ValueError, match=f"{name} is int8"):
        script.model_of({**arrays, name: arrays[name].astype(np.int8)}, told)
    with pytest.raises(ValueError, match="the keys have a bias"):
        bias = "encoder/layer_0/self_attention/linear_0/bias"
        script.model_of({**arrays, bias: arrays[bias] + 1}, told)
    with pytest.raises(ValueError, match="multilingual"):
        wide = np.zeros((51865, 32), np.float32)
        script.model_of({**arrays, "decoder/embeddings/weight": wide}, told)


TRANSCRIPTS = """; Core Asterisk Sounds in English

hello: Hello  world...
again: hello, world
beep: [this is a simple beep tone]
silence/1: (1 second of silence)
letters/a: a
keys: press * to pause
gone: Not here.
spy-iax2: IAX (note: does not say "2")
"""


def test_prompts_that_say_nothing_or_something_else_are_left_out(tmp_path, monkeypatch, capsys):
    script = module("prompts_from_asterisk")
    assert script.transcripts(TRANSCRIPTS) == {"hello": "Hello world", "again": "hello, world", "gone": "Not here."}
    more = "".join(f"digits/{index}: number {index} is said\n" for index in range(40))
    with gzip.open(tmp_path / "texts.gz", "wt") as file:
        file.write(TRANSCRIPTS + more)
    sounds = tmp_path / "sounds"
    (sounds / "digits").mkdir(parents=True)
    for name in ("hello", "again", "beep", *(f"digits/{index}" for index in range(40))):
        (sounds / f"{name}.wav").write_bytes(name.encode())
    output = tmp_path / "output"
    given = [str(output), "--sounds", str(sounds), "--transcripts", str(tmp_path / "texts.gz")]
    monkeypatch.setattr(sys, "argv", ["script", *given])
    script.main()
    shown, parts = capsys.readouterr().out, {}
    for use in ("train", "validation", "test"):
        with (output / f"{use}.csv").open(newline="") as file:
            parts[use] = list(csv.DictReader(file))
        assert f"{use}: {len(parts[use])} prompts" in shown
    assert sum(map(len, parts.values())) == 42 and all(parts.values())
    for rows in parts.values():
        for row in rows:
            assert (output / row["audio"]).read_bytes().decode() == row["audio"][7:-4]
    said = [{script.words_of(row["text"]) for row in rows} for rows in parts.values()]
    assert not (said[0] & said[1] or said[0] & said[2] or said[1] & said[2])
