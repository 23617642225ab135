"""The seed's grid: accuracy of a text classifier at 0, 10, ..., 50 % of zeros, by Wanda and by magnitude, without
retraining.

The model is fine-tuned on the training file if it has no such head yet, calibrated on training texts, and evaluated on
other texts. Written as JSON and Markdown: accuracy with its 95 % Wilson interval, and the difference between the
methods on the same texts with a 95 % bootstrap interval.

    python -m benchmarks.wanda_grid --model DIR --train train.csv --heldout test.csv --output FOLDER --fine-tune 1

Data: .csv files with columns text and label.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers as tf
from torch import nn

from deeparc_hf import WandaConfig, sparsify_model
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.statistics import wilson_interval

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
WAYS = {
    "wanda": {"method": "wanda"},
    "wanda, one pass": {"method": "wanda", "sequential": False},
    "magnitude": {"method": "magnitude"},
}


@dataclass
class Row:
    """One model of the grid."""

    method: str
    asked: float
    pattern: str | None
    measured: float
    accuracy: float
    low: float
    high: float
    loss: float
    against_magnitude: tuple[float, float, float] | None = None  # difference of accuracy and its interval


def read(path: Path) -> tuple[list[str], list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def fine_tune(
    folder: str, texts: Sequence[str], labels: Sequence[str], epochs: int, seed: int
) -> tuple[nn.Module, object]:
    """A classifier of these labels from a checkpoint, trained as the seed trained BERT: AdamW, 5e-5, batch 32."""
    names = sorted(set(labels))
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tf.set_seed(seed)
    model = tf.AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    rows = [
        {**tokenizer(text, truncation=True, max_length=128), "labels": names.index(label)}
        for text, label in zip(texts, labels, strict=True)
    ]
    args = tf.TrainingArguments(
        "unused",
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        learning_rate=5e-5,
        warmup_steps=50,
        save_strategy="no",
        seed=seed,
        logging_steps=50,
    )
    tf.Trainer(model=model, args=args, train_dataset=rows, data_collator=tf.DataCollatorWithPadding(tokenizer)).train()
    return model, tokenizer


def batches(texts: Sequence[str], tokenizer: object, size: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(texts), size):
        yield dict(
            tokenizer(
                list(texts[start : start + size]), truncation=True, max_length=128, padding=True, return_tensors="pt"
            )
        )


def evaluate(
    model: nn.Module, texts: Sequence[str], labels: Sequence[str], tokenizer: object
) -> tuple[np.ndarray, float]:
    """Whether each text is classified right, and the mean loss."""
    targets = torch.tensor([model.config.label2id[label] for label in labels])
    with torch.no_grad():
        logits = torch.cat([model.eval()(**batch).logits for batch in batches(texts, tokenizer, 64)])
    return (logits.argmax(1) == targets).numpy(), float(nn.functional.cross_entropy(logits, targets))


def paired(one: np.ndarray, other: np.ndarray, seed: int = 0, draws: int = 10_000) -> tuple[float, float, float]:
    """Difference of two accuracies on the same texts, with a bootstrap interval over the texts."""
    difference = one.astype(float) - other.astype(float)
    picks = np.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = np.quantile(difference[picks].mean(axis=1), [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def grid(model: nn.Module, tokenizer: object, train: tuple, heldout: tuple, samples: int, seed: int) -> list[Row]:
    chosen = np.random.default_rng(seed).choice(len(train[0]), samples, replace=False)
    calibration = list(batches([train[0][i] for i in chosen], tokenizer, 32))
    settings = [(way, {"sparsity": share}) for share in SHARES for way in WAYS] + [
        (way, {"pattern": p}) for p in ("2:4", "4:8") for way in WAYS
    ]
    rows, right = [], {}
    for way, asked in settings:
        sparse = copy.deepcopy(model)
        report = sparsify_model(
            sparse, calibration, WandaConfig(**WAYS[way], **asked, calibration_samples=samples), progress=False
        )
        correct, loss = evaluate(sparse, *heldout, tokenizer)
        right[way, *asked.values()] = correct
        low, high = wilson_interval(int(correct.sum()), len(correct))
        share = asked.get("sparsity", 0.5)
        rows.append(Row(way, share, asked.get("pattern"), report.measured, float(correct.mean()), low, high, loss))
        print(rows[-1], flush=True)
    for row in rows:
        key = row.pattern or row.asked
        if row.method != "magnitude":
            row.against_magnitude = paired(right[row.method, key], right["magnitude", key])
    return rows


def markdown(rows: Sequence[Row], facts: dict) -> str:
    lines = [
        "| zeros asked | method | zeros measured | accuracy (95 % interval) | loss | against magnitude (95 % interval) "
        "|"
    ]
    lines.append("| ---: | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        against = (
            "-" if row.against_magnitude is None else "{:+.4f} ({:+.4f} .. {:+.4f})".format(*row.against_magnitude)
        )
        asked = row.pattern or f"{100 * row.asked:.0f} %"
        accuracy = f"{row.accuracy:.4f} ({row.low:.4f} .. {row.high:.4f})"
        lines.append(
            f"| {asked} | {row.method} | {100 * row.measured:.2f} % | {accuracy} | {row.loss:.4f} | {against} |"
        )
    shown = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    note = (
        "Zeros in the linear maps of all blocks, without retraining. They are stored and multiplied like other "
        "numbers: nothing is claimed for size or time."
    )
    return f"# Wanda and magnitude, by the seed's grid\n\n{note}\n\n" + "\n".join(lines) + f"\n\n{shown}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--fine-tune", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--rows", type=int, default=None, help="training rows to fine-tune on; default: all")
    parser.add_argument("--name", help="of the model, for the report; default: the last part of its path")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train, heldout = read(args.train), read(args.heldout)
    start = time.perf_counter()
    if args.fine_tune:
        model, tokenizer = fine_tune(args.model, *(part[: args.rows] for part in train), args.fine_tune, args.seed)
        model.save_pretrained(args.output / "model")
        tokenizer.save_pretrained(args.output / "model")
    else:
        model = tf.AutoModelForSequenceClassification.from_pretrained(args.model)
        tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    facts = {
        "model": args.name or Path(args.model).name,
        "epochs of fine-tuning": args.fine_tune,
        "training rows": len(train[0][: args.rows]),
        "held-out rows": len(heldout[0]),
        "calibration rows": args.samples,
        "seed": args.seed,
        **hardware(),
        **package_versions(),
    }
    rows = grid(model, tokenizer, train, heldout, args.samples, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "wanda_grid.json").write_text(
        json.dumps({"facts": facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    (args.output / "wanda_grid.md").write_text(markdown(rows, facts))
    print(f"{time.perf_counter() - start:.0f} s\n{markdown(rows, facts)}")


if __name__ == "__main__":
    main()
