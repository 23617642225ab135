"""Chains that are killed by -9, in every link and in the surgery, come to the very same model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

import psutil
import pytest
import torch

from .chains import ROOT, command, environment, report, run_chain, weights, write_chain

pytestmark = pytest.mark.slow

CALLBACK = {
    "num_blocks": [5, 4],
    "start_epoch": 1,
    "retrain_epochs": 1,
    "heal": "lstsq",
    "calibration_samples": 64,
}
MORE = ("--epochs", 4, "--pause", 0.3)
RESUMES = ("--resume", "{checkpoint}")


def kill_when(file, there, only_the_command=False):
    """Start a chain, and kill it by -9 with all that it has launched as soon as a file is there."""
    process = subprocess.Popen(
        command(file), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 240
    while not there() and time.monotonic() < until:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    assert there()
    family = [] if only_the_command else psutil.Process(process.pid).children(recursive=True)
    for each in (process, *family):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=20)


def in_training(folder, number, step=3):
    """Whether a link has made so many steps."""

    def reached():
        file = folder / "out" / "links" / f"{number:03d}" / "output" / "step"
        return file.exists() and int(file.read_text() or 0) >= step

    return reached


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_chain(write_chain(folder, *MORE, callback=CALLBACK))
    return folder


def assert_same(folder, whole):
    one, other = weights(folder), weights(whole)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    for key in ("plan_removed", "decision", "step", "blocks"):
        assert [a.get(key) for a in report(folder)["attempts"]] == [a.get(key) for a in report(whole)["attempts"]]


@pytest.mark.parametrize("resumes", [False, True])
def test_a_kill_in_every_link(tmp_path, whole, resumes):
    file = write_chain(tmp_path, *MORE, *(RESUMES if resumes else ()), callback=CALLBACK)
    kill_when(file, in_training(tmp_path, 1))
    kill_when(file, in_training(tmp_path, 2))
    # the third trains for two epochs: behind the first there is a checkpoint
    kill_when(file, in_training(tmp_path, 3, step=10))
    done = run_chain(file)
    assert ("on from checkpoint-8" in done.stderr) == resumes
    assert_same(tmp_path, whole)


def test_a_kill_in_the_surgery_and_at_the_end(tmp_path, whole):
    file = write_chain(tmp_path, *MORE, callback=CALLBACK)
    links = tmp_path / "out" / "links"
    kill_when(file, lambda: any((links / "002").glob(".start.*.new/*")))
    assert not (links / "002" / "start").exists()
    kill_when(file, lambda: (links / "004" / "link.json").exists())
    assert_same_after(file, tmp_path, whole)


def assert_same_after(file, folder, whole):
    run_chain(file)
    assert_same(folder, whole)


def test_a_link_that_has_outlived_its_chain_is_waited_for(tmp_path, whole):
    file = write_chain(tmp_path, *MORE[:2], "--pause", 1.2, callback=CALLBACK)
    kill_when(file, in_training(tmp_path, 2, step=1), only_the_command=True)
    done = run_chain(file)
    assert "waiting for its end" in done.stderr and "Link 2" not in done.stderr  # it told what it came to
    assert_same(tmp_path, whole)


def test_ctrl_c_ends_it_in_one_line(tmp_path):
    file = write_chain(tmp_path, *MORE, callback=CALLBACK)
    process = subprocess.Popen(
        command(file),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
        # a shell that runs the tests in the background has it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    reached = in_training(tmp_path, 1, step=1)
    while not reached():
        assert process.poll() is None
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 130
    assert "the same command goes on" in told.splitlines()[-1]
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
