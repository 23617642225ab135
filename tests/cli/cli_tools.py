"""Tiny checkpoints with a real tokenizer, real data files, and a runner, for the tests of the command line."""

from __future__ import annotations

import json
import random

import datasets
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from deeparc_hf import save_pruned
from deeparc_hf.cli import main
from tests.zoo import ZOO

WORDS = [f"w{i}" for i in range(100)]


def tokenizer() -> tf.PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[EOS]": 2, **{word: i + 5 for i, word in enumerate(WORDS)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=16
    )


@pytest.fixture(scope="session")
def own_cache(tmp_path_factory):
    """Converted data sets go into a folder of the test run, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, own_cache):
    """Folders of tiny checkpoints by name."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("bert", "gpt2", "t5"):
        ZOO[name].model().save_pretrained(root / name)
        tokenizer().save_pretrained(root / name)
    ZOO["vit"].model().save_pretrained(root / "vit")
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    save_pruned(ZOO["timm_vit"].model(), root / "timm")
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory, own_cache):
    """The same 64 texts as csv, tsv, jsonl, parquet and txt, and a folder of 40 images."""
    root = tmp_path_factory.mktemp("data")
    choose = random.Random(0)
    rows = [
        {
            "text": " ".join(choose.choices(WORDS, k=choose.randint(4, 12))),
            "label": i % 2,
            "answer": " ".join(choose.choices(WORDS, k=4)),
        }
        for i in range(64)
    ]
    for suffix, sep in (("csv", ","), ("tsv", "\t")):
        lines = [sep.join(map(str, row.values())) for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]]
        (root / f"d.{suffix}").write_text("\n".join(lines) + "\n", "utf-8")
    (root / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (root / "d.txt").write_text("\n".join(row["text"] for row in rows), "utf-8")
    datasets.Dataset.from_list(rows).to_parquet(root / "d.parquet")
    generator = torch.Generator().manual_seed(0)
    for i in range(40):
        folder = root / "images" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        mode, shape = ("L", (32, 32)) if i % 5 == 0 else ("RGB", (32, 32, 3))  # grey pictures turn up in real folders
        Image.fromarray(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy(), mode).save(
            folder / f"{i}.png"
        )
    return root


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout, and the lines of stderr that the command itself wrote."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def error_of(capsys, *arguments) -> str:
    code, out, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert err.rstrip().endswith(lines[0])
    assert "Traceback" not in out + err
    return lines[0]
