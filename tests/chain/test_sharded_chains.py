"""Chains whose links hold a part of each weight in each of two processes: the plan of one process, and its weights.

FSDP2 runs by accelerate on CPUs (`train.shard_on_cpu`), DeepSpeed where it is installed.
"""

from __future__ import annotations

import importlib.util

import pytest
from transformers import AutoModelForSequenceClassification

from .chains import FSDP2, ONE, ZERO, difference, report, run_chain, weights, write_chain

pytestmark = pytest.mark.slow

TWICE = {
    "num_blocks": [5, 4],
    "start_epoch": 1,
    "retrain_epochs": 1,
    "heal": "lstsq",
    "freeze": "partial",
    "calibration_samples": 128,
}
HOW = {
    "fsdp2": (FSDP2, "fsdp2"),
    "zero2": (ZERO.format(stage=2), "deepspeed"),
    "zero3": (ZERO.format(stage=3), "deepspeed"),
}


@pytest.mark.parametrize("how", HOW)
def test_a_sharded_chain_comes_to_what_one_process_comes_to(tmp_path, how, monkeypatch):
    if how != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    launch, sharding = HOW[how]
    run_chain(write_chain(tmp_path / "one", launch=ONE, callback=TWICE))
    run_chain(write_chain(tmp_path / "two", "--sharding", sharding, launch=launch, batch=8, callback=TWICE))
    one, two = (report(tmp_path / name) for name in ("one", "two"))
    for key in ("plan_removed", "removed", "frozen", "decision", "blocks", "parameters", "step"):
        assert [a.get(key) for a in one["attempts"]] == [a.get(key) for a in two["attempts"]], key
    assert [a.keys() for a in one["attempts"]] == [a.keys() for a in two["attempts"]] and one.keys() == two.keys()
    assert difference(weights(tmp_path / "one"), weights(tmp_path / "two")) < 1e-5
    place = tmp_path / "two" / "out" / "model"
    model, info = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
    assert not any(info.values()) and model.config.num_hidden_layers == 4
    assert type(model).__name__ in model.config.architectures and two["weights"]


def test_what_is_taken_back_under_fsdp2(tmp_path):
    callback = {**TWICE, "num_blocks": None, "threshold": 0.5, "max_drop": 0.1, "metric": "accuracy"}
    accuracy = '{"6": 0.9, "1": 0.5, "3": 0.85}'
    more = ["--sharding", "fsdp2", "--epochs", 3, "--accuracy", accuracy]
    run_chain(write_chain(tmp_path, *more, launch=FSDP2, batch=8, callback=callback))
    decisions = [attempt.get("decision") for attempt in report(tmp_path)["attempts"]]
    assert decisions == [None, "rolled back", "accepted"]
