r"""Which blocks of an image model go at a threshold, by what is compared: whole outputs within batches of 64 and
clusters over the network, as the first experiments did; the same within each stage; positions of images, by the
debiased estimate and by the biased one.

    python -m benchmarks.image_rows --model DIR --train train.parquet --heldout test.parquet --output FOLDER --name NAME

Blocks are compared on training images; the accuracy, on held-out ones, is right after the removal, without any
retraining. Data: .parquet files with an image and a label column.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import nn

from deeparc_hf import PruningPlan, analyze, remove_blocks
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.markdown import table
from deeparc_hf.core.statistics import wilson_interval
from deeparc_hf.errors import CalibrationWarning

from .images import model_input, read_images

WAYS: dict[str, dict[str, Any]] = {
    "whole outputs, over the network (the first experiments)": {"rows": "flat", "across_stacks": True},
    "whole outputs, within each stage": {"rows": "flat"},
    "positions (the default)": {},
    "positions of one image at a time, biased": {"similarity": "cka_biased"},
}


def plans(model: nn.Module, batches: list[Any], samples: int) -> tuple[dict[str, PruningPlan], dict[str, float]]:
    """A plan by each way, and the seconds that comparing took."""
    found, seconds = {}, {}
    for name, settings in WAYS.items():
        start = time.perf_counter()
        found[name] = analyze(model, batches, calibration_samples=samples, threshold=1.0, progress=False, **settings)
        seconds[name] = time.perf_counter() - start
    return found, seconds


def right(model: nn.Module, batches: list[Any], labels: torch.Tensor) -> int:
    """How many images are classified right."""
    with torch.no_grad():
        answers = torch.cat([model.eval()(**batch).logits.argmax(1) for batch in batches])
    return int((answers == labels).sum())


def shown(count: int, of: int) -> str:
    low, high = wilson_interval(count, of)
    return f"{count / of:.3f} ({low:.3f} .. {high:.3f})"


def run(args: argparse.Namespace) -> tuple[list[list[str]], dict[str, Any]]:
    parts = []
    for path, count in ((args.train, args.samples), (args.heldout, None)):
        pixels, labels, _ = read_images(path)
        chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(args.seed))[:count]
        inputs = [
            {"pixel_values": model_input(part, args.image_size)} for part in pixels[chosen].split(args.batch_size)
        ]
        parts.append((inputs, labels[chosen]))
    (calibration, _), (tests, labels) = parts
    model = tf.AutoModelForImageClassification.from_pretrained(args.model).to(memory_format=torch.channels_last)
    found, seconds = plans(model, calibration, args.samples)
    lines = [["nothing", "", "-", "0", shown(right(model, tests, labels), len(labels))]]
    for threshold in args.thresholds:
        for name, plan in found.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CalibrationWarning)  # that it takes many is seen in the table
                removed = plan.replan(threshold=threshold).removed
            pruned = copy.deepcopy(model)
            if removed:
                remove_blocks(pruned, removed)
            blocks = "; ".join(f"{stack.split('.')[-2]}: {', '.join(map(str, b))}" for stack, b in removed.items())
            count = sum(map(len, removed.values()))
            accuracy = shown(right(pruned, tests, labels), len(labels))
            lines.append([name, f"{threshold:g}", blocks or "-", str(count), accuracy])
            print(*lines[-1], sep=" | ", flush=True)
    facts = {
        "model": args.name,
        "images to compare on": args.samples,
        "batches of": args.batch_size,
        "held-out images": len(labels),
        "seed": args.seed,
        "seconds to compare": ", ".join(f"{value:.1f}" for value in seconds.values()),
        **hardware(),
        **package_versions(),
    }
    return lines, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.98, 0.95])
    parser.add_argument("--image-size", type=int, help="sides that images are scaled to; default: as they are")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--name", required=True, help="of the model, for the report")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines, facts = run(args)
    args.output.mkdir(parents=True, exist_ok=True)
    text = [
        f"# Which blocks go, by what is compared: {args.name}",
        f"Blocks compared on {args.samples} training images in batches of {args.batch_size}; accuracy on "
        f"{facts['held-out images']} held-out images, with its 95 % interval, right after the removal, without any "
        "retraining.",
        table(["compared", "threshold", "removed", "number", "accuracy"], lines),
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
    ]
    stem = args.output / f"image_rows_{args.name.lower().replace(' ', '_')}"
    stem.with_suffix(".md").write_text("\n\n".join(text) + "\n")
    stem.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
