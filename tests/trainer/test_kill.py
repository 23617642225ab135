"""kill -9 at random moments of a run with two prunings, each time resumed: the end is that of the run that was never
killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
JOB = {
    "settings": {
        "iterations": 2,
        "num_blocks": [3, 2],
        "start_epoch": 1,
        "retrain_epochs": 1,
        "freeze": "partial",
        "max_drop": 0.05,
        "metric": "accuracy",
    },
    "arguments": {
        "num_train_epochs": 5,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 8,
    },
    "pause": 0.03,
}
ACCURACY = {  # by the number of blocks
    "both accepted": {"4": 0.9, "3": 0.88, "2": 0.87},
    "second taken back": {"4": 0.9, "3": 0.88, "2": 0.5},
}
STEPS = 24  # of the whole run


def start(folder, kind, resume=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step").unlink(missing_ok=True)
    (folder / "job.json").write_text(
        json.dumps({**JOB, "accuracy": ACCURACY[kind], "output": str(folder), "resume": resume or None})
    )
    command = [sys.executable, "-m", "tests.worker", str(folder / "job.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error[-4000:]


def kill_after(process, folder, step, delay):
    """Kill the process a moment after that step; False if it ended before."""
    while process.poll() is None:
        if (folder / "step").exists() and int((folder / "step").read_text() or 0) >= step:
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    finish(process)
    return False


def drop_broken(folder):
    """The Trainer writes a checkpoint in place, trainer_state.json last: what a kill left half written is of no use to
    it.
    """
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return any(folder.glob("checkpoint-*"))


def kills(folder, whole, kind, count):
    choose = random.Random(count)
    targets = sorted(choose.uniform(1, STEPS - 1) for _ in range(count))
    process, done = start(folder, kind), 0
    for target in targets:
        if not kill_after(process, folder, int(target), choose.uniform(0, 0.06)):
            break
        done += 1
        process = start(folder, kind, resume=drop_broken(folder))
    else:
        finish(process)
    assert done == count
    end, expected = (torch.load(path / "rank-0.pt", weights_only=True) for path in (folder, whole))
    assert end["blocks"] == expected["blocks"] == (2 if kind == "both accepted" else 3)
    assert all(torch.equal(value, end["weights"][name]) for name, value in expected["weights"].items())
    assert end["trainable"] == expected["trainable"]
    verdicts = [[(a["name"], a.get("decision")) for a in json.loads(result["attempts"])] for result in (end, expected)]
    assert verdicts[0] == verdicts[1] and ("pruning 1", "accepted") in verdicts[0]
    assert ("pruning 2", "accepted" if kind == "both accepted" else "rolled back") in verdicts[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The runs that are never killed, made once each."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole")
            finish(start(made[kind], kind))
        return made[kind]

    return get


@pytest.mark.slow
def test_four_kills(tmp_path, whole):
    kills(tmp_path, whole("second taken back"), "second taken back", 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ACCURACY)
def test_ten_kills(tmp_path, whole, kind):
    kills(tmp_path, whole(kind), kind, 10)
