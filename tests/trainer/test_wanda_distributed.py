"""WandaCallback in two real processes: one and the same mask, from the calibration data of both."""

from __future__ import annotations

import json

import pytest
import torch

from deeparc_hf import sparsify_model
from tests.worker import Uneven, pad
from tests.zoo import ZOO

from .test_distributed import launch, same

BATCHES = [list(range(start, start + 8)) for start in range(0, 32, 8)]
ONE_EPOCH = {"num_train_epochs": 1, "learning_rate": 0.0}


def zeros(weights):
    return {key: value == 0 for key, value in weights.items() if "encoder.layer" in key and value.ndim == 2}


def alone(**settings):
    """What one process that sees all of the data zeroes."""
    torch.manual_seed(0)
    model = ZOO["bert"].model()
    report = sparsify_model(
        model, [pad([Uneven(64)[i] for i in batch]) for batch in BATCHES], progress=False, **settings
    )
    return zeros(model.state_dict()), report


@pytest.mark.parametrize("sequential", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_both_processes_zero_what_one_would_on_all_the_data(tmp_path, sequential):
    job = {"zeroing": {"sequential": sequential}, "calibration": BATCHES, "arguments": ONE_EPOCH}
    (first, second), _ = launch(tmp_path, job)
    assert first["world"] == 2 and first["wrapped"] == "DistributedDataParallel"
    assert same(first["weights"], second["weights"])
    expected, report = alone(sequential=sequential)
    found = zeros(first["weights"])
    assert found.keys() == expected.keys() and all(torch.equal(mask, expected[key]) for key, mask in found.items())
    assert json.loads(first["sparsity"])["samples"] == report.samples == 32


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_zeros_stay_in_both_processes_with_prunings_before_and_after(tmp_path, accumulation):
    job = {
        "settings": {"num_blocks": [3, 2], "iterations": 2, "start_epoch": 0, "retrain_epochs": 2, "freeze": "partial"},
        "zeroing": {"start_epoch": 1, "calibration_samples": 32},
        "arguments": {"num_train_epochs": 4, "weight_decay": 0.1, "gradient_accumulation_steps": accumulation},
    }
    (first, second), _ = launch(tmp_path, job)
    assert first["blocks"] == 2 and same(first["weights"], second["weights"])
    assert all(mask.float().mean() == 0.5 for mask in zeros(first["weights"]).values())
    assert first["sparsity"] == second["sparsity"]


@pytest.mark.slow
def test_a_process_without_calibration_data_follows_the_other(tmp_path):
    job = {"zeroing": {}, "calibration": BATCHES[:1], "arguments": ONE_EPOCH}
    (first, second), _ = launch(tmp_path, job)
    assert same(first["weights"], second["weights"])
    assert json.loads(second["sparsity"])["samples"] == 8


@pytest.mark.slow
def test_a_failure_in_one_process_ends_both(tmp_path):
    job = {"zeroing": {}, "calibration": BATCHES, "broken": [1], "arguments": ONE_EPOCH}
    results, done = launch(tmp_path, job, check=False)
    assert done.returncode != 0 and not results
    assert "In process 1:" in done.stderr


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    job = {
        "zeroing": {"start_epoch": 1, "calibration_samples": 16},
        "arguments": {"save_strategy": "steps", "save_steps": 10},
    }
    (whole, _), _ = launch(tmp_path / "whole", job)
    points = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    resumed, done = launch(tmp_path / "again", {**job, "resume": str(points[1])}, check=False)
    if "tagged with cpu:0" in done.stderr:
        pytest.skip("this torch cannot load an optimizer's state onto cpu:0, whatever callbacks there are")
    assert done.returncode == 0, done.stderr[-4000:]
    again, other = resumed
    assert same(whole["weights"], again["weights"]) and same(again["weights"], other["weights"])
