r"""How long do two processes take to compare the blocks of a model, in times of one process's? One thread each, the
same samples in all; in a training each process takes its share so.

    python -m benchmarks.two_processes --rounds 5

The processes live through all rounds and take turns: in each round the two together first, then the first alone, while
the other waits. Loading and starting are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel

from deeparc_hf import MPruneConfig
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.training_calibration import TrainingCalibration
from deeparc_hf.pruning.compare import compare_blocks

from .measuring import interval

_LENGTH, _BATCH = 64, 16


class _Texts(Dataset):
    """Random texts of one length."""

    def __init__(self, count: int) -> None:
        self.ids = torch.randint(1, 30_000, (count, _LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "attention_mask": torch.ones(_LENGTH, dtype=torch.long)}


def work(rounds: int, samples: int) -> None:
    """What each of two processes does; the first prints the times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    first = dist.get_rank() == 0
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536), add_pooling_layer=False
    )
    model.eval()
    texts, config = _Texts(samples), MPruneConfig(num_blocks=8, calibration_samples=samples)
    batches = [
        {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        for rows in ([texts[i] for i in range(start, start + _BATCH)] for start in range(0, samples, _BATCH))
    ]
    together, alone = [], []
    for _ in range(rounds + 1):  # the first to warm up
        dist.barrier()
        start = time.perf_counter()
        shared = TrainingCalibration(texts, None, _BATCH, config, model=model)
        with shared.reading():
            plan = compare_blocks(model, shared, config, progress=False)
        dist.barrier()
        together.append(time.perf_counter() - start)
        if first:
            start = time.perf_counter()
            whole = compare_blocks(model, Calibration(batches, samples), config, progress=False)
            alone.append(time.perf_counter() - start)
            assert whole.samples == plan.samples == samples
            similarities = [np.array(each.stacks["encoder.layer"].similarity) for each in (whole, plan)]
            assert np.allclose(*similarities, atol=1e-3)  # the rows are grouped otherwise
        dist.barrier()
    if first:
        ratios = np.array(together[1:]) / np.array(alone[1:])
        low, high = interval(ratios)
        print(
            json.dumps(
                {
                    "two processes / one": round(float(np.median(ratios)), 3),
                    "95 % interval": [round(low, 3), round(high, 3)],
                    "rounds": rounds,
                    "seconds of one": round(float(np.median(alone[1:])), 2),
                    "model": "12 blocks of 384",
                    "samples": f"{samples} of {_LENGTH} tokens",
                    **hardware(),
                    **package_versions(),
                },
                indent=1,
            )
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    args = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        work(args.rounds, args.samples)
        return
    program = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "benchmarks.two_processes"]
    options = ["--rounds", str(args.rounds), "--samples", str(args.samples)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *program, *options], check=True, env=environment)


if __name__ == "__main__":
    main()
