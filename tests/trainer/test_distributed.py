"""Two real processes (gloo, DistributedDataParallel): one plan, equal weights, gradients reduced after every change of
structure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deeparc_hf import PruningPlan, analyze
from tests.worker import Uneven, pad
from tests.zoo import ZOO

ROOT = Path(__file__).parents[2]
TWICE = {"iterations": 2, "num_blocks": [3, 2], "start_epoch": 1, "retrain_epochs": 1, "freeze": "partial"}


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: "no"
use_cpu: false
main_process_port: 0
"""


def launch(folder, job, processes=2, check=True, by_accelerate=False):
    """Run the worker; what each process ended with, and what was printed."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {"output": str(folder), **job}
    defaults = {
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "ddp_find_unused_parameters": False,
    }
    job["arguments"] = {**defaults, **job.get("arguments", {})}
    (folder / "job.json").write_text(json.dumps(job))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
    ]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "tests.worker", str(folder / "job.json")]
    if by_accelerate:  # which starts processes for CPUs only where it is told of GPUs
        (folder / "accelerate.yaml").write_text(ACCELERATE)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "accelerate.yaml")]
        command += ["-m", "tests.worker", str(folder / "job.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if check:
        assert done.returncode == 0, done.stderr[-4000:]
    results = [
        torch.load(folder / f"rank-{i}.pt", weights_only=True)
        for i in range(processes)
        if (folder / f"rank-{i}.pt").exists()
    ]
    return results, done


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_prunings_with_freezing_keep_the_processes_equal(tmp_path, accumulation):
    results, _ = launch(tmp_path, {"settings": TWICE, "arguments": {"gradient_accumulation_steps": accumulation}})
    first, second = results
    assert first["world"] == 2 and first["wrapped"] == "DistributedDataParallel"
    assert first["blocks"] == second["blocks"] == 2
    assert first["plan"] == second["plan"]
    assert same(first["weights"], second["weights"])
    assert first["trainable"] == second["trainable"] and first["gradients"] == second["gradients"]
    # what is frozen has no gradient, and what is not has one
    assert first["gradients"][-1] == len(first["trainable"]) < first["gradients"][0]


def test_the_result_is_that_of_one_process_with_the_same_batches(tmp_path):
    """An independent reference: gradients that were not reduced, or not of all parameters, would lead elsewhere."""
    settings = {**TWICE, "calibration_samples": 48}
    two, _ = launch(tmp_path / "two", {"settings": settings, "dropout": 0.0})
    one, _ = launch(
        tmp_path / "one",
        {"settings": settings, "dropout": 0.0, "arguments": {"per_device_train_batch_size": 8}},
        processes=1,
    )
    plans = [json.loads(result["plan"])["stacks"]["bert.encoder.layer"] for result in (two[0], one[0])]
    assert plans[0]["removed"] == plans[1]["removed"]
    for name, value in one[0]["weights"].items():
        if not name.endswith(
            "key.bias"
        ):  # it changes nothing, so rounding alone moves it, and Adam makes steps of that
            torch.testing.assert_close(two[0]["weights"][name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_a_pruning_is_taken_back_in_every_process(tmp_path):
    gate = {"settings": {**TWICE, "max_drop": 0.05, "metric": "accuracy"}, "accuracy": {4: 0.9, 3: 0.88, 2: 0.5}}
    results, _ = launch(
        tmp_path, {**gate, "arguments": {"num_train_epochs": 4, "eval_strategy": "epoch", "save_strategy": "epoch"}}
    )
    first, second = results
    assert first["blocks"] == second["blocks"] == 3
    assert same(first["weights"], second["weights"])
    verdicts = [[(a["name"], a.get("decision")) for a in json.loads(r["attempts"])] for r in results]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0][:3] == [("before pruning", None), ("pruning 1", "accepted"), ("pruning 2", "rolled back")]


@pytest.mark.slow
def test_processes_search_together_and_take_one_decision(tmp_path):
    """On the samples of both."""
    settings = {"search": "greedy", "heal": "lstsq", "num_blocks": 2, "calibration_samples": 48}
    results, _ = launch(tmp_path, {"settings": settings})
    first, second = results
    assert first["blocks"] == second["blocks"] == 2
    assert first["plan"] == second["plan"] and same(first["weights"], second["weights"])
    choice = json.loads(first["plan"])["choice"]
    assert choice["search"] == "greedy" and choice["samples"] == 48 and len(choice["lesser"]) == 1


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    job = {"settings": TWICE, "arguments": {"save_strategy": "steps", "save_steps": 5}}
    whole, _ = launch(tmp_path, job)
    points = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    point = points[len(points) // 2]
    resumed, done = launch(tmp_path / "again", {**job, "resume": str(point)}, check=False)
    if "tagged with cpu:0" in done.stderr:
        pytest.skip("this torch cannot load an optimizer's state onto cpu:0, whatever callbacks there are")
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(same(one["weights"], other["weights"]) for one, other in zip(whole, resumed, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("batches", [[list(range(20)), [20, 21]], [list(range(24))]], ids=["few", "none"])
def test_a_process_with_few_rows_or_none_follows_the_others(tmp_path, batches):
    settings = {"num_blocks": 3, "retrain_epochs": 1}
    results, _ = launch(tmp_path, {"settings": settings, "calibration": batches, "arguments": {"num_train_epochs": 1}})
    assert results[0]["plan"] == results[1]["plan"] and json.loads(results[0]["plan"])["samples"] == sum(
        map(len, batches)
    )
    assert same(results[0]["weights"], results[1]["weights"])


def test_a_failure_in_one_process_ends_all_of_them(tmp_path):
    """The second process's only batch is beyond the model: the first must not wait for it."""
    settings, arguments = {"num_blocks": 3, "retrain_epochs": 1}, {"num_train_epochs": 1}
    job = {
        "settings": settings,
        "calibration": [list(range(20)), list(range(8))],
        "broken": [1],
        "arguments": arguments,
    }
    results, done = launch(tmp_path, job, check=False)
    assert done.returncode != 0 and not results
    assert "In process 1" in done.stderr


