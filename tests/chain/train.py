"""A training script as a user would have it, launched by `deeparc run` in the tests: `python train.py --model FOLDER
--output_dir FOLDER ...`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from deeparc_hf import MPruneCallback
from tests.trainers import text_data


def shard_on_cpu():
    """Have accelerate shard by FSDP2 on CPUs, which it offers on accelerators alone; all that follows is its own."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    Accelerator(cpu=True).state.fsdp_plugin = FullyShardedDataParallelPlugin()


class Steps(TrainerCallback):
    """Notes each step in a file, and takes its time, so that a kill can be aimed at it."""

    def __init__(self, pause):
        self.pause = pause

    def on_step_end(self, args, state, control, **kwargs):
        Path(args.output_dir, "step").write_text(str(state.global_step))
        time.sleep(self.pause)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    for name in ("--model", "--output_dir", "--resume", "--sharding", "--after"):
        parser.add_argument(name)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--callback", type=json.loads, default={})
    parser.add_argument("--arguments", type=json.loads, default={})
    parser.add_argument("--accuracy", type=json.loads, default={})
    parser.add_argument("--without", action="store_true")
    given = parser.parse_args()
    how = {"use_cpu": True}
    if given.sharding == "fsdp2":
        shard_on_cpu()
        how["accelerator_config"] = {"use_configured_state": True}
    elif given.sharding == "deepspeed":
        how = {"ddp_backend": "gloo"}
    arguments = TrainingArguments(
        given.output_dir,
        num_train_epochs=given.epochs,
        per_device_train_batch_size=given.batch,
        eval_strategy="epoch",
        logging_strategy="no",
        save_strategy="epoch",
        learning_rate=1e-2,
        optim="sgd",
        average_tokens_across_devices=False,
        report_to=[],
        disable_tqdm=True,
        **{**how, **given.arguments},
    )
    model = AutoModelForSequenceClassification.from_pretrained(given.model)

    def compute(prediction):
        known = given.accuracy.get(str(model.config.num_hidden_layers))
        right = float((prediction.predictions.argmax(1) == prediction.label_ids).mean())
        return {"accuracy": right if known is None else known}

    data = text_data(rows=128)
    callbacks = [] if given.without else [MPruneCallback(**given.callback)]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=text_data(rows=32),
        compute_metrics=compute,
        callbacks=[*callbacks, Steps(given.pause)],
    )
    trainer.train(resume_from_checkpoint=given.resume)
    test = trainer.evaluate(text_data(rows=48), metric_key_prefix="test")
    if trainer.is_world_process_zero() and given.after:
        Path(given.after).write_text(json.dumps({"blocks": model.config.num_hidden_layers, **test}))


if __name__ == "__main__":
    main()
