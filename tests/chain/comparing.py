"""Comparing and healing in several processes: `torchrun --nproc_per_node 2 -m tests.chain.comparing JOB.json`.

Each process writes what it found to `OUTPUT/rank-N.pt`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard

from deeparc_hf.architectures import describe
from deeparc_hf.core.shards import numel
from deeparc_hf.healing.heal import fit_sites
from deeparc_hf.observe.quality import measure_quality
from deeparc_hf.observe.training_calibration import TrainingCalibration
from deeparc_hf.pruning.compare import compare_blocks
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.search.search import search_plan
from deeparc_hf.trainer.searching import batches_of_all
from tests.trainers import text_data
from tests.zoo import ZOO

STACK = "bert.encoder.layer"


def look(samples, metric, sharded=False, lengths=None):
    """What is found out about a tiny model."""
    torch.set_num_threads(1)
    model = ZOO["bert"].model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    data = text_data(rows=samples)
    if sharded:
        for block in model.bert.encoder.layer:
            fully_shard(block)
        fully_shard(model)
    config = MPruneConfig(num_blocks=3, heal="lstsq", calibration_samples=samples, similarity=metric)
    calibration = TrainingCalibration(Dataset.from_list(list(data)), None, 8, config, model=model, again=True)
    with calibration.reading():
        plan = compare_blocks(describe(model), calibration, config, progress=False)
        healings = fit_sites(describe(model), {STACK: [1, 3]}, calibration, progress=False)
        quality = measure_quality(model, calibration)
        wanted = MPruneConfig(search="greedy", num_blocks=2, heal="lstsq")
        batches = batches_of_all(describe(model).host, calibration)
        searched = search_plan(model, batches, wanted, shared=True, progress=False)
    stack = plan.stacks[STACK]
    return {
        "similarity": torch.tensor(stack.similarity),
        "searched": [searched.removed[STACK], searched.choice.value],
        "removed": {name: list(blocks) for name, blocks in plan.removed.items()},
        "parameters": [sum(map(numel, block.parameters())) for block in model.bert.encoder.layer],
        "changes": [healing.change for healing in healings],
        "told": json.dumps([healing.to_dict() for healing in healings]),
        "samples": plan.samples,
        "quality": [quality["loss"], quality["accuracy"], quality["samples"]],
        "whole": sum(type(parameter.data) is torch.Tensor for parameter in model.parameters()),
    }


def main(job: dict) -> None:
    dist.init_process_group("gloo")
    found = look(job["samples"], job["metric"], job["sharded"])
    torch.save(found, Path(job["output"], f"rank-{dist.get_rank()}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
