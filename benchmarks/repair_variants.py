r"""Which repairs are worth it? How far the outputs of the smaller model are from the whole one's on held-out samples,
with the same blocks removed and repaired in several ways.

- even: the last map of the kept block before each site, all positions alike.
- ours: positions count by how much of the outputs hangs on them, as `heal_model` does it.
- first the attention's: the kept block's attention output map is fitted to what the last removed block's attention
  makes of the hidden states, then the last map as ours.
- both at once: both maps are fitted together, as if the second did not see the first (pre-norm blocks alone); then the
  last map again.
- norm: ours, and the scale (and shift) of the norm behind the site fitted by feature: the kept block's own last norm,
  or the first of the next block where norms come first.
- together: ours, and all repaired maps trained together on the divergence of the outputs: four epochs of Adam on four
  fifths of the samples, the best epoch by the last fifth.

    python -m benchmarks.repair_variants --model DIR --train train.csv --heldout test.csv --remove 3,4 --remove 2,3,4 \
        --output FOLDER --name NAME

Models: BERT, ViT and Llama kinds of transformers. Data as in `healing_grid`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deeparc_hf import heal_model, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.healing.ridge import RidgeSums, solve
from deeparc_hf.healing.sensitivity import output_sensitivities
from deeparc_hf.healing.sites import Site, sites_of
from deeparc_hf.observe.forward import evaluating
from deeparc_hf.observe.hooks import hidden_states, hooked
from deeparc_hf.observe.outputs import heads_of
from deeparc_hf.similarity.divergence import divergence

from .healing_grid import Subject, subject_of, subject_parser
from .search_evidence import Judge, interval

ATTENTION = ("attention.output.dense", "attention.o_proj", "self_attn.o_proj")
LAST = ("output.dense", "mlp.fc2", "mlp.down_proj")
AFTER = ("attention.output.LayerNorm", "output.LayerNorm")  # of BERT: behind the attention, and at the end
BEFORE = ("layernorm_before", "input_layernorm")  # of pre-norm blocks: the first norm


def part(block: nn.Module, names: Sequence[str]) -> Any:
    """The submodule that goes by one of these names; None if there is none."""
    return next((module for name, module in block.named_modules() if name in names), None)


class Repairs:
    """The removal of some blocks from one model, and the ways to repair it."""

    def __init__(self, subject: Subject, removed: list[int], samples: int) -> None:
        self.subject, self.samples = subject, samples
        (self.stack,) = describe(subject.model).stacks.values()
        self.removed = {self.stack.name: removed}
        self.kept = [i for i in range(len(self.stack)) if i not in removed]
        self.post_norm = part(self.stack.blocks[0], AFTER) is not None
        self.smaller = copy.deepcopy(subject.model)
        remove_blocks(self.smaller, self.removed)
        self.weights = self._weights()

    def ways(self) -> dict[str, Callable[[], nn.Module]]:
        found = {"plain": lambda: self.smaller, "even": partial(self.ours, even=True), "ours": self.ours}
        found["first the attention's"] = partial(self.by_site, self.first_attention)
        if not self.post_norm:
            found["both at once"] = partial(self.by_site, self.both)
        return found | {"norm": partial(self.by_site, self.norm), "together": self.together}

    def ours(self, even: bool = False) -> nn.Module:
        found = copy.deepcopy(self.smaller)
        blind = patch("deeparc_hf.healing.heal.output_sensitivities", lambda *args: None)
        with blind if even else nullcontext():
            heal_model(found, self.subject.model, self.subject.calibration, samples=self.samples, progress=False)
        return found

    def together(self) -> nn.Module:
        found, data = self.ours(), self.subject.calibration
        blocks = self._blocks(found)
        maps = [part(blocks[self.kept.index(site.kept)], LAST).weight for site in sites_of(self.removed)]
        found.requires_grad_(False)
        for weight in maps:
            weight.requires_grad_(True)
        with torch.no_grad():
            wanted = [self._heads(self.subject.model, batch) for batch in data]

        def loss(number: int) -> Tensor:
            pairs = zip(self._heads(found, data[number]), wanted[number], strict=True)
            return torch.stack([divergence(ours, theirs).mean() for ours, theirs in pairs]).sum()

        fits, optimizer = len(data) * 4 // 5, torch.optim.Adam(maps, lr=3e-4)
        generator = torch.Generator().manual_seed(0)
        best, kept = np.inf, [weight.detach().clone() for weight in maps]
        for epoch in range(5):
            with torch.no_grad():
                held = sum(float(loss(number)) for number in range(fits, len(data)))
            if held < best:
                best, kept = held, [weight.detach().clone() for weight in maps]
            for number in torch.randperm(fits, generator=generator).tolist() if epoch < 4 else ():
                optimizer.zero_grad()
                loss(number).backward()
                optimizer.step()
        with torch.no_grad():
            for weight, value in zip(maps, kept, strict=True):
                weight.copy_(value)
        return found

    def by_site(self, way: Callable[[nn.Module, Site, nn.Module, nn.Module], None]) -> nn.Module:
        """One site after another, on what the model gives with those before it."""
        found = copy.deepcopy(self.smaller)
        for site in sites_of(self.removed):
            way(found, site, self._blocks(found)[self.kept.index(site.kept)], self.stack.blocks[site.removed[-1]])
        return found

    def first_attention(self, model: nn.Module, site: Site, kept: nn.Module, last: nn.Module) -> None:
        pairs = [(part(block, ATTENTION), part(block, AFTER[:1])) for block in (kept, last)]
        self._fit(model, site, [pairs[0][0]], pairs, (kept, last))
        if self.post_norm:
            pairs[0][1].load_state_dict(pairs[1][1].state_dict())
        self._last(model, site, kept, last)

    def both(self, model: nn.Module, site: Site, kept: nn.Module, last: nn.Module) -> None:
        maps = [part(kept, ATTENTION), part(kept, LAST)]
        self._fit(model, site, maps, [(None, None)] * 2, (kept, last))
        self._last(model, site, kept, last)

    def norm(self, model: nn.Module, site: Site, kept: nn.Module, last: nn.Module) -> None:
        self._last(model, site, kept, last)
        if self.post_norm:
            here, there = part(kept, AFTER[1:]), part(last, AFTER[1:])
        elif site.removed[-1] + 1 < len(self.stack):
            number = site.removed[-1] + 1
            here = part(self._blocks(model)[self.kept.index(number)], BEFORE)
            there = part(self.stack.blocks[number], BEFORE)
        else:
            return
        xs, ys, ws = [], [], []
        for number, batch in enumerate(self.subject.calibration):
            x, y = (self._seen(each, batch, {"y": (module, "out")})["y"] for each, module in
                    ((model, here), (self.subject.model, there)))  # fmt: skip
            valid = _valid(batch, x)
            xs, ys = [*xs, x[valid].double()], [*ys, y[valid].double()]
            ws.append(self.weights[site.removed[-1]][number][valid])
        x, y, w = torch.cat(xs), torch.cat(ys), torch.cat(ws)[:, None]
        w = w / w.sum()
        bias = getattr(here, "bias", None)
        center_x, center_y = ((w * v).sum(0) if bias is not None else torch.zeros(()).double() for v in (x, y))
        scale = (w * (x - center_x) * (y - center_y)).sum(0) / (w * (x - center_x).square()).sum(0)
        with torch.no_grad():
            here.weight.mul_(scale)
            if bias is not None:
                bias.mul_(scale).add_(center_y - scale * center_x)

    def _last(self, model: nn.Module, site: Site, kept: nn.Module, last: nn.Module) -> None:
        pairs = [(None, part(block, AFTER[1:])) for block in (kept, last)]
        self._fit(model, site, [part(kept, LAST)], pairs, (kept, last))
        if self.post_norm:
            pairs[0][1].load_state_dict(pairs[1][1].state_dict())

    def _fit(
        self, model: nn.Module, site: Site, maps: list[Any], ends: Sequence[Any], blocks: Sequence[nn.Module]
    ) -> None:
        """Refit maps of the kept block so that a sum becomes that of the last removed block: what goes into the norm of
        `ends`, or the hidden states and the output of the map there, or what the blocks put out.
        """
        sums: dict[bool, RidgeSums | None] = {False: None, True: None}
        widths = [module.in_features for module in maps]
        seen = 0
        for number, batch in enumerate(self.subject.calibration):
            inputs = {f"x{i}": (module, "in") for i, module in enumerate(maps)}
            ours = self._seen(model, batch, inputs | self._watched(ends[0], blocks[0]))
            theirs = self._seen(self.subject.model, batch, self._watched(ends[1], blocks[1]))
            x = torch.cat([ours[f"x{i}"] for i in range(len(maps))], dim=-1).double()
            missing = (_sum(theirs) - _sum(ours)).double()
            valid, held = _valid(batch, x), torch.zeros(x.shape[:2], dtype=torch.bool)
            held[(torch.arange(len(x)) + seen) % 5 == 4] = True
            seen += len(x)
            size, weight = missing.square().sum(-1), self.weights[site.removed[-1]][number]
            weight = weight * (100 * size[valid].median() / size).clamp(max=1.0)
            for is_held in (False, True):
                pick = valid & (held == is_held)
                root = weight[pick].sqrt()[:, None]
                found = RidgeSums.of(functional.pad(x[pick], (0, 1), value=1.0) * root, missing[pick] * root)
                known = sums[is_held]
                sums[is_held] = found if known is None else known + found
        fit, check = sums[False], sums[True]
        assert fit is not None and check is not None
        change = solve(fit, check, True).change
        if change is None:
            return
        with torch.no_grad():
            for module, piece in zip(maps, change[:-1].split(widths), strict=True):
                module.weight.add_(piece.T.float())
            if maps[-1].bias is not None:
                maps[-1].bias.add_(change[-1].float())

    def _watched(self, end: tuple[Any, Any], block: nn.Module) -> dict[str, tuple[nn.Module, str]]:
        module, norm = end
        if norm is not None:
            return {"sum": (norm, "in")}
        if module is not None:
            return {"sum": (module, "out"), "before": (block, "in")}
        return {"sum": (block, "out")}

    def _seen(self, model: nn.Module, batch: Any, what: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def enters(name: str, module: nn.Module, args: Any) -> None:
            found[name] = args[0].detach().clone()

        def leaves(name: str, module: nn.Module, args: Any, output: Any) -> None:
            found[name] = hidden_states(output).detach().clone()

        def handles() -> Iterator[Any]:
            for name, (module, side) in what.items():
                if side == "in":
                    yield module.register_forward_pre_hook(partial(enters, name))
                else:
                    yield module.register_forward_hook(partial(leaves, name))

        with hooked(handles()), torch.no_grad():
            self._run(model, batch)
        return found

    def _run(self, model: nn.Module, batch: Any) -> Any:
        return model.eval()(**batch, **({"use_cache": False} if describe(model).host.takes_cache else {}))

    def _heads(self, model: nn.Module, batch: Any) -> Any:
        return heads_of(describe(model).host, self._run(model, batch), batch)

    def _blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return describe(model).stacks[self.stack.name].blocks

    def _weights(self) -> dict[int, list[Tensor]]:
        """By the last removed block of a site, how much positions count, a tensor (samples, positions) a batch."""
        ends = [site.removed[-1] for site in sites_of(self.removed)]
        found: dict[int, list[Tensor]] = {end: [] for end in ends}
        host = describe(self.subject.model).host
        with evaluating(self.subject.model):
            for batch in self.subject.calibration:
                sizes = output_sensitivities(host, {self.stack.blocks[end]: 2 for end in ends}, batch)
                assert sizes is not None
                for end in ends:
                    size = sizes[self.stack.blocks[end]][..., 0].double()
                    size = size * _valid(batch, size)
                    mean = size.sum(1, keepdim=True) / _valid(batch, size).sum(1, keepdim=True)
                    found[end].append(size + 0.5 * mean)
        return found


def _sum(seen: Mapping[str, Tensor]) -> Tensor:
    return seen["sum"] + seen["before"] if "before" in seen else seen["sum"]


def _valid(batch: Mapping[str, Tensor], like: Tensor) -> Tensor:
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(like.shape[:2]).bool()


def report(result: Mapping[str, Any]) -> str:
    parts = [f"# Repairs: {result['facts']['model']}"]
    parts.append(
        f"Divergence (nats) of the outputs from the whole model's on {result['tests']} held-out samples, with a 95 % "
        f"interval of its difference from ours, sample by sample; and {result['metric']} (the whole model: "
        f"{result['original'][0]:.4g})."
    )
    for removed, rows in result["rows"].items():
        lines = [f"| {removed} removed | divergence | less ours | {result['metric']} |", "| --- | ---: | ---: | ---: |"]
        ours = np.array(rows["ours"]["divergence"])
        for way, row in rows.items():
            values = np.array(row["divergence"])
            apart = "" if way == "ours" else "{:+.4f} ({:+.4f} .. {:+.4f})".format(*interval(values - ours))
            lines.append(f"| {way} | {values.mean():.4f} | {apart} | {row['metric'][0]:.4g} |")
        parts.append("\n".join(lines))
    parts.append("\n".join(f"- {key}: {value}" for key, value in result["facts"].items()))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = subject_parser(__doc__)
    parser.add_argument("--remove", required=True, action="append", help="blocks, as 3,4; may be repeated")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--tests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subject = subject_of(args)
    subject.model.eval()
    judge = Judge(subject)
    rows: dict[str, dict[str, Any]] = {}
    for removed in args.remove:
        rows[removed] = {}
        for way, make in Repairs(subject, [int(i) for i in removed.split(",")], args.samples).ways().items():
            model = make()
            rows[removed][way] = judge(model)
            told = rows[removed][way]
            print(removed, way, f"{np.mean(told['divergence']):.4f} {told['metric'][0]:.4f}", flush=True)
    samples = sum(len(next(iter(batch.values()))) for batch in subject.calibration)
    facts = {"model": args.name, "samples to repair on": samples, "seed": args.seed, **hardware(), **package_versions()}
    result = {
        "facts": facts,
        "metric": subject.metric,
        "tests": subject.tests,
        "original": subject.measure(subject.model),
        "rows": rows,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"repairs_{args.name.lower().replace(' ', '_')}"
    stem.with_suffix(".json").write_text(json.dumps(result) + "\n")
    stem.with_suffix(".md").write_text(report(result))


if __name__ == "__main__":
    main()
