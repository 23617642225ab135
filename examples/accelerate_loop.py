r"""A training loop of one's own with accelerate: fine-tune, remove blocks, train on, zero weights, train on, save.

    accelerate launch examples/accelerate_loop.py --output runs/loop

In two processes without a GPU, and on from where it stood:

    accelerate launch --config_file recipes/accelerate_configs/two_cpu_processes.yaml examples/accelerate_loop.py \
        --use-cpu --output runs/loop --resume

A small BERT from scratch learns made-up texts, in seconds on a CPU: put your model and your data in their places. What
is particular to pruning is marked with (1) to (4).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from deeparc_hf import KeptZeros, PruningPlan, analyze, apply_plan, follow, sparsify_model

WORDS, LENGTH = 100, 12


def texts(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Made-up texts; the label tells whether the first word is one of the later half."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, WORDS, (count, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": (row[0] > WORDS // 2).long()} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--stop-after", type=int, help="end after so many epochs, to go on with --resume")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--use-cpu", action="store_true")
    args = parser.parse_args()
    # seedable: a resumed run has the data in the order that it would have had
    loading = DataLoaderConfiguration(use_seedable_sampler=True)
    accelerator = Accelerator(cpu=args.use_cpu, gradient_accumulation_steps=2, dataloader_config=loading)
    set_seed(0)
    state, saved = args.output / "state", args.output / "model"
    if args.resume:
        model = AutoModelForSequenceClassification.from_pretrained(saved)  # as many blocks as it had then
    else:
        config = BertConfig(
            vocab_size=WORDS, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
        )
        model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.epochs * 8)
    data = texts(256, seed=1)
    loader = DataLoader(data, batch_size=16, shuffle=True)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)
    epoch, zeros = 0, KeptZeros(accelerator.unwrap_model(model))  # of a checkpoint that was zeroed before
    if args.resume:
        accelerator.load_state(str(state))
        epoch = int((args.output / "epoch").read_text())
    while epoch < args.epochs:
        inner = accelerator.unwrap_model(model)
        if epoch == 2:  # (1) one process compares the blocks, all of them remove the same
            calibration = [torch.utils.data.default_collate(data[i : i + 16]) for i in range(0, 128, 16)]
            plan = (
                [analyze(inner, calibration, num_blocks=3, progress=False).to_json()]
                if accelerator.is_main_process
                else [None]
            )
            broadcast_object_list(plan)
            apply_plan(inner, PruningPlan.from_json(plan[0]), example=calibration[0])
            follow(model, optimizer)  # (2) DistributedDataParallel and the optimizer, before the next step
        if epoch == 4:  # (3) from here on half of the weights are zero, and stay so
            sparsify_model(inner, method="magnitude", sparsity=0.5, progress=False)
            zeros = KeptZeros(inner)
        model.train()  # what from_pretrained gives evaluates
        loader.set_epoch(epoch)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                zeros.apply()  # (4) after each step
                schedule.step()
                optimizer.zero_grad()
        zeros.check()
        epoch += 1
        accelerator.print(
            f"epoch {epoch}: loss {float(loss.detach()):.4f}, {len(inner.bert.encoder.layer)} blocks, "
            f"{accelerator.num_processes} processes"
        )
        accelerator.save_state(str(state))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            inner.save_pretrained(saved)
            (args.output / "epoch").write_text(str(epoch))
        accelerator.wait_for_everyone()
        if epoch == args.stop_after:
            break
    accelerator.end_training()


if __name__ == "__main__":
    main()
