"""Which rows should a similarity metric compare? Ranks blocks by similarity and by the damage that their removal does.

For every removable block j that has a predecessor in its stack:

- damage: rise of the held-out loss, and drop of the held-out accuracy, when only block j is skipped, without
  retraining;
- similarity: that of the outputs of blocks j - 1 and j on TRAINING samples, for every metric and every kind of rows.

Reported, for each choice of metric and rows: the rank correlation of 1 - similarity with damage (mean over calibration
seeds; 95 % bootstrap interval over held-out examples, the same draws for all choices, so that differences are paired),
and what decides: the loss and accuracy after removing 1, 2, 3, ... blocks as a plan from these similarities would,
beside removing the blocks of least damage and removing random ones.

    python -m benchmarks.rows_evidence --model DIR --train train.csv --heldout test.csv

Data: .csv files with columns text and label (a name in the model's id2label; not used for causal models), or .parquet
files with an image and a label column. The kind of model (classifier of texts, causal language model, classifier of
images) is read from its config.

What it found: the Spearman correlation of 1 - CKA(j - 1, j), on training data, with the rise of the held-out loss when
block j alone is skipped (95 % bootstrap over held-out examples):

    model, data (blocks that can go; held-out n)            tokens, 8 a sample  mean                 first
    MiniLM-L6 fine-tuned on Emotion (5; 2,000)              .20 (.00 .. .60)   -.70 (-.70 .. -.50)  -.70 (-.90 .. -.40)
    MiniLM-L6 fine-tuned on BBC News (5; 600)               .60 (.00 .. .80)   -.30 (-.70 .. .00)   -.92 (-.94 .. -.36)
    SmolLM2-135M (4-bit GGUF weights) on BBC News (29; 32)  .80 (.76 .. .82)    .54 (.50 .. .59)     .69 (.64 .. .75)
    small ResNet trained on a CIFAR-10 subset (12; 1,000)   .96 (.84 .. .97)    .77 (.57 .. .79)     .71 (.62 .. .86)

Tokens rank best of the three on all four, so they are the default; 32 or all tokens a sample rank no better than 8. The
mean and the first token mislead most in classifiers: there the last block looks redundant, and removing it alone takes
Emotion's accuracy from .93 to .47 (.89 for the block that tokens choose). Limits: two of the rankings rest on 5 blocks;
damage is that before retraining (40 steps take the last block's on Emotion from 1.24 to .15, and no choice of rows is
shown to rank MiniLM's blocks then); the cosine ranks SmolLM2's blocks better (.87) and the ResNet's worse (.49). In
causal models a few outsized activations can carry the variance of the tokens: most of SmolLM2's blocks score above .99
(0.98 would keep 6 of 30), so prefer a target to a threshold.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor, nn

from deeparc_hf import MPruneConfig, find_stacks, remove_blocks
from deeparc_hf.architectures import Stack, describe
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.hooks import hidden_states
from deeparc_hf.observe.rows import StackObserver, observe
from deeparc_hf.pruning.plan import ComparedStack, make_plan
from deeparc_hf.similarity import ROW_KINDS, metrics

from .ranking import correlations

Blocks = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Choice:
    """A metric, the rows it compares, and the most positions of a sample where rows are tokens (None: all)."""

    metric: str
    rows: str
    tokens: int | None = None

    def __str__(self) -> str:
        return f"{self.metric} {self.rows}" + (f" ({self.tokens or 'all'})" if self.rows == "tokens" else "")


@dataclass
class Data:
    """Samples with labels, and how to make a batch of them."""

    samples: list[Any]
    labels: list[int]
    collate: Callable[[list[Any], list[int]], dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, count: int, seed: int) -> Data:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        return Data([self.samples[i] for i in order], [self.labels[i] for i in order], self.collate)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self), size):
            yield self.collate(self.samples[start : start + size], self.labels[start : start + size])


@dataclass
class Subject:
    """A model with its held-out data; remembers what each removal costs.

    `cost(blocks)` gives the loss and the accuracy of every held-out example, each of shape (N,), with these blocks
    skipped.
    """

    model: nn.Module
    heldout: Data
    batch_size: int
    _known: dict[Blocks, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def causal(self) -> bool:
        return "CausalLM" in type(self.model).__name__

    def cost(self, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
        blocks = tuple(sorted(blocks))
        if blocks not in self._known:
            with torch.inference_mode(), skipping(self.model, blocks):
                parts = [_score(self.model, batch, self.causal) for batch in self.heldout.batches(self.batch_size)]
            self._known[blocks] = tuple(np.concatenate(part) for part in zip(*parts, strict=True))  # type: ignore[assignment]
            loss, accuracy = self._known[blocks]
            print(
                f"# skip {show(blocks, full=True)}: loss {loss.mean():.4f} accuracy {accuracy.mean():.4f}",
                file=sys.stderr,
                flush=True,
            )
        return self._known[blocks]


@contextmanager
def skipping(model: nn.Module, blocks: Blocks) -> Iterator[None]:
    """Within, these blocks give out what they are given."""
    stacks = find_stacks(model)
    handles = [stacks[name].blocks[index].register_forward_hook(_give_back, with_kwargs=True) for name, index in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    assert given.shape == hidden_states(output).shape
    return given if isinstance(output, Tensor) else (given, *output[1:])


def _score(model: nn.Module, batch: dict[str, Tensor], causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Loss and accuracy of each example; for a causal model the means over its next tokens."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, **({"use_cache": False} if causal else {})).logits.float()
    if not causal:
        return _numpy(nn.functional.cross_entropy(logits, labels, reduction="none")), _numpy(
            (logits.argmax(-1) == labels).float()
        )
    logits, labels = logits[:, :-1], labels[:, 1:]
    real = labels != -100
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    hit = (logits.argmax(-1) == labels) & real
    return _numpy(loss.sum(1) / real.sum(1)), _numpy(hit.sum(1) / real.sum(1))


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().numpy()


def check_skipping(subject: Subject, block: tuple[str, int]) -> float:
    """Greatest difference of the logits between skipping a block and removing it, on one batch."""
    batch = next(iter(subject.heldout.batches(4)))
    batch.pop("labels")
    smaller = copy.deepcopy(subject.model)
    remove_blocks(smaller, {block[0]: [block[1]]})
    with torch.inference_mode():
        with skipping(subject.model, (block,)):
            skipped = subject.model(**batch).logits
        return float((smaller.eval()(**batch).logits - skipped).abs().max())


def retrained(subject: Subject, train: Data, blocks: Blocks, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Loss and accuracy of every held-out example after removing blocks and a short retraining (AdamW, 5e-5, linear
    decay).
    """
    model = copy.deepcopy(subject.model)
    if blocks:
        remove_blocks(model, {name: [i for n, i in blocks if n == name] for name, _ in blocks})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    torch.manual_seed(0)
    model.train()
    for step, batch in enumerate(train.take(steps * subject.batch_size, 0).batches(subject.batch_size)):
        optimizer.param_groups[0]["lr"] = 5e-5 * (1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Subject(model.eval(), subject.heldout, subject.batch_size).cost(())


def similarities(
    model: nn.Module, data: Data, batch_size: int, choices: Sequence[Choice]
) -> dict[Choice, dict[str, ComparedStack]]:
    """What `analyze` finds, for all choices in one pass over the data."""
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    observers = [(choice, _observer(stack, choice)) for choice in choices for stack in stacks.values()]
    calibration = Calibration(data.batches(batch_size), len(data))
    observe(host, [observer for _, observer in observers], calibration)
    compared: dict[Choice, dict[str, ComparedStack]] = {choice: {} for choice in choices}
    for choice, observer in observers:
        matrix = observer.metric.matrix(observer.metric.finish()).tolist()
        compared[choice][observer.stack.name] = ComparedStack(tuple(map(tuple, matrix)), observer.stack.pinned)
    return compared


def _observer(stack: Stack, choice: Choice) -> StackObserver:
    metric = metrics.get(choice.metric)()
    metric.tokens_per_sample = choice.tokens  # type: ignore[misc]
    return StackObserver(stack, metric, choice.rows)


def decisions(
    subject: Subject,
    compared: Sequence[Mapping[Choice, Mapping[str, ComparedStack]]],
    order: Sequence[tuple[str, int]],
    count: int,
    randoms: int,
) -> list[dict[str, Any]]:
    """What is left after removing `count` blocks, by each choice, by least damage (`order`) and at random."""
    total = sum(len(stack) for stack in next(iter(compared[0].values())).values())
    config = MPruneConfig(num_blocks=total - count)
    rows = []
    for choice in compared[0]:
        plans = [make_plan(by_choice[choice], config) for by_choice in compared]
        chosen = [tuple((name, index) for name, gone in plan.removed.items() for index in gone) for plan in plans]
        rows.append(_outcome(subject, str(choice), chosen))
    rows.append(_outcome(subject, "(least damage)", [tuple(order[:count])]))
    rng = np.random.default_rng(0)
    picks = range(len(order)) if count == 1 else range(randoms)
    random = [
        (order[i],) if count == 1 else tuple(order[k] for k in rng.choice(len(order), count, replace=False))
        for i in picks
    ]
    return [*rows, _outcome(subject, "(random)", random)] if random else rows


def _outcome(subject: Subject, name: str, chosen: Sequence[Blocks]) -> dict[str, Any]:
    costs = [subject.cost(blocks) for blocks in chosen]
    distinct = sorted({tuple(sorted(blocks)) for blocks in chosen})
    return {
        "choice": name,
        "loss": float(np.mean([loss.mean() for loss, _ in costs])),
        "accuracy": float(np.mean([accuracy.mean() for _, accuracy in costs])),
        "removed": [show(blocks, full=len(find_stacks(subject.model)) > 1) for blocks in distinct],
    }


def show(blocks: Blocks, full: bool) -> str:
    """Indices; with the name of the stage if full."""
    return "{" + " ".join(f"{n.split('.')[-2]}.{i}" if full else str(i) for n, i in sorted(blocks)) + "}"


def load(args: argparse.Namespace) -> tuple[nn.Module, Callable[[Path], Data]]:
    """The model, and what reads its data."""
    config = tf.AutoConfig.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    architecture = (config.architectures or [""])[0]
    if "ImageClassification" in architecture:
        return tf.AutoModelForImageClassification.from_pretrained(args.model, dtype=dtype), lambda path: _images(
            path, args.image_range, dtype
        )
    causal = "CausalLM" in architecture
    auto = tf.AutoModelForCausalLM if causal else tf.AutoModelForSequenceClassification
    tokenizer = tf.AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = auto.from_pretrained(args.model, dtype=dtype)
    return model, lambda path: _texts(
        path, tokenizer, args.max_length, None if causal else [config.id2label[i] for i in range(config.num_labels)]
    )


def _texts(path: Path, tokenizer: Any, max_length: int, labels: list[str] | None) -> Data:
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))

    def collate(texts: list[str], classes: list[int]) -> dict[str, Tensor]:
        batch = dict(
            tokenizer(
                texts, truncation=True, max_length=max_length, padding=True, padding_side="right", return_tensors="pt"
            )
        )
        if labels is None:
            return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
        return {**batch, "labels": torch.tensor(classes)}

    return Data([row["text"] for row in rows], [labels.index(row["label"]) if labels else 0 for row in rows], collate)


