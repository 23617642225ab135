"""A sweep of the recipe of text classification on a tiny model: killed in the middle and started again, its table is
the same.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from experiment.results import read_rows

from .markdown import line, tables
from .tiny import RECIPES, ROOT, make_tiny, write_sweep

GRID = {
    "num_blocks": {"two": 2}
}  # with the original two cells: three would take longer, and tests/recipes/experiment has them
SEED = {
    "original": {"original": {"blocks": 4, "metrics": {"accuracy": 0.9}, "seconds": 10.0}},
    "two": {"iteration 1": {"blocks": 2, "metrics": {"accuracy": 0.8}, "seconds": 5.0, "slip": "of a test"}},
}


def start(folder, output):
    command = [
        sys.executable,
        str(RECIPES / "sweep.py"),
        str(folder / "sweep.yaml"),
        "--output",
        str(output),
        "--",
        "--sparsity",
        "0.5",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def without_times(text):
    """The tables without that of times."""
    return {heading: rows for heading, rows in tables(text).items() if heading != "Times"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    make_tiny(folder)
    write_sweep(folder, GRID, seed=SEED, metrics=["accuracy", "loss"])
    running = start(folder, folder / "out")
    said = running.communicate(timeout=400)[0]
    assert running.returncode == 0, said
    assert (folder / "out" / "sweep.md").read_text().strip() in said
    return folder


def test_a_sweep_of_a_real_recipe(undisturbed):
    cells = undisturbed / "out" / "cells"
    names = {name: [row.name for row in read_rows(cells / name)] for name in ("original", "two")}
    assert names["original"] == ["original", "original, 50 % zeros"]
    assert names["two"] == ["original", "iteration 1", "iteration 1, 50 % zeros"]  # the original is zeroed once
    first, again = read_rows(cells / "original")[0], read_rows(cells / "two")[0]
    # every cell starts from the same original
    assert first.measured.metrics["accuracy"] == again.measured.metrics["accuracy"]
    assert first.training_seconds is not None and again.training_seconds is None
    found = tables((undisturbed / "out" / "sweep.md").read_text())
    ours = read_rows(cells / "two")[1]
    accuracy, change = (
        ours.measured.metrics["accuracy"],
        ours.measured.metrics["accuracy"] - again.measured.metrics["accuracy"],
    )
    shown = line(found[""], "two", "iteration 1")
    assert (shown["blocks"], shown["seed: blocks"]) == ("2", "2 *")
    assert [shown[name] for name in ("accuracy", "seed: accuracy", "change", "seed: change")] == (
        [f"{accuracy:.4f}", "0.8000", f"{change:+.4f}", "-0.1000"]
    )
    assert line(found["Times"], "two", "iteration 1")["seed: time / original"] == "0.500"


@pytest.mark.slow
def test_killed_in_the_middle_of_the_second_cell_and_started_again(undisturbed):
    output = undisturbed / "again"
    # the cell before it is done: that of the other sweep
    shutil.copytree(undisturbed / "out" / "cells" / "original", output / "cells" / "original")
    running = start(undisturbed, output)
    log = output / "logs" / "two.log"
    end = time.monotonic() + 200
    while not (log.exists() and len(log.read_text(errors="replace").splitlines()) > 4):
        assert running.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert (output / "cells" / "two" / "cell.json").exists() and not (
        output / "cells" / "two" / "results.json"
    ).exists()

    running = start(undisturbed, output)
    said = running.communicate(timeout=400)[0]
    assert running.returncode == 0, said
    assert "original: done before" in said and "two: was not finished, so it goes on where it stood" in said
    once, again = ((undisturbed / name / "sweep.md").read_text() for name in ("out", "again"))
    assert without_times(once) == without_times(again)
