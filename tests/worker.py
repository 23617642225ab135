"""A training in a process of its own: `torchrun --nproc_per_node 2 -m tests.worker JOB.json`, or one process that is
killed.

The job says what to train; each process writes what it ended with to `OUTPUT/rank-N.pt`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from deeparc_hf import MPruneCallback, WandaCallback
from tests.trainers import arguments, text_data
from tests.zoo import VOCAB, ZOO


class Seen(TrainerCallback):
    """Notes the learning rate of each step, and how many parameters had a gradient."""

    def __init__(self):
        self.rates, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append([group["lr"] for group in kwargs["optimizer"].param_groups])
        self.gradients.append(sum(p.grad is not None for p in kwargs["model"].parameters()))


class Steps(TrainerCallback):
    """Notes each step in a file, and takes its time, so that a kill can be aimed at it."""

    def __init__(self, file, pause):
        self.file, self.pause = file, pause

    def on_step_end(self, args, state, control, **kwargs):
        self.file.write_text(str(state.global_step))
        time.sleep(self.pause)


class Uneven(Dataset):
    """Batches of unequal length: no two samples have the same number of tokens next to each other."""

    def __init__(self, rows):
        self.data = text_data(rows=rows)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        row = self.data[index]
        length = 4 + index % 7
        return {"input_ids": row["input_ids"][:length], "attention_mask": [1] * length, "labels": row["labels"]}


def pad(samples):
    length = max(len(sample["input_ids"]) for sample in samples)
    batch = {
        key: torch.tensor([s[key] + [0] * (length - len(s[key])) for s in samples])
        for key in ("input_ids", "attention_mask")
    }
    return {**batch, "labels": torch.tensor([s["labels"] for s in samples])}


def main(job: dict) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ZOO[job.get("model", "bert")].model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = job.get("dropout", module.p)
    accuracy = {int(count): value for count, value in job.get("accuracy", {}).items()}

    def compute(prediction):
        return {"accuracy": accuracy[model.config.num_hidden_layers]}

    seen = Seen()
    calibration = None
    if "calibration" in job:
        calibration = [pad([Uneven(64)[index] for index in batch]) for batch in job["calibration"]]
        for number in job.get("broken", []):
            calibration[number]["input_ids"] += VOCAB  # beyond the embeddings
    callback = MPruneCallback(**job["settings"], calibration=calibration) if "settings" in job else None
    zeroing = WandaCallback(**job["zeroing"], calibration=calibration) if "zeroing" in job else None
    trainer = Trainer(
        model=model,
        args=arguments(job["output"], TrainingArguments, **job["arguments"]),
        train_dataset=Uneven(job.get("rows", 64)),
        eval_dataset=Uneven(24),
        data_collator=pad,
        compute_metrics=compute if accuracy else None,
        callbacks=[
            *filter(None, (callback, zeroing)),
            seen,
            *([Steps(Path(job["output"], "step"), job["pause"])] if "pause" in job else []),
        ],
    )
    trainer.train(resume_from_checkpoint=job.get("resume"))
    rank = trainer.args.process_index
    result = {
        "weights": model.state_dict(),
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "blocks": model.config.num_hidden_layers,
        "attempts": None if callback is None else json.dumps(callback.attempts),
        "plan": None if callback is None or callback.plan is None else callback.plan.to_json(),
        "sparsity": None if zeroing is None else json.dumps(zeroing.report.to_dict()),
        "rates": seen.rates,
        "gradients": seen.gradients,
        "world": trainer.args.world_size,
        "wrapped": type(trainer.model_wrapped).__name__,
    }
    torch.save(result, Path(job["output"], f"rank-{rank}.pt"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
