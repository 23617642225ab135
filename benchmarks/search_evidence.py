r"""Is a search with repairs better than other ways to choose blocks? How far outputs are from the whole model's, and
the metric, on held-out samples: right after the removal, repaired, and after an epoch of training.

The ways: similarity by debiased CKA and by cosine (ShortGPT), block influence, the straightest run of blocks (Gromov et
al. 2024, arXiv 2403.17887), ReplaceMe's (Shopkhoev et al. 2025, arXiv 2505.02819: that run, and a linear map behind the
kept block's last one in place of our repair), random sets, SLEB's greedy search (Song et al. 2024, arXiv 2402.09025:
without repairs), and searches with repairs. Each chooses and repairs on the same training samples; each seed takes
others. The held-out samples are the same for all. With --every all sets are tried, and the best of them by the held-out
samples themselves tells what no choice could pass.

    python -m benchmarks.search_evidence --model DIR --train train.csv --heldout test.csv --remove 2 4 --seeds 0 1 2 \
        --retrain 1600 --output FOLDER --name NAME

Data as in `healing_grid`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deeparc_hf import PruningPlan, analyze, find_stacks, heal_model, remove_blocks, search_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.healing.block_ends import rows
from deeparc_hf.healing.heal import find_endings
from deeparc_hf.healing.sites import sites_of
from deeparc_hf.observe.hooks import hidden_states, hooked
from deeparc_hf.observe.outputs import heads_of
from deeparc_hf.search.objectives.divergence import relative_errors
from deeparc_hf.similarity.divergence import Head

from .healing_grid import Subject, shown, subject_of, subject_parser

OURS = "search with repairs"
REPLACE_ME = "ReplaceMe"
BEST = "best of all sets"
Blocks = dict[str, list[int]]


class Judge:
    """How far models are from the whole one on the held-out samples, and their metric."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._whole = [heads for heads, _ in self._answers(subject.model)]

    def _answers(self, model: nn.Module) -> Iterator[tuple[list[Head], Tensor]]:
        host = describe(model).host
        for batch, output in zip(self.subject.heldout, self.subject.outputs(model), strict=True):
            yield heads_of(host, output, batch), output.logits

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        """For each sample, the divergence of the outputs; and the metric with its interval."""
        divergences: list[float] = []
        outputs = []
        for (heads, logits), wanted in zip(self._answers(model), self._whole, strict=True):
            losses, weights = relative_errors(heads, wanted)
            divergences += (losses.sum(dim=0) / weights.sum(dim=0)).tolist()
            outputs.append(logits)
        return {"divergence": divergences, "metric": self.subject.scored(outputs)}