@pytest.mark.parametrize("batches", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_healing_is_the_same_in_every_process(tmp_path, batches):
    """Also where one process has no calibration data."""
    calibration = [list(range(start, start + 8)) for start in range(0, 8 * batches, 8)]
    job = {"settings": {"num_blocks": 3, "retrain_epochs": 1, "heal": "lstsq"}, "calibration": calibration}
    (first, second), _ = launch(tmp_path, {**job, "arguments": {"num_train_epochs": 1}})
    assert same(first["weights"], second["weights"])
    attempts = [json.loads(result["attempts"]) for result in (first, second)]
    assert attempts[0][1]["healing"] == attempts[1][1]["healing"] and len(attempts[0][1]["healing"]) == 1


@pytest.mark.slow
def test_effects_are_measured_on_the_samples_of_all_processes(tmp_path):
    batches = [list(range(start, start + 8)) for start in range(0, 48, 8)]
    settings = {"similarity": "effect", "num_blocks": 3}
    job = {"settings": {**settings, "retrain_epochs": 1}, "calibration": batches, "arguments": {"num_train_epochs": 1}}
    (first, second), _ = launch(tmp_path, job)
    assert first["plan"] == second["plan"]
    data = Uneven(64)
    whole = analyze(
        ZOO["bert"].model(), [pad([data[index] for index in batch]) for batch in batches], progress=False, **settings
    )
    plan = PruningPlan.from_json(first["plan"])
    assert plan.samples == whole.samples == 48 and plan.removed == whole.removed
    found, expected = (
        torch.tensor(p.stacks["bert.encoder.layer"].similarity, dtype=torch.float64) for p in (plan, whole)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_accelerate_launch(tmp_path):
    results, _ = launch(tmp_path, {"settings": TWICE}, by_accelerate=True)
    first, second = results
    assert first["world"] == 2 and first["blocks"] == 2 and same(first["weights"], second["weights"])
