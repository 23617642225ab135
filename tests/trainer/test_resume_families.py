"""Runs with two prunings on other kinds of models, resumed before, between and after the prunings: bit-identical."""

from __future__ import annotations

import shutil

import datasets
import pytest
import torch

from deeparc_hf import find_stacks
from tests.trainers import ROWS, pruning, text_data, train
from tests.zoo import ZOO


def images():
    pixels = torch.randn(ROWS, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return datasets.Dataset.from_dict(
        {"pixel_values": pixels.numpy(), "labels": [i % 5 for i in range(ROWS)]}
    ).with_format("torch")


def causal():
    return text_data("tokens").map(lambda row: {"labels": row["input_ids"]})


# two stacks and a tied head; layers that attend differently; BatchNorm and stages; timm in transformers' wrapper
DATA = {"t5": lambda: text_data("tokens"), "gemma3": causal, "resnet": images, "wrapped_resnext": images}


def total(model):
    return sum(map(len, find_stacks(model).values()))


def run(name, folder, rejected, resume=None):
    torch.manual_seed(0)
    model = ZOO[name].model()
    blocks = total(model)
    accuracy = {blocks: 0.9, blocks - 1: 0.9, blocks - 2: 0.1 if rejected else 0.9}
    gate = {"max_drop": 0.05, "metric": "accuracy", "k_max": 1, "keep_snapshots": True}
    callback = pruning(num_blocks=[blocks - 1, blocks - 2], start_epoch=1, freeze="partial", **gate)
    arguments = {
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 4,
        "learning_rate": 1e-3,
    }
    train(
        model,
        folder,
        callback,
        data=DATA[name](),
        resume=resume,
        compute_metrics=lambda _: {"accuracy": accuracy[total(model)]},
        **arguments,
    )
    return model, blocks


@pytest.mark.parametrize(
    "rejected", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["accepted", "taken back"]
)
@pytest.mark.parametrize(
    "name", [*sorted(set(DATA) - {"wrapped_resnext"}), pytest.param("wrapped_resnext", marks=pytest.mark.slow)]
)
def test_every_kind_of_model_ends_the_same(tmp_path, name, rejected):
    whole, blocks = run(name, tmp_path / "whole", rejected)
    assert total(whole) == blocks - (1 if rejected else 2)
    for step in (8, 12, 20):
        again = tmp_path / f"again-{step}"
        shutil.copytree(tmp_path / "whole", again)
        resumed, _ = run(name, again, rejected, resume=str(again / f"checkpoint-{step}"))
        assert resumed.state_dict().keys() == whole.state_dict().keys(), step
        assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items()), step