def mapped(model: nn.Module, pruned: nn.Module, removed: Blocks, calibration: Sequence[Mapping[str, Tensor]]) -> None:
    """ReplaceMe's fit at the one site: a linear map T behind the kept block's last map, by least squares over all
    positions, folded into that map. In place.
    """
    whole, smaller = describe(model), describe(pruned)
    (site,) = sites_of(removed)
    stack = whole.stacks[site.stack]
    kept, last = stack.blocks[site.kept], stack.blocks[site.removed[-1]]
    with torch.no_grad():
        endings = find_endings(whole.host, [kept, last], calibration[0])
    ending, end = endings[kept], endings[last]
    if isinstance(ending, str) or isinstance(end, str):
        return
    module, seen = kept.get_submodule(ending.map), {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen[name] = hidden_states(output).detach()

    def note_input(name: str, module: nn.Module, args: Any) -> None:
        seen[name] = args[0].detach()

    def watch(name: str, block: nn.Module, final: str | None) -> Any:
        if final is None:
            return block.register_forward_hook(partial(note, name))
        return block.get_submodule(final).register_forward_pre_hook(partial(note_input, name))

    handles = [
        module.register_forward_hook(partial(note, "map")),
        watch("kept", kept, ending.final),
        watch("last", last, end.final),
    ]
    gram = cross = 0.0
    with hooked(handles), torch.no_grad():
        for batch in calibration:
            model.eval()(**batch, **({"use_cache": False} if whole.host.takes_cache else {}))
            valid = torch.ones(len(rows(seen["map"], module)), dtype=torch.bool)
            if "attention_mask" in batch:
                valid = batch["attention_mask"].flatten().bool()
            m, missing = rows(seen["map"], module)[valid], rows(seen["last"] - seen["kept"], module)[valid]
            m, missing = m.double(), missing.double() / ending.scale
            gram, cross = gram + m.T @ m, cross + m.T @ missing
    gram = gram + torch.eye(len(gram), dtype=torch.float64) * 1e-6 * gram.diagonal().mean()
    change = torch.linalg.solve(gram, cross).T.float()  # T - 1
    position = [i for i in range(len(stack)) if i not in removed[site.stack]].index(site.kept)
    block = smaller.stacks[site.stack].blocks[position]
    with torch.no_grad():
        target = block.get_submodule(ending.map)
        target.weight.add_((change @ target.weight.flatten(1)).reshape(target.weight.shape))
        if target.bias is not None:
            target.bias.add_(change @ target.bias)
        if end.final is not None:
            theirs = last.get_submodule(end.final).state_dict()
            block.get_submodule(end.final).load_state_dict(theirs)


def straight_run(plan: PruningPlan, count: int) -> dict[str, list[int]]:
    """The run of so many blocks of one stack between whose ends the cosine is largest; none where no stack has one."""
    found = [
        (stack.similarity[i][i + count], name, list(range(i + 1, i + count + 1)))
        for name, stack in plan.stacks.items()
        for i in range(len(stack) - count)
        if not set(range(i + 1, i + count + 1)) & set(stack.pinned)
    ]
    return {max(found)[1]: max(found)[2]} if found else {}


def random_set(plan: PruningPlan, seed: int, count: int) -> dict[str, list[int]]:
    free = [(name, i) for name, stack in plan.stacks.items() for i in range(len(stack)) if i not in stack.pinned]
    found: dict[str, list[int]] = {}
    for name, index in sorted(random.Random(seed).sample(free, count)):
        found.setdefault(name, []).append(index)
    return found


def ways(subject: Subject, args: argparse.Namespace, seed: int) -> dict[str, Callable[[int], Blocks]]:
    """What each way removes, by how many. Both searches are greedy; that without repairs is SLEB's."""
    model, data, total = subject.model.eval(), subject.calibration, sum(map(len, find_stacks(subject.model).values()))
    fewest = total - max(args.remove)
    found: dict[str, Callable[[int], Blocks]] = {}
    settings = {"calibration_samples": args.samples, "num_blocks": total, "progress": False}
    plans = {metric: analyze(model, data, similarity=metric, **settings) for metric in ("cka", "cosine", "effect")}
    for title, plan in (
        ("CKA", plans["cka"]),
        ("cosine", plans["cosine"]),
        ("effect", plans["effect"].replan(linkage="adjacent")),
    ):
        found[title] = lambda count, plan=plan: plan.replan(num_blocks=total - count).removed
    found["straightest run"] = found[REPLACE_ME] = partial(straight_run, plans["cosine"])
    found["random"] = partial(random_set, plans["cosine"], seed)
    for title, heal in (("SLEB", None), (OURS, "lstsq")):
        frontier = search_blocks(
            model,
            data,
            heal=heal,
            num_blocks=fewest,
            samples=args.samples,
            measure_times=False,
            progress=False,
        )
        chosen = {total - point.num_blocks: point.removed for point in frontier.points}
        found[title] = chosen.__getitem__
    return found


def every_set(model: nn.Module, count: int) -> list[Blocks]:
    """All sets of so many blocks that may go."""
    free = [(name, i) for name, stack in find_stacks(model).items() for i in range(len(stack)) if i not in stack.pinned]
    return [
        {name: [i for stack, i in chosen if stack == name] for name, _ in chosen}
        for chosen in itertools.combinations(free, count)
    ]


def retrain(model: nn.Module, training: Sequence[Mapping[str, Tensor]], rate: float, seed: int) -> None:
    """One epoch of AdamW; the rate falls to nothing."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(training))
    model.train()
    for number in torch.randperm(len(training)).tolist():
        model(**training[number]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
    model.eval()


class Trials:
    """What was measured with one seed; blocks that several ways choose are measured once."""

    def __init__(self, args: argparse.Namespace, subject: Subject) -> None:
        self.args, self.subject, self.judge = args, subject, Judge(subject)
        self._start, self._known = time.perf_counter(), dict[str, dict[str, Any]]()

    def row(self, count: int, way: str, blocks: Blocks) -> dict[str, Any]:
        case = json.dumps([way == REPLACE_ME, blocks], sort_keys=True)
        first, most = self.args.seed == self.args.seeds[0], count == max(self.args.remove)
        if case not in self._known:
            trains = bool(self.subject.training) and first and most and way != BEST  # the dearest part
            self._known[case] = self._measured(way, blocks, trains)
        found = self._known[case]
        told = [f"{kind} {np.mean(found[kind]['divergence']):.4f} {found[kind]['metric'][0]:.4f}" for kind in found]
        took = f"{time.perf_counter() - self._start:.0f} s"
        print(self.args.seed, count, way, list(blocks.values()), *told, took, flush=True)
        return {"count": count, "way": way, "seed": self.args.seed, "removed": blocks, **found}

    def _measured(self, way: str, blocks: Blocks, trains: bool) -> dict[str, Any]:
        """Plain, repaired, retrained."""
        subject, args = self.subject, self.args
        pruned = copy.deepcopy(subject.model)
        remove_blocks(pruned, blocks)
        found = {"plain": self.judge(pruned)}
        if way == REPLACE_ME:
            mapped(subject.model, pruned, blocks, subject.calibration)
        else:
            heal_model(pruned, subject.model, subject.calibration, samples=args.samples, progress=False)
        found["repaired"] = self.judge(pruned)
        if trains:
            retrain(pruned, subject.training, args.rate, args.seed)
            found["retrained"] = self.judge(pruned)
        return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"rows": []}
    for seed in args.seeds:
        args.seed = seed
        subject = subject_of(args)
        trials = Trials(args, subject)
        result |= {"metric": subject.metric, "original": subject.measure(subject.model), "tests": subject.tests}
        result["facts"] = facts(args, subject)
        for way, choose in ways(subject, args, seed).items():
            for count in args.remove:
                blocks = {stack: list(indices) for stack, indices in choose(count).items() if indices}
                if blocks:
                    result["rows"].append(trials.row(count, way, blocks))
        for count in args.every if seed == args.seeds[0] else ():
            tried = [trials.row(count, BEST, blocks) for blocks in every_set(subject.model, count)]
            result["rows"].append(min(tried, key=lambda row: float(np.mean(row["repaired"]["divergence"]))))
        write(args, result)
    return result


KINDS = ("plain", "repaired", "retrained")


def facts(args: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    return {
        "model": args.name,
        "stacks": list(find_stacks(subject.model)),
        "blocks": sum(map(len, find_stacks(subject.model).values())),
        "samples to choose and repair on": sum(len(next(iter(batch.values()))) for batch in subject.calibration),
        "samples of the epoch": sum(len(batch["labels"]) for batch in subject.training),
        "held-out samples": subject.tests,
        **hardware(),
        **package_versions(),
    }


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """A mean with its 95 % normal interval."""
    half = 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def means(
    result: Mapping[str, Any], count: int, way: str, kind: str, like: str | None = None
) -> tuple[np.ndarray, float] | None:
    """Each held-out sample's divergence, the mean over the seeds, and the mean of the metric; `like`: of the seeds that
    this way has.
    """
    listed = [row for row in result["rows"] if row["count"] == count]
    seeds = {row["seed"] for row in listed if row["way"] == (like or way)}
    rows = [row[kind] for row in listed if row["way"] == way and kind in row and row["seed"] in seeds]
    if not rows:
        return None
    return np.mean([row["divergence"] for row in rows], axis=0), float(np.mean([row["metric"][0] for row in rows]))


def report(result: Mapping[str, Any]) -> str:
    facts, original = result["facts"], result["original"][0]
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(row["seed"] for row in result["rows"]))
    parts = [f"# Choosing blocks: {facts['model']}"]
    parts.append(
        f"Divergence (nats) of the outputs from the whole model's on {result['tests']} held-out samples, and "
        f"{result['metric']}: right after the removal, repaired, and after an epoch of training (first seed). Means "
        f"over the seeds ({seeds}), with 95 % intervals over the samples. The whole model: "
        f"{shown(result['original'][:3])}. More than ours: the repaired divergence less that of the search with "
        "repairs, sample by sample (the best of all sets: with the first seed)."
    )
    for count in sorted({row["count"] for row in result["rows"]}):
        lines = [
            f"| {count} of {facts['blocks']} removed by | removed (first seed) | plain | repaired | more than ours | "
            f"{result['metric']}: plain | repaired | retrained |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        listed = [row for row in result["rows"] if row["count"] == count]
        ours = means(result, count, OURS, "repaired")
        for way in dict.fromkeys(row["way"] for row in listed):
            blocks = next(row["removed"] for row in listed if row["way"] == way)
            named = "; ".join(
                f"{stack.split('.')[-2]}: " * (len(facts["stacks"]) > 1) + ", ".join(map(str, indices))
                for stack, indices in blocks.items()
            )
            plain, repaired, retrained = (means(result, count, way, kind) for kind in KINDS)
            beside = means(result, count, OURS, "repaired", like=way)
            assert plain is not None and repaired is not None and beside is not None
            more = "" if way == OURS else "{:+.4f} ({:+.4f} .. {:+.4f})".format(*interval(repaired[0] - beside[0]))
            spread = "{:.4f} ({:.4f} .. {:.4f})".format(*interval(repaired[0]))
            after = "" if retrained is None else f"{retrained[1]:.4g}"
            lines.append(
                f"| {way} | {named} | {plain[0].mean():.4f} | {spread} | {more} | {plain[1]:.4g} | {repaired[1]:.4g} | "
                f"{after} |"
            )
        parts.append("\n".join(lines))
        cka, best = means(result, count, "CKA", "plain"), ours
        if cka is not None and best is not None and cka[1] != original:
            share = 100 * (1 - (best[1] - original) / (cka[1] - original))
            left = 100 * (1 - best[0].mean() / cka[0].mean())
            parts.append(
                f"Of what plain removal by CKA costs, the search with repairs undoes {share:.0f} % in "
                f"{result['metric']} and {left:.0f} % in divergence, without training."
            )
    parts.append("\n".join(f"- {key}: {value}" for key, value in facts.items() if key != "stacks"))
    return "\n\n".join(parts) + "\n"


def write(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"search_{args.name.lower().replace(' ', '_')}"
    stem.with_suffix(".json").write_text(json.dumps(result) + "\n")
    stem.with_suffix(".md").write_text(report(result))


def main() -> None:
    parser = subject_parser(__doc__)
    parser.add_argument("--remove", type=int, nargs="+", required=True, help="numbers of blocks to remove")
    parser.add_argument("--samples", type=int, default=1024, help="training samples to choose and repair on")
    parser.add_argument("--tests", type=int, default=500)
    parser.add_argument(
        "--retrain", type=int, default=0, help="training samples of the epoch; smallest models, first seed"
    )
    parser.add_argument(
        "--every", type=int, nargs="*", default=[], help="numbers of blocks of which all sets are tried (first seed)"
    )
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate of the epoch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if not set(args.every) <= set(args.remove):
        parser.error("--every takes some of the numbers of --remove")
    torch.set_num_threads(args.threads)
    write(args, run(args))


if __name__ == "__main__":
    main()
