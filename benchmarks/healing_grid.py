r"""What healing gives back: the metric right after blocks are removed, plain and healed, without any retraining.

A classifier of texts or of images (accuracy with its 95 % Wilson interval; of images the loss too) or a causal language
model (perplexity with a 95 % bootstrap interval over the held-out sequences). The map before each removal site is
refitted on training samples; each fifth of them is held out.

    python -m benchmarks.healing_grid --model DIR --train train.csv --heldout test.csv --remove 4 --remove 3,4 \
        --output FOLDER --name NAME
    python -m benchmarks.healing_grid --model DIR --train train.parquet --heldout test.parquet --image-size 64 \
        --each --choose 2 --remove stages.1:1,2+stages.2:3 --output FOLDER --name NAME

Blocks to remove: 3,4 are those of the first stack; STACK:1,2 those of the one stack whose path has STACK in it; + joins
several. They can also be chosen: --each removes each removable block alone, --choose N those N that
`deeparc_hf.analyze` chooses on the training samples, with keep="last" and with keep="leader".

Data: .csv files with a column text, and a column label for a classifier; .parquet files with an image and a label
column.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import nn

from deeparc_hf import analyze, find_stacks, heal_model, remove_blocks
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.statistics import wilson_interval
from deeparc_hf.healing.heal import Healing

from .images import model_input, read_images

BATCH = 32
Measured = tuple[float, ...]  # the metric, its interval, and the loss where it is measured


@dataclass
class Subject:
    """A model with its data, and how it is measured."""

    model: nn.Module
    calibration: list[dict[str, torch.Tensor]]
    tests: int
    metric: str
    scored: Callable[[Sequence[torch.Tensor]], Measured]  # by the logits of the held-out batches
    heldout: list[dict[str, torch.Tensor]]
    training: list[dict[str, torch.Tensor]]  # with labels

    def outputs(self, model: nn.Module) -> Iterator[Any]:
        """What a model puts out for the held-out batches, one after another."""
        options = {"use_cache": False} if self.metric == "perplexity" else {}
        for batch in self.heldout:
            with torch.no_grad():
                yield model.eval()(**batch, **options)

    def measure(self, model: nn.Module) -> Measured:
        return self.scored([output.logits for output in self.outputs(model)])


@dataclass
class Removal:
    """Blocks to remove, by stack, and by what they were chosen."""

    blocks: dict[str, list[int]]
    plain: bool = False  # given without the name of a stack
    chosen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.plain:
            return ", ".join(str(block) for blocks in self.blocks.values() for block in blocks)
        named = [
            f"{'.'.join(name.split('.')[-3:-1]) or name}: {', '.join(map(str, blocks))}"
            for name, blocks in self.blocks.items()
        ]
        return " + ".join(named) + (f" ({', '.join(self.chosen)})" if self.chosen else "")

    def to_json(self) -> Any:
        return next(iter(self.blocks.values())) if self.plain else self.blocks


def texts_of(path: Path, count: int, seed: int) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chosen = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in chosen]


def batches(
    rows: Sequence[dict[str, str]], tokenizer: object, causal: bool, length: int, size: int = BATCH
) -> list[dict[str, torch.Tensor]]:
    texts = [row["text"] for row in rows]
    if not causal:
        settings = {"truncation": True, "max_length": length, "padding": True, "return_tensors": "pt"}
        return [dict(tokenizer(texts[i : i + size], **settings)) for i in range(0, len(texts), size)]
    # whole sequences of one length: texts end to end
    ids = torch.tensor(tokenizer("\n\n".join(texts))["input_ids"])
    ids = ids[: len(ids) // length * length].view(-1, length)[: len(rows)]
    return [{"input_ids": part} for part in ids.split(8)]


def accuracy(logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, float, float]:
    right = logits.argmax(1) == targets
    return float(right.float().mean()), *wilson_interval(int(right.sum()), len(right))


def perplexity(
    logits: Sequence[torch.Tensor], given: Sequence[Mapping[str, torch.Tensor]]
) -> tuple[float, float, float]:
    losses = []
    for found, batch in zip(logits, given, strict=True):
        ids = batch["input_ids"][:, 1:]
        losses += nn.functional.cross_entropy(found[:, :-1].transpose(1, 2), ids, reduction="none").mean(dim=1).tolist()
    values = np.array(losses)
    draws = values[np.random.default_rng(0).integers(0, len(values), (2000, len(values)))].mean(axis=1)
    return math.exp(values.mean()), *(math.exp(q) for q in np.quantile(draws, [0.025, 0.975]))


def language_subject(args: argparse.Namespace) -> Subject:
    """A classifier of texts, or a causal language model from a GGUF file."""
    causal = args.gguf is not None
    kind = tf.AutoModelForCausalLM if causal else tf.AutoModelForSequenceClassification
    options = {"gguf_file": args.gguf} if causal else {}
    model, tokenizer = (
        kind.from_pretrained(args.model, **options),
        tf.AutoTokenizer.from_pretrained(args.model, **options),
    )
    if causal:  # a model from a GGUF file is marked as quantized; a fresh one with its weights is not
        state, config = (
            model.state_dict(),
            tf.LlamaConfig.from_dict({**model.config.to_dict(), "quantization_config": None}),
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = tf.LlamaForCausalLM(config)
        model.load_state_dict(state)
    more = args.retrain
    train, heldout = texts_of(args.train, max(args.samples, more), args.seed), texts_of(args.heldout, args.tests, 0)
    calibration, given, training = (
        batches(texts, tokenizer, causal, args.length) for texts in (train[: args.samples], heldout, train[:more])
    )
    tests = sum(len(batch["input_ids"]) for batch in given)
    if causal:
        training = [{**batch, "labels": batch["input_ids"]} for batch in training]
        return Subject(
            model, calibration, tests, "perplexity", lambda logits: perplexity(logits, given), given, training
        )
    known, targets = (torch.tensor([model.config.label2id[row["label"]] for row in rows]) for rows in (train, heldout))
    pairs = zip(training, known[: more or None].split(BATCH), strict=False)  # rows beyond those of the epoch may follow
    training = [{**batch, "labels": labels} for batch, labels in pairs]

    return Subject(
        model,
        calibration,
        tests,
        "accuracy",
        lambda logits: accuracy(torch.cat(list(logits)), targets),
        given,
        training,
    )


def image_subject(args: argparse.Namespace) -> Subject:
    """A classifier of images; nothing is done to them but to scale them."""
    more, parts = args.retrain, []
    for path, count, seed in ((args.train, max(args.samples, more), args.seed), (args.heldout, args.tests, 0)):
        pixels, labels, _ = read_images(path)
        chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(pixels))[:count])
        parts.append((model_input(pixels[chosen], args.image_size), labels[chosen]))
    (train, known), (heldout, targets) = parts
    calibration, given = (
        [{"pixel_values": part} for part in pixels.split(64)] for pixels in (train[: args.samples], heldout)
    )
    pairs = zip(train[:more].split(64), known[:more].split(64), strict=True) if more else ()
    training = [{"pixel_values": part, "labels": labels} for part, labels in pairs]

    def scored(parts: Sequence[torch.Tensor]) -> Measured:
        logits = torch.cat(list(parts))
        return *accuracy(logits, targets), float(nn.functional.cross_entropy(logits, targets))

    model = tf.AutoModelForImageClassification.from_pretrained(args.model).to(memory_format=torch.channels_last)
    return Subject(model, calibration, len(targets), "accuracy", scored, given, training)


def subject_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a program that measures a model on held-out samples."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", help="name of the file, where the model is one")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--image-size", type=int, help="sides that images are scaled to; default: as they are")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text, at most")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--name", required=True, help="of the model, for the report")
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(retrain=0)
    return parser


def subject_of(args: argparse.Namespace) -> Subject:
    """The model and the data that the options name."""
    return image_subject(args) if args.train.suffix == ".parquet" else language_subject(args)


def parsed(given: str, stacks: Sequence[str]) -> Removal:
    """Blocks to remove as the command line names them.

    Raises:
        SystemExit: if a name is not that of one stack.
    """
    if ":" not in given:
        return Removal({stacks[0]: [int(block) for block in given.split(",")]}, plain=True)
    blocks = {}
    for part in given.split("+"):
        name, _, listed = part.partition(":")
        found = [stack for stack in stacks if name == stack] or [stack for stack in stacks if name in stack]
        if len(found) != 1:
            raise SystemExit(f"{name!r} stands for {len(found)} of the stacks {', '.join(stacks)}")
        blocks[found[0]] = [int(block) for block in listed.split(",")]
    return Removal(blocks)


def removals(args: argparse.Namespace, subject: Subject) -> list[Removal]:
    """What is to be removed, in the order in which it is reported."""
    stacks = find_stacks(subject.model)
    found = [parsed(given, list(stacks)) for given in args.remove]
    if args.each:
        found += [
            Removal({name: [i]})
            for name, stack in stacks.items()
            for i in range(1, len(stack))
            if i not in stack.pinned
        ]
    total = sum(map(len, stacks.values()))
    for count in args.choose:
        for keep in ("last", "leader"):
            settings = {"num_blocks": total - count, "keep": keep, "calibration_samples": args.samples}
            plan = analyze(subject.model, subject.calibration, progress=False, **settings)
            blocks = {name: sorted(indices) for name, indices in plan.removed.items() if indices}
            same = next((removal for removal in found if removal.blocks == blocks and not removal.plain), None)
            if same is None:
                found.append(Removal(blocks, chosen=[f"keep {keep}"]))
            else:
                same.chosen.append(f"keep {keep}")
    return found


def main() -> None:
    parser = subject_parser(__doc__)
    parser.add_argument(
        "--remove", action="append", default=[], help="blocks, as 3,4 or STACK:1,2+STACK:3; may be repeated"
    )
    parser.add_argument("--each", action="store_true", help="each removable block but the first of a stack, alone")
    parser.add_argument(
        "--choose", type=int, action="append", default=[], metavar="N", help="N blocks as a plan would; may be repeated"
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not (args.remove or args.each or args.choose):
        parser.error("give at least one of --remove, --each and --choose")
    torch.set_num_threads(args.threads)
    images, subject = args.train.suffix == ".parquet", subject_of(args)
    model, metric = subject.model, subject.metric
    stacks = find_stacks(model)
    total = sum(map(len, stacks.values())) if images else len(next(iter(stacks.values())))
    original = subject.measure(model)
    lines = [f"| removed of {total} | {metric}, plain | {metric}, healed | squared error left at each site (%) |"]
    lines += ["| --- | ---: | ---: | ---: |", f"| none | {shown(original)} | | |"]
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for removal in removals(args, subject):
        pruned = copy.deepcopy(model)
        remove_blocks(pruned, removal.blocks)
        plain = subject.measure(pruned)
        healings = heal_model(pruned, model, subject.calibration, samples=args.samples)
        healed = subject.measure(pruned)
        left = ", ".join("-" if h.reason else f"{100 * h.held_out:.1f}" for h in healings)
        lines.append(f"| {removal} | {shown(plain)} | {shown(healed)} | {left} |")
        rows.append(
            {"removed": removal.to_json(), "plain": plain, "healed": healed, "sites": [h.to_dict() for h in healings]}
        )
        if images:
            rows[-1]["chosen"] = removal.chosen
            notes += _notes(removal, original[0], plain[0], healed[0], healings)
        print(lines[-1], flush=True)
    samples = sum(len(next(iter(batch.values()))) for batch in subject.calibration)
    facts = {
        "model": args.name,
        "samples to fit on": samples,
        "held-out samples": subject.tests,
        "seed": args.seed,
        **hardware(),
        **package_versions(),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"healing_{args.name.lower().replace(' ', '_')}"
    stem.with_suffix(".json").write_text(
        json.dumps({"facts": facts, "original": original, "rows": rows}, indent=1) + "\n"
    )
    listed = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    if images:
        lines += [
            "",
            *(
                notes
                or [
                    "Nowhere does healing leave more than half of a loss of 5 points or more, and no site is left "
                    "alone."
                ]
            ),
        ]
    text = (
        f"# Healing {args.name}\n\nRight after the removal, without any retraining.\n\n"
        + "\n".join(lines)
        + f"\n\n{listed}\n"
    )
    stem.with_suffix(".md").write_text(text)


def _notes(removal: Removal, original: float, plain: float, healed: float, healings: Sequence[Healing]) -> list[str]:
    """Sites that are left alone, and what is said of each where healing leaves more than half of a loss of 5 points or
    more.
    """
    if original - plain > 0.05 and original - healed > (original - plain) / 2:
        left = 100 * (original - healed) / (original - plain)
        return [f"- {removal}: {left:.0f} % of the loss in accuracy remain."] + [
            f"  - {healing}" for healing in healings
        ]
    return [f"- {removal}: {healing}" for healing in healings if healing.reason]


def shown(values: Measured) -> str:
    """A metric with its interval, and the loss where it is measured."""
    digits = 4 if values[0] <= 1 else 1
    loss = "".join(f", loss {loss:.3f}" for loss in values[3:])
    return f"{values[0]:.{digits}f} ({values[1]:.{digits}f} .. {values[2]:.{digits}f}){loss}"


if __name__ == "__main__":
    main()
