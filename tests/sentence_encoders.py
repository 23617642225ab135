"""Tiny models of sentence-transformers, and a process that has never heard of deeparc_hf to load them in."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import sentence_transformers as st
import torch
import transformers as tf
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

from tests.publishing import WORDS, tiny_tokenizer
from tests.zoo import TEXT, VOCAB, spread

STACK = "encoder.layer"
_STOCK = """
import json, os, sys
class Refuser:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deeparc_hf" and not os.environ.get("STOCK_PACKAGE"):
            raise ImportError("there is no deeparc_hf here")
sys.meta_path.insert(0, Refuser())
if os.environ.get("STOCK_PACKAGE"):
    sys.path.insert(0, os.environ["STOCK_PACKAGE"])
    import deeparc_hf
import torch, sentence_transformers as st
torch.set_num_threads(1)
found = []
for kind, folder, texts in json.load(sys.stdin):
    model = getattr(st, kind)(folder, device="cpu")
    if kind == "CrossEncoder":
        values = torch.as_tensor(model.predict([tuple(pair) for pair in texts]))
    else:
        values = model.encode(texts, convert_to_tensor=True)
        values = values.to_dense() if values.is_sparse else values
    found.append([[type(module).__name__ for module in model], values.tolist()])
assert os.environ.get("STOCK_PACKAGE") or "deeparc_hf" not in sys.modules
print(json.dumps(found))
"""


def texts(seed: int, rows: int = 24) -> list[str]:
    """Texts of some words each."""
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(VOCAB - len(WORDS))}" for _ in range(draw.randrange(4, 9))) for _ in range(rows)
    ]


def transformer(folder: Path, model: tf.PreTrainedModel | None = None) -> str:
    """The folder of a tiny BERT (or another model) with its tokenizer."""
    tiny_tokenizer().save_pretrained(folder)
    spread(tf.BertModel(tf.BertConfig(**TEXT)) if model is None else model).save_pretrained(folder)
    return str(folder)


def encoder(folder: Path, model: tf.PreTrainedModel | None = None) -> st.SentenceTransformer:
    """A sentence encoder that no default would give: the first token is pooled, a Dense and a Normalize follow."""
    modules = [Transformer(transformer(folder, model)), Pooling(TEXT["hidden_size"], "cls")]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        modules.append(Dense(TEXT["hidden_size"], 16))
    found = st.SentenceTransformer(modules=[*modules, Normalize()], device="cpu")
    found.max_seq_length = 12
    return found


def batches(rows: int = 24) -> list[dict]:
    """Texts as a model takes them."""
    return [
        dict(tiny_tokenizer()(texts(5, rows)[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, rows, 8)
    ]


def stock(*wanted: tuple[str, Path | str, list], environment: dict | None = None, package: bool = False) -> list:
    """Of each checkpoint, loaded by a kind of sentence-transformers: the names of its modules, and what it makes of
    some texts.
    """
    given = {**os.environ, "HF_HUB_OFFLINE": "1"} if environment is None else dict(environment)
    if package:
        given["STOCK_PACKAGE"] = str(Path(__file__).parents[1])
    work = json.dumps([[kind, str(folder), what] for kind, folder, what in wanted])
    done = subprocess.run(
        [sys.executable, "-I", "-c", _STOCK], input=work, capture_output=True, text=True, env=given, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [(modules, torch.tensor(values)) for modules, values in json.loads(done.stdout.splitlines()[-1])]
