"""Blocks are compared and healed alike in one process, in two, and in two that hold a part of each weight."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from deeparc_hf.observe.training_calibration import share_of

from .chains import ROOT, environment
from .comparing import look


def in_two_processes(folder, **job):
    (folder / "job.json").write_text(json.dumps({"output": str(folder), **job}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "tests.chain.comparing", str(folder / "job.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    ("samples", "metric", "sharded"),
    [
        (128, "cka", True),
        pytest.param(128, "cka", False, marks=pytest.mark.slow),
        pytest.param(128, "effect", True, marks=pytest.mark.slow),
        pytest.param(169, "cka", True, marks=pytest.mark.slow),  # one process has 64 of them, the other the rest
        pytest.param(9, "effect", True, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:Blocks were compared on only")
def test_several_processes_find_what_one_finds(tmp_path, samples, metric, sharded):
    alone = look(samples, metric)
    one, other = in_two_processes(tmp_path, samples=samples, metric=metric, sharded=sharded)
    assert one["told"] == other["told"] and torch.equal(one["similarity"], other["similarity"])
    assert one["removed"] == alone["removed"] and one["samples"] == alone["samples"] == samples
    close = 1e-12 if metric == "cka" else 1e-6  # sums of groups, which are the same; means of single positions
    assert float((one["similarity"] - alone["similarity"]).abs().max()) < close
    for mine, yours in zip(one["changes"], alone["changes"], strict=True):
        assert (mine is None) == (yours is None)
        assert mine is None or float((mine - yours).abs().max()) < 1e-5 * float(yours.abs().max())
    assert one["searched"] == other["searched"]
    if samples == 128:  # else the batches are other ones than in one process, and so are the folds of a search
        assert one["searched"][0] == alone["searched"][0]
        assert one["searched"][1] == pytest.approx(alone["searched"][1], rel=1e-3)
    for key in ("parameters", "quality"):
        assert one[key] == pytest.approx(alone[key])
    # what was held is in shards again: whole are at most those of the root, which FSDP2 leaves so after a pass
    assert not sharded or one["whole"] < alone["whole"] / 4


def test_shares_are_neighbours_in_whole_groups():
    assert [share_of(512, 2, index) for index in range(2)] == [range(256), range(256, 512)]
    assert [share_of(500, 3, index) for index in range(3)] == [range(128), range(128, 256), range(256, 500)]
    assert [share_of(41, 2, index) for index in range(2)] == [range(20), range(20, 41)]
    assert share_of(512, 1, 0) == range(512) and not share_of(1, 2, 0) and share_of(1, 2, 1) == range(1)
    for total in (0, 1, 63, 64, 129, 1000):
        for count in (1, 2, 3, 5, 8):
            shares = [share_of(total, count, index) for index in range(count)]
            assert [number for share in shares for number in share] == list(range(total))