def _images(path: Path, limits: list[float], dtype: torch.dtype) -> Data:
    import datasets

    table = datasets.Dataset.from_parquet(str(path))
    image, label = table.column_names[:2]
    low, high = limits

    def collate(images: list[Any], classes: list[int]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2) / 255
        return {"pixel_values": (low + (high - low) * pixels).to(dtype), "labels": torch.tensor(classes)}

    return Data(list(table[image]), list(table[label]), collate)


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def report(result: Mapping[str, Any]) -> str:
    lines = [
        f"Held-out: n={result['heldout']}, loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}. Calibration: "
        f"{result['samples']} training samples, seeds {result['seeds']}. Logits of skipping and of removing differ by "
        f"{result['skip_error']:.1e}."
    ]
    for name, part in result["damage"].items():
        lines += [
            "",
            f"Damage of each block (rise of loss), {name}: "
            + " ".join(f"{n}:{d:.3f}" for n, d in part["blocks"].items()),
            "",
        ]
        head = [
            "metric, rows",
            "Spearman",
            "95 % (examples)",
            "over seeds",
            "Kendall",
            "Spearman, accuracy",
            "minus reference (95 %)",
        ]
        lines.append(table([head, *map(_correlation_row, part["correlations"])]))
    for count, rows in result["decisions"].items():
        head = [f"{count} removed", "loss", "accuracy", "blocks (each distinct choice over seeds)"]
        lines += ["", table([head, *map(_decision_row, rows)])]
    return "\n".join(lines)


