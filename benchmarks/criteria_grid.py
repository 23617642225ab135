r"""Which criterion kept more: the metric right after each criterion's blocks are removed, plain and healed, without any
retraining.

Searches, and criteria of other methods, are compared by `search_evidence`.

Each criterion chooses on training samples. A classifier of texts or of images (accuracy with its 95 % Wilson interval;
of images the loss too) or a causal language model (perplexity with a 95 % bootstrap interval over the held-out
sequences).

    python -m benchmarks.criteria_grid --model DIR --train train.csv --heldout test.csv --remove 1 2 3 \
        --output FOLDER --name NAME

Data: .csv files with a column text, and a column label for a classifier; .parquet files with an image and a label
column.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deeparc_hf import PruningPlan, analyze, find_stacks, heal_model, remove_blocks
from deeparc_hf.core.environment import hardware, package_versions

from .healing_grid import Measured, Removal, Subject, shown, subject_of, subject_parser

CRITERIA: dict[str, dict[str, str]] = {
    "cka, keep=leader": {"similarity": "cka"},
    "cka, keep=last": {"similarity": "cka", "keep": "last"},
    "cosine, keep=leader": {"similarity": "cosine"},
    "effect, keep=leader": {"similarity": "effect"},
    "effect, keep=last": {"similarity": "effect", "keep": "last"},
    "effect, linkage=adjacent": {"similarity": "effect", "linkage": "adjacent"},
}


def plans(
    model: nn.Module, calibration: Sequence[Any], samples: int
) -> tuple[dict[str, PruningPlan], dict[str, float]]:
    """A plan by each criterion, and the seconds that each metric took; criteria of one metric share its pass over the
    data.
    """
    found: dict[str, PruningPlan] = {}
    seconds: dict[str, float] = {}
    base: dict[str, PruningPlan] = {}
    total = sum(map(len, find_stacks(model).values()))
    for name, settings in CRITERIA.items():
        metric = settings["similarity"]
        if metric not in base:
            start = time.perf_counter()
            base[metric] = analyze(
                model, calibration, similarity=metric, calibration_samples=samples, num_blocks=total, progress=False
            )
            seconds[metric] = time.perf_counter() - start
        found[name] = base[metric].replan(**settings)
    return found, seconds


class Outcomes:
    """The metric after blocks were removed, plain and healed; each choice of blocks is measured once."""

    def __init__(self, subject: Subject, samples: int) -> None:
        self._subject, self._samples = subject, samples
        self._known: dict[str, tuple[Measured, Measured]] = {}

    def __call__(self, removal: Removal) -> tuple[Measured, Measured]:
        if str(removal) not in self._known:
            pruned = copy.deepcopy(self._subject.model)
            remove_blocks(pruned, removal.blocks)
            plain = self._subject.measure(pruned)
            heal_model(pruned, self._subject.model, self._subject.calibration, samples=self._samples)
            self._known[str(removal)] = plain, self._subject.measure(pruned)
        return self._known[str(removal)]


def best(rows: Sequence[Mapping[str, Any]], column: str, higher: bool) -> str:
    """The criteria that kept most, and whether the others' intervals overlap theirs."""
    top = (max if higher else min)((row[column] for row in rows), key=lambda values: values[0])
    names = [row["criterion"] for row in rows if row[column][0] == top[0]]
    others = [row[column] for row in rows if row[column][0] != top[0]]
    if not others:
        return "all criteria kept the same"
    overlap = any(values[1] <= top[2] and top[1] <= values[2] for values in others)
    verdict = "intervals overlap" if overlap else "no other's interval overlaps"
    return f"{' and '.join(names)} kept most ({shown(top)}; {verdict})"


def report(args: argparse.Namespace, result: Mapping[str, Any], higher: bool) -> str:
    metric, parts = result["metric"], [f"# Which criterion kept more: {args.name}"]
    parts.append(
        f"Blocks chosen on {result['facts']['samples to choose on']} training samples; {metric} with its 95 % interval "
        f"right after the removal, without any retraining. Original: {shown(result['original'])}."
    )
    for count, rows in result["rows"].items():
        lines = [f"| {count} removed | blocks | {metric}, plain | {metric}, healed |", "| --- | --- | ---: | ---: |"]
        for row in rows:
            lines.append(f"| {row['criterion']} | {row['removed']} | {shown(row['plain'])} | {shown(row['healed'])} |")
        parts.append("\n".join(lines))
    parts.append(
        "\n".join(
            f"- {count} removed: plain, {best(rows, 'plain', higher)}; healed, {best(rows, 'healed', higher)}."
            for count, rows in result["rows"].items()
        )
    )
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    parts.append(f"Time to compare the blocks: {seconds}.")
    parts.append("\n".join(f"- {key}: {value}" for key, value in result["facts"].items()))
    return "\n\n".join(parts) + "\n"


def run(args: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    chosen_on, args.samples = args.samples, max(args.samples, args.fit)  # as many are read
    subject = subject_of(args)
    chosen, seconds = plans(subject.model.eval(), subject.calibration, chosen_on)
    outcomes, single = Outcomes(subject, args.fit), len(find_stacks(subject.model)) == 1
    rows: dict[int, list[dict[str, Any]]] = {}
    for count in args.remove:
        rows[count] = []
        for name, plan in chosen.items():
            removed = plan.replan(num_blocks=plan.num_blocks - count).removed
            removal = Removal({stack: list(blocks) for stack, blocks in removed.items()}, plain=single)
            plain, healed = outcomes(removal)
            rows[count].append({"criterion": name, "removed": str(removal), "plain": plain, "healed": healed})
            print(count, name, removal, shown(plain), shown(healed), flush=True)
    available = sum(len(next(iter(batch.values()))) for batch in subject.calibration)
    facts = {
        "model": args.name,
        "samples to choose on": min(chosen_on, available),
        "samples to heal on": min(args.fit, available),
        "held-out samples": subject.tests,
        "seed": args.seed,
        **hardware(),
        **package_versions(),
    }
    result = {
        "facts": facts,
        "metric": subject.metric,
        "original": subject.measure(subject.model),
        "seconds": seconds,
        "rows": rows,
    }
    return result, subject.metric == "accuracy"


def main() -> None:
    parser = subject_parser(__doc__)
    parser.add_argument("--remove", type=int, nargs="+", default=[1, 2, 3], help="numbers of blocks to remove")
    parser.add_argument("--samples", type=int, default=512, help="training samples to choose on")
    parser.add_argument("--fit", type=int, default=2000, help="training samples to heal on")
    parser.add_argument("--tests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result, higher = run(args)
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"criteria_{args.name.lower().replace(' ', '_')}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(report(args, result, higher))


if __name__ == "__main__":
    main()
