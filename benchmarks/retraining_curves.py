r"""Does retraining take fewer epochs after healing? Accuracy of a classifier of texts at each half epoch of retraining,
plain and healed.

A run is named KIND:EPOCHS, where KIND is plain, healed (`heal_model` on training texts, right after the removal),
taught (healed, and taught by the unpruned model, both by `MPruneCallback`) or unpruned (nothing is removed, for
comparison). Each run is a stock Trainer's, with a warm-up and a linear decay of its own, and the same seed. Their last
evaluations are compared on the same held-out texts; the first two runs can be repeated with more seeds.

    python -m benchmarks.retraining_curves --model DIR --train train.csv --heldout test.csv --remove 2,3,4 \
        --output FOLDER --name "MiniLM on emotion"

Data: .csv files with columns text and label.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import nn

from deeparc_hf import MPruneCallback, find_stacks, heal_model, remove_blocks
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.statistics import wilson_interval

from .wanda_grid import paired, read

LENGTH = 64
BATCH = 32
RATE = 5e-5
WARMUP = 0.1  # share of the steps


@dataclass
class Point:
    """One evaluation: epochs of retraining before it, accuracy with its 95 % interval, loss."""

    epoch: float
    accuracy: float
    low: float
    high: float
    loss: float


@dataclass
class Curve:
    """The evaluations of one run, and which held-out texts are right at its end."""

    run: str
    seed: int
    points: list[Point] = field(default_factory=list)
    right: np.ndarray | None = field(default=None, repr=False)
    healing_seconds: float = 0.0
    seconds: float = 0.0
    sites: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        found = {key: value for key, value in asdict(self).items() if key != "right"}
        return {**found, "wrong_texts": [] if self.right is None else np.flatnonzero(~self.right).tolist()}


@dataclass
class Texts:
    """Tokenized texts with their labels, as a Trainer takes them."""

    rows: list[dict[str, Any]]
    tokenizer: Any

    @classmethod
    def of(cls, path: Path, tokenizer: Any, label2id: dict[str, int], order: Sequence[int] | None = None) -> Texts:
        texts, labels = read(path)
        chosen = range(len(texts)) if order is None else order
        settings = {"truncation": True, "max_length": LENGTH}
        return cls([{**tokenizer(texts[i], **settings), "labels": label2id[labels[i]]} for i in chosen], tokenizer)

    def batches(self, count: int) -> list[dict[str, torch.Tensor]]:
        """The first `count` in padded batches."""
        collate = tf.DataCollatorWithPadding(self.tokenizer)
        return [
            dict(collate(self.rows[i : min(i + BATCH, count)])) for i in range(0, min(count, len(self.rows)), BATCH)
        ]


def prepared(args: argparse.Namespace, kind: str, train: Texts, curve: Curve) -> nn.Module:
    """The model that a run begins with."""
    load = tf.AutoModelForSequenceClassification.from_pretrained
    model = load(args.model)
    if kind in ("unpruned", "taught"):
        return model
    remove_blocks(model, {next(iter(find_stacks(model))): [int(block) for block in args.remove.split(",")]})
    if kind == "healed":
        original, start = load(args.model), time.perf_counter()
        curve.sites = [
            str(site) for site in heal_model(model, original, train.batches(args.samples), samples=args.samples)
        ]
        curve.healing_seconds = time.perf_counter() - start
    return model


def taught(args: argparse.Namespace, model: nn.Module) -> MPruneCallback:
    """The callback that removes the blocks at once, heals, and has the unpruned model teach."""
    stack = next(iter(find_stacks(model)))
    removed = {int(block) for block in args.remove.split(",")}
    stay = [f"{stack}.{index}" for index in range(len(find_stacks(model)[stack])) if index not in removed]
    teacher = {"alpha": args.alpha, "temperature": args.temperature, "hidden": args.hidden}
    settings = {
        "num_blocks": len(stay),
        "protect": stay,
        "heal": "lstsq",
        "calibration_samples": args.samples,
        "retrain_epochs": 1,
    }
    return MPruneCallback(**settings, distill=teacher)


def retrain(args: argparse.Namespace, run: str, seed: int, train: Texts, heldout: Texts) -> Curve:
    """Prepare a model, retrain it, and evaluate before and at each half epoch."""
    kind, _, epochs = run.partition(":")
    curve = Curve(run, seed)
    model = prepared(args, kind, train, curve)
    steps = len(train.rows) // BATCH

    def scores(prediction: Any) -> dict[str, float]:
        curve.right = prediction.predictions.argmax(1) == prediction.label_ids
        return {"accuracy": float(curve.right.mean())}

    settings = tf.TrainingArguments(
        str(args.output / "unused"),
        num_train_epochs=int(epochs),
        max_steps=args.max_steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=2 * BATCH,
        learning_rate=RATE,
        warmup_steps=int(WARMUP * steps * int(epochs)),
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=max(1, steps // 2),
        eval_on_start=True,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    callbacks = [taught(args, model)] if kind == "taught" else []
    trainer = tf.Trainer(
        model,
        settings,
        data_collator=tf.DataCollatorWithPadding(train.tokenizer),
        train_dataset=train.rows,
        eval_dataset=heldout.rows,
        compute_metrics=scores,
        callbacks=callbacks,
    )
    start = time.perf_counter()
    trainer.train()
    curve.seconds = time.perf_counter() - start
    n = len(heldout.rows)
    for entry in trainer.state.log_history:
        if "eval_accuracy" in entry and not (
            callbacks and entry["step"] == 0
        ):  # the callback removes the blocks after that one
            low, high = wilson_interval(round(entry["eval_accuracy"] * n), n)
            curve.points.append(Point(entry["step"] / steps, entry["eval_accuracy"], low, high, entry["eval_loss"]))
    return curve


def comparison(ones: Sequence[Curve], others: Sequence[Curve]) -> str:
    """Whether the accuracies at the ends of two runs differ, in a sentence; with several seeds that of the mean over
    them.
    """
    one, other = (np.mean([curve.right for curve in curves], axis=0) for curves in (ones, others))
    difference, low, high = paired(one, other)
    verdict = "does better than" if low > 0 else "does worse than" if high < 0 else "cannot be told apart from"
    seeds = "Seed" + "s" * (len(ones) > 1) + " " + " and ".join(str(curve.seed) for curve in ones)
    return (
        f"{seeds}: {_title(ones[0].run)}, {verdict} {_title(others[0].run)}: {difference:+.4f} ({low:+.4f} .. "
        f"{high:+.4f})."
    )


def markdown(curves: Sequence[Curve], args: argparse.Namespace, facts: dict[str, Any]) -> str:
    seed = curves[0].seed
    first = [curve for curve in curves if curve.seed == seed]
    lines = [
        f"| epochs, seed {seed} | " + " | ".join(_title(curve.run) for curve in first) + " |",
        "| ---: |" + " ---: |" * len(first),
    ]
    for moment in sorted({point.epoch for curve in first for point in curve.points}):
        cells = [next((_cell(p) for p in curve.points if p.epoch == moment), "") for curve in first]
        lines.append(f"| {moment:g} | " + " | ".join(cells) + " |")
    lines.append("| seconds | " + " | ".join(f"{curve.seconds:.0f}" for curve in first) + " |")
    lines += ["", "| at the end | accuracy, loss |", "| --- | ---: |"] if len(first) < len(curves) else []
    lines += [
        f"| {_title(curve.run)}, seed {curve.seed} | {_cell(curve.points[-1])} |"
        for curve in curves
        if curve.seed != seed
    ]
    compared = [comparison([a], [b]) for i, a in enumerate(curves) for b in curves[i + 1 :] if a.seed == b.seed]
    repeated = [[curve for curve in curves if curve.run == run.run] for run in first[:2]]
    if len(repeated[-1]) > 1:
        compared.insert(0, comparison(*repeated))
    healed = [f"{site} Healing took {curve.healing_seconds:.0f} s." for curve in first for site in curve.sites]
    note = (
        f"Blocks {args.remove} removed. Accuracy with its 95 % Wilson interval, then the loss, on held-out texts. Each "
        f"run has a warm-up\nover {100 * WARMUP:g} % of its steps and a linear decay of its own: AdamW, {RATE:g}, "
        f"batches of {BATCH} texts of like length, at most {LENGTH}\ntokens. Seconds include the evaluations, not the "
        "healing; the machine was shared."
    )
    said = (
        "Difference in accuracy at the ends of runs, on the same texts, with a 95 % bootstrap interval over the texts "
        "(the noise of\ntraining itself is not in it):"
    )
    listed = [f"- {line}" for part in (compared, healed[:1]) for line in part]
    shown = [f"- {key}: {value}" for key, value in facts.items()]
    return "\n".join(
        [f"# Retraining after a removal, {args.name}", "", note, "", *lines, "", said, "", *listed, "", *shown, ""]
    )


def _title(run: str) -> str:
    kind, _, epochs = run.partition(":")
    return f"{kind}, {epochs} epoch{'s' if epochs != '1' else ''}"


def _cell(point: Point) -> str:
    return f"{point.accuracy:.4f} ({point.low:.4f} .. {point.high:.4f}), {point.loss:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a fine-tuned classifier, its tokenizer beside it")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--remove", required=True, help="blocks of the first stack, as 2,3,4")
    parser.add_argument("--name", required=True, help="of the model and data, for the report")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--runs", nargs="+", default=["healed:1", "plain:3", "healed:3", "plain:1"], help="KIND:EPOCHS")
    parser.add_argument(
        "--rows", type=int, help="training texts; default: all. Rounded down so that half epochs are whole steps"
    )
    parser.add_argument("--heldout-rows", type=int, help="default: all")
    parser.add_argument("--samples", type=int, default=2000, help="training texts that healing is fitted on")
    parser.add_argument("--alpha", type=float, default=0.5, help="of a taught run")
    parser.add_argument("--temperature", type=float, default=2.0, help="of a taught run")
    parser.add_argument("--hidden", type=float, default=0.0, help="of a taught run")
    parser.add_argument("--max-steps", type=int, default=-1, help="to try the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--more-seeds", type=int, nargs="*", default=[], help="repeat the first two runs with these seeds of training"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, tokenizer = tf.AutoConfig.from_pretrained(args.model), tf.AutoTokenizer.from_pretrained(args.model)
    count = len(read(args.train)[0])
    rows = min(args.rows or count, count) // (2 * BATCH) * 2 * BATCH
    order = np.random.default_rng(args.seed).permutation(count)[:rows]
    train = Texts.of(args.train, tokenizer, config.label2id, order)
    heldout = Texts.of(args.heldout, tokenizer, config.label2id)
    heldout.rows = heldout.rows[: args.heldout_rows]
    facts = {
        "model": args.name,
        "training texts": rows,
        "held-out texts": len(heldout.rows),
        "texts to heal on": args.samples,
    }
    facts |= {"seed": args.seed, **hardware(), **package_versions()}
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"retraining_curves_{args.name.lower().replace(' ', '_')}"
    curves: list[Curve] = []
    for run, seed in [(r, args.seed) for r in args.runs] + [
        (r, seed) for seed in args.more_seeds for r in args.runs[:2]
    ]:
        curves.append(retrain(args, run, seed, train, heldout))
        # after each run: what is done stays, whatever comes
        found = {"facts": facts, "removed": args.remove, "curves": [curve.to_dict() for curve in curves]}
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(curves, args, facts))
    print(stem.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
