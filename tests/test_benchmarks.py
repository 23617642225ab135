"""The program behind `make bench` runs, and its table is whole. Times are not looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ["results", "training", "healing", "sparsity", "large", "gpu"]


@pytest.mark.parametrize("part", ["analysis", *(pytest.param(part, marks=pytest.mark.slow) for part in PARTS)])
def test_each_part_measures_and_its_table_is_whole(part, tmp_path):
    command = [sys.executable, "-m", "benchmarks.costs", "--quick", "--rounds", "1", "--parts", part]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--output", str(tmp_path)], check=True, cwd=ROOT, env=environment)
    name = "costs_gpu" if part == "gpu" else "costs"
    data, page = (json.loads((tmp_path / f"{name}.json").read_text()), (tmp_path / f"{name}.md").read_text())
    ran = [row for row in data["rows"] if "at run time" not in row["what"]]  # what only a GPU can
    assert ran and all(math.isfinite(row["value"]) and row["value"] > 0 for row in ran)
    assert all(row["what"] in page for row in data["rows"])
    assert data["made with"]["threads"] == 2


def test_a_part_that_does_not_exist_is_refused():
    command = [sys.executable, "-m", "benchmarks.costs", "--parts", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: 'speed'" in done.stderr