def _correlation_row(row: Mapping[str, Any]) -> list[str]:
    spans = ["{:.2f} .. {:.2f}".format(*row[key]) for key in ("interval", "over_seeds")]
    gap = "{:+.2f} ({:+.2f} .. {:+.2f})".format(*row["minus_reference"])
    return [
        row["choice"],
        f"{row['spearman']:.2f}",
        *spans,
        f"{row['kendall']:.2f}",
        f"{row['spearman_accuracy']:.2f}",
        gap,
    ]


def _decision_row(row: Mapping[str, Any]) -> list[str]:
    removed = f"{len(row['removed'])} different" if len(row["removed"]) > 6 else " ".join(row["removed"])
    return [row["choice"], f"{row['loss']:.4f}", f"{row['accuracy']:.4f}", removed]


def choices_of(args: argparse.Namespace) -> list[Choice]:
    choices = [Choice("cka", "tokens", tokens or None) for tokens in args.tokens]
    choices += [Choice("cka", rows) for rows in ROW_KINDS if rows != "tokens"]
    return choices + [
        Choice(name, rows, 32 if rows == "tokens" else None) for name in ("cka_biased", "cosine") for rows in ROW_KINDS
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    model, read = load(args)
    subject = Subject(model.eval(), read(args.heldout).take(args.heldout_samples, 0), args.batch_size)
    blocks = [(n, i) for n, s in find_stacks(model).items() for i in range(1, len(s)) if i not in s.pinned]
    skip_error = check_skipping(subject, blocks[len(blocks) // 2])
    train, choices = read(args.train), choices_of(args)
    compared = [similarities(model, train.take(args.samples, seed), args.batch_size, choices) for seed in args.seeds]
    distances = {
        c: np.array([[1 - by[c][n].similarity[i - 1][i] for n, i in blocks] for by in compared]) for c in choices
    }
    costs = {"as it is": {b: subject.cost(b) for b in [(), *((block,) for block in blocks)]}}
    if args.retrain_steps:
        costs[f"after {args.retrain_steps} steps of retraining"] = {
            b: retrained(subject, train, b, args.retrain_steps) for b in costs["as it is"]
        }
    damage, order = {}, blocks
    for name, cost in reversed(costs.items()):
        loss = np.stack([cost[block,][0] - cost[()][0] for block in blocks])
        accuracy = np.stack([cost[()][1] - cost[block,][1] for block in blocks])
        order = [blocks[i] for i in np.argsort(loss.mean(1))]
        by_block = {
            show((block,), full=len(find_stacks(model)) > 1): float(d)
            for block, d in zip(blocks, loss.mean(1), strict=True)
        }
        rows = correlations(distances, loss, accuracy, Choice("cka", "mean"), args.draws, 0)
        damage[name] = {"blocks": by_block, "correlations": rows}
    return {
        "heldout": len(subject.heldout),
        "loss": float(subject.cost(())[0].mean()),
        "accuracy": float(subject.cost(())[1].mean()),
        "samples": args.samples,
        "seeds": args.seeds,
        "skip_error": skip_error,
        "distances": {str(c): d.tolist() for c, d in distances.items()},
        "damage": damage,
        "decisions": {count: decisions(subject, compared, order, count, args.random) for count in args.remove},
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a fine-tuned model, its tokenizer beside it")
    parser.add_argument("--train", type=Path, required=True, help="training data, for calibration")
    parser.add_argument("--heldout", type=Path, required=True, help="data that the model was not trained on")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--image-range", type=float, nargs=2, default=[-1.0, 1.0], help="values of black and of white")
    parser.add_argument("--samples", type=int, default=512, help="calibration samples")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the choice of calibration samples"
    )
    parser.add_argument("--heldout-samples", type=int, default=2000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 32, 0], help="most positions of a sample; 0: all")
    parser.add_argument("--remove", type=int, nargs="+", default=[1, 2, 3], help="numbers of blocks to remove")
    parser.add_argument(
        "--random", type=int, default=5, help="random removals of each number of blocks, for comparison"
    )
    parser.add_argument(
        "--retrain-steps", type=int, default=0, help="also measure the damage that a retraining of so many steps leaves"
    )
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    result = run(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), "utf-8")
    print(report(result))


if __name__ == "__main__":
    main()
