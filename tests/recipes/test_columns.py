"""Each of the seed's tables is a grid whose sweep.md has every column of it: each grid runs in small, with its own
recipe and config, and the columns are compared with a list that was made from the seed's document by hand.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

from .experiment.test_generation import tiny_nltk_data
from .markdown import line, tables
from .running import words
from .test_image_classification import data as images  # noqa: F401 (a fixture)
from .test_t5_qg import place as passages  # noqa: F401 (a fixture)
from .test_text_classification import data as texts  # noqa: F401 (a fixture)
from .tiny import RECIPES, ROOT

# column of the seed -> heading and column of sweep.md
MODELS = {
    "Parameter": ("", "parameters"),
    "freeze": ("", "freeze"),
    "Evaluation time(s)": ("Times", "evaluation time (s)"),
}
RESNET = {
    "1epoch": ("After each epoch", "epoch 1"),
    "2epoch": ("After each epoch", "epoch 2"),
    "3epoch": ("After each epoch", "epoch 3"),
    "Num. of layers": ("", "blocks"),
    "(+-%)": ("After each epoch", "change (best epoch)"),
    **MODELS,
}
BERT = {
    "Num. of encoders": ("", "blocks"),
    "Evaluation loss": ("", "loss"),
    "Accuracy": ("", "accuracy"),
    "(+-%)": ("", "change"),
    "Training time(s)": ("Times", "training time (s)"),
    **MODELS,
}
# before training: of the row of zeros; after it: of the row of the same zeros, retrained
BEFORE = {
    "Evaluation loss before training": ("", "loss"),
    "Accuracy before training": ("", "accuracy"),
    "Evaluation time(s)": ("Times", "evaluation time (s)"),
    "Parameter": ("", "parameters"),
}
AFTER = {
    "Evaluation loss after training": ("", "loss"),
    "Accuracy after training": ("", "accuracy"),
    "Training time(s)": ("Times", "training time (s)"),
}
T5 = {
    "Num of encoder": ("", "blocks"),
    "Num of decoder": ("", "blocks"),
    "Num of parameter": ("", "parameters"),
    "BLEU": ("", "bleu"),
    "Precision 1-gram": ("", "precision_1"),
    "Precision 2-gram": ("", "precision_2"),
    "Precision 3-gram": ("Other figures", "precision_3"),
    "Precision 4-gram": ("Other figures", "precision_4"),
    "Brevity Penalty": ("Other figures", "brevity_penalty"),
    "Length Ratio": ("Other figures", "length_ratio"),
    "ROUGE-1 F1": ("Other figures", "rouge1"),
    "ROUGE-2 F1": ("Other figures", "rouge2"),
    "ROUGE-L F1": ("Other figures", "rougeL"),
    "ROUGE-Lsum F1": ("Other figures", "rougeLsum"),
    "METEOR": ("Other figures", "meteor"),
}
GRIDS = {
    "resnet152_imagenet": ("T99 K1 full", {"iteration 1": RESNET}),
    "resnet50_imagenet": ("T98 full", {"iteration 1": RESNET}),
    "bert_base_emotion": (
        "T98 full",
        {"iteration 1": BERT, "iteration 1, 50 % zeros": BEFORE, "iteration 1, 50 % zeros, retrained": AFTER},
    ),
    "bert_base_yahoo": ("T98 full", {"iteration 1": BERT, "iteration 1, 10 % zeros": BEFORE}),
    "t5_base_squad": ("T99", {"iteration 1": T5}),
}


def small(name, folder):
    """A copy of a grid with one value of each of its settings, and a threshold that a tiny model reaches."""
    data = yaml.safe_load((RECIPES / "grids" / f"{name}.yaml").read_text())
    for key in ("recipe", "config"):
        data[key] = str((RECIPES / "grids" / data[key]).resolve())
    labels = GRIDS[name][0].split()
    data["grid"] = {key: {k: v for k, v in values.items() if k in labels} for key, values in data["grid"].items()}
    data["grid"]["threshold"] = dict.fromkeys(data["grid"]["threshold"], 0.05 if "resnet" in name else 0.2)
    cells = ["original", GRIDS[name][0]]
    data["seed"] = {cell: rows for cell, rows in data["seed"].items() if cell in cells}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", GRIDS)
def test_every_column_of_the_seed_stands_in_the_sweep(name, request, tmp_path):
    cell, expected = GRIDS[name]
    kind = "passages" if name.startswith("t5") else "images" if "resnet" in name else "texts"
    found = request.getfixturevalue(kind)
    if kind == "passages":
        given = {
            "model": str(found / "model"),
            **{f"{n}_file": str(found / f"{n}.jsonl") for n in ("train", "validation", "test")},
        }
        given |= {"max_source_length": 24, "max_target_length": 6}
    else:
        given = {**found, "dataloader_num_workers": 0} if kind == "images" else {**found}
    if name == "bert_base_yahoo":
        given |= {"text_column": "text", "text_pair_column": "null", "label_column": "label"}
    extra = words(**given)
    command = [
        sys.executable,
        str(RECIPES / "sweep.py"),
        str(small(name, tmp_path)),
        "--output",
        str(tmp_path / "out"),
        "--",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "NLTK_DATA": str(tiny_nltk_data(tmp_path / "nltk")),
    }
    done = subprocess.run(
        [*command, *extra], capture_output=True, text=True, env=environment, timeout=900, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    shown = tables((tmp_path / "out" / "sweep.md").read_text())
    for model, columns in expected.items():
        for column, (heading, ours) in columns.items():
            if heading == "Other figures":
                [row] = [r for r in shown[heading] if (r["cell"], r["model"], r["figure"]) == (cell, model, ours)]
                value, seed = row["here"], row["seed"]
            else:
                row = line(shown[heading], cell, model)
                value, seed = row[ours], row[f"seed: {ours}"]
            assert value not in ("-", ""), (model, column)
            if not (model.endswith("retrained") and ours == "parameters"):
                assert seed not in ("-", ""), (model, column)
    if kind == "passages":
        assert "+" in line(shown[""], cell, "iteration 1")["blocks"]  # encoder + decoder
