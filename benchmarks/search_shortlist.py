r"""What it costs a greedy search, and what it saves, to try at each step only the blocks that were missed least when
they were last tried (`Additions` of the package).

For each number of blocks that are tried, of each number of removed blocks: which the search takes, how far the smaller
and repaired model is from the whole one, and the forward passes over all samples up to there.

    python -m benchmarks.search_shortlist --model DIR --train train.csv --heldout test.csv --tried 12 5 --remove 6 \
        --output FOLDER --name NAME

Data as in `healing_grid`; the held-out samples are not looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch

from deeparc_hf import find_stacks
from deeparc_hf.architectures import describe
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.search.objectives import objectives
from deeparc_hf.search.strategies.base import Additions
from deeparc_hf.search.workbench import Node, Removed, Workbench

from .healing_grid import Subject, subject_of, subject_parser

_FINALISTS = 2  # as the greedy search of the package

Step = tuple[Node, float]  # a model, and the passes up to it


def greedy(subject: Subject, samples: int, tried: int, most: int) -> Iterator[Step]:
    """The models of a greedy search that tries so many blocks at each step."""
    found = describe(subject.model)
    blocks = [
        (name, index)
        for name, stack in find_stacks(subject.model).items()
        for index in range(len(stack))
        if index not in stack.pinned
    ]
    batches = list(Calibration(subject.calibration, samples).inputs(found.host))
    with evaluating(found.root):
        bench = Workbench(found, batches, objectives.get("divergence")())
        additions = Additions(bench, lambda removed: [block for block in blocks if block not in removed], tried)
        node = bench.root
        for _ in range(most):
            node = additions.best(node, _FINALISTS)[0]
            yield node, bench.passes


def names_of(removed: Removed) -> str:
    """Blocks by number; where there are several stacks, behind what tells these apart."""
    stacks = sorted({stack for stack, _ in removed})
    parts = {stack: [part for part in stack.split(".") if part.isdigit()] or [stack] for stack in stacks}
    return ", ".join(
        f"{'.'.join(parts[stack])}.{index}" if stacks[1:] else str(index) for stack, index in sorted(removed)
    )


def report(args: argparse.Namespace, runs: Sequence[Sequence[Step]], samples: int) -> str:
    lines = [
        f"# {args.name}: a greedy search that tries fewer blocks at each step",
        "",
        "| removed | tried at most | which | divergence | passes |",
        "| ---: | ---: | --- | ---: | ---: |",
    ]
    for number, steps in enumerate(zip(*runs, strict=True), start=1):
        for count, (node, passes) in zip(args.tried, steps, strict=True):
            lines.append(f"| {number} | {count} | {names_of(node.removed)} | {node.score.value:.4f} | {passes:.1f} |")
    facts = {"samples": samples, "seed": args.seed, **hardware(), **package_versions()}
    return "\n".join([*lines, "", *(f"- {key}: {value}" for key, value in facts.items())]) + "\n"


def main() -> None:
    parser = subject_parser(__doc__)
    parser.add_argument("--tried", type=int, nargs="+", required=True, help="numbers of blocks to try at each step")
    parser.add_argument("--remove", type=int, required=True, help="number of blocks to remove")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--tests", type=int, default=1, help="held-out samples, which are not looked at")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subject = subject_of(args)
    runs = [list(greedy(subject, args.samples, tried, args.remove)) for tried in args.tried]
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"shortlist_{args.name.lower().replace(' ', '_')}.md"
    file.write_text(report(args, runs, args.samples))


if __name__ == "__main__":
    main()
