r"""What limits healing in ResNet bottlenecks: the same sites refitted in five ways, one removed block at a time.

- sums: as `heal_model` does it behind most blocks: the last 1x1 convolution and the BatchNorm behind it, towards the
  sum that the removed block's activation is given. The convolution sees the narrow features alone, a quarter of the
  block's width.
- outputs: the same parameters, towards the output of that activation. Where it puts out 0, any negative sum will do:
  after each fit such positions are asked for what they have, if that is negative, and the fit is repeated.
- both maps: as sums, with the map on the shortcut too where the kept block has one (the first of a stage); else the
  same as sums.
- wide sums, wide outputs: as sums and outputs, but a full linear map of the kept block's own output is added to its
  sum, which no stock checkpoint could hold: how much the narrow input costs.

Reported: squared error of the block's output left on training images that were not fitted on and on the held-out
images, and the held-out accuracy. With --remove several blocks go at once, and their sites are fitted on what the
unpruned model puts out, or one after another, as `heal_model` does it: each on what the model gives it with the blocks
before it removed and healed.

    python -m benchmarks.healing_limits --model DIR --train train.parquet --heldout test.parquet --image-size 64 \
        --remove stages.1:1,3+stages.2:3 --output FOLDER --name NAME

Data: .parquet files with an image and a label column.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor, nn

from deeparc_hf import find_stacks
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.healing.ridge import RidgeSums, solve

from .healing_grid import Removal, parsed
from .images import model_input, read_images
from .wanda_grid import paired

WAYS = ("sums", "outputs", "both maps", "wide sums", "wide outputs")
SEVERAL = ("plain", "at once", "one after another", "at once, both maps", "one after another, both maps")
Batches = list[Tensor]
Seen = dict[str, Tensor]


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    """Within, these hooks are there."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows(features: Tensor) -> Tensor:
    """(batch, features, height, width) as (N, features)."""
    return features.movedim(1, -1).reshape(-1, features.shape[1])


def places(kept: nn.Module) -> dict[str, nn.Module]:
    """The modules whose inputs a change is made of."""
    found = {"narrow": kept.layer[2].convolution, "kept": kept.activation}
    return found if isinstance(kept.shortcut, nn.Identity) else {**found, "shortcut": kept.shortcut.convolution}


def inputs(way: str, seen: Seen) -> Tensor:
    """What a change is made of, and the constant 1."""
    parts = [seen["kept"].relu()] if way.startswith("wide") else [seen["narrow"]]
    if way == "both maps" and "shortcut" in seen:
        parts.append(seen["shortcut"])
    return nn.functional.pad(torch.cat(parts, dim=1), (0, 1), value=1.0)


def noting(modules: dict[str, nn.Module], note: Callable[[str, Tensor], None]) -> list[Any]:
    """Hooks that note the modules' inputs in rows, at the positions that the modules use."""

    def hook(name: str) -> Any:
        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            step = module.stride[0] if isinstance(module, nn.Conv2d) else 1
            note(name, rows(args[0].detach()[:, :, ::step, ::step]).clone())

        return take

    return [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]


def observed(model: nn.Module, kept: nn.Module, last: nn.Module, batches: Batches) -> Seen:
    """Inputs and sum of the kept block, and the sum of the removed one, at every position."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    with (
        torch.no_grad(),
        hooks(*noting({**places(kept), "last": last.activation}, lambda name, x: found[name].append(x))),
    ):
        for batch in batches:
            model(batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def refitted(way: str, x: Tensor, kept: Tensor, last: Tensor, held: Tensor, repeats: int) -> tuple[Tensor, float]:
    """The change (with the intercept in the last row), and the squared error of the output that it leaves where nothing
    was fitted.
    """
    target, wanted, best = last.relu(), last, None
    for _ in range(repeats if way.endswith("outputs") else 1):
        missing = wanted - kept
        solution = solve(RidgeSums.of(x[~held], missing[~held]), RidgeSums.of(x[held], missing[held]), True)
        if solution.change is None:
            break
        best = solution.change.float()
        changed = kept + x @ best
        wanted = torch.where(target > 0, last, changed.clamp(max=0))
    best = torch.zeros(x.shape[1], kept.shape[1]) if best is None else best
    return best, left(x[held], kept[held], last[held], best)


def left(x: Tensor, kept: Tensor, last: Tensor, change: Tensor) -> float:
    """Squared distance of the output from the removed block's, relative to that without the change."""
    before = (kept.relu() - last.relu()).square().sum(dtype=torch.float64)
    return float(((kept + x @ change).relu() - last.relu()).square().sum(dtype=torch.float64) / before)


def right(model: nn.Module, batches: Batches, labels: Tensor) -> np.ndarray:
    """Which images are classified right."""
    with torch.no_grad():
        return (torch.cat([model(batch).logits.argmax(1) for batch in batches]) == labels).numpy()


def accuracy(model: nn.Module, batches: Batches, labels: Tensor) -> float:
    return float(right(model, batches, labels).mean())


@contextmanager
def healed(kept: nn.Module, last: nn.Module, change: Tensor | None, way: str = "sums") -> Iterator[None]:
    """Within, the last block gives out what it is given, and the kept one's sum is changed."""
    seen: Seen = {}

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if change is None:
            return args
        count, width, *size = args[0].shape
        return (args[0] + (inputs(way, seen) @ change).view(count, *size, width).movedim(-1, 1),)

    # noted first, changed then
    handles = noting(places(kept), seen.__setitem__)
    handles += [
        kept.activation.register_forward_pre_hook(add),
        last.register_forward_hook(lambda module, args, output: args[0]),
    ]
    with hooks(*handles):
        yield


def table(found: list[dict[str, Any]], original: float) -> list[str]:
    lines = ["| removed | plain | " + " | ".join(WAYS) + " |", "| --- | ---: |" + " ---: |" * len(WAYS)]
    for row in found:
        cells = [
            f"{100 * w['left']:.0f} / {100 * w['left_heldout']:.0f} %, {w['accuracy']:.3f}"
            for w in (row["ways"][n] for n in WAYS)
        ]
        lines.append(f"| {row['removed']} | {row['plain']:.3f} | " + " | ".join(cells) + " |")
    means = [
        np.mean([[r["ways"][n][k] for k in ("left", "left_heldout", "accuracy")] for r in found], axis=0) for n in WAYS
    ]
    shown = [f"{100 * a:.0f} / {100 * b:.0f} %, {c:.3f}" for a, b, c in means]
    mean = f"| mean | {np.mean([r['plain'] for r in found]):.3f} | " + " | ".join(shown) + " |"
    return [*lines, mean, "", f"With all blocks: {original:.3f}."]


def several(
    model: nn.Module, removal: Removal, train: Batches, images: int, reached: Callable[[], np.ndarray]
) -> dict[str, Any]:
    """The accuracy with several blocks removed, healed at once or one site after another."""
    original = copy.deepcopy(model)
    found: dict[str, np.ndarray] = {}
    stacks, before = find_stacks(model), find_stacks(original)
    sites = [(name, index) for name in stacks for index in removal.blocks.get(name, [])]
    if any((name, index - 1) in sites or index == 0 for name, index in sites):
        raise SystemExit(f"{removal}: each block to remove needs a kept one right before it")
    for mode in SEVERAL:
        way = "both maps" if mode.endswith("both maps") else "sums"
        with ExitStack() as inside:
            fitted = []
            for name, index in sites:
                pair, old = (which[name].blocks[index - 1 : index + 1] for which in (stacks, before))
                if mode == "plain":
                    fitted.append((*pair, None))
                    continue
                seen = observed(original, *old, train)
                if mode.startswith("one"):
                    seen = {**observed(model, *pair, train), "last": seen["last"]}
                change, _ = refitted(way, inputs(way, seen), seen["kept"], seen["last"], each_fifth(seen, images), 1)
                if mode.startswith("one"):
                    inside.enter_context(healed(*pair, change, way))
                else:
                    fitted.append((*pair, change, way))
            for site in fitted:
                inside.enter_context(healed(*site))
            found[mode] = reached()
    gained = paired(found["one after another"], found["at once"])
    return {**{mode: float(hits.mean()) for mode, hits in found.items()}, "gained": gained}


def each_fifth(seen: Seen, images: int) -> Tensor:
    """The positions of each fifth image."""
    count = len(seen["kept"])
    return (torch.arange(count) // (count // images)) % 5 == 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a bottleneck ResNet of transformers")
    parser.add_argument("--train", required=True, type=Path)
    parser.add_argument("--heldout", required=True, type=Path)
    parser.add_argument("--image-size", type=int, help="sides that images are scaled to; default: as they are")
    parser.add_argument(
        "--remove", action="append", default=[], help="several blocks, as for healing_grid; may be repeated"
    )
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--name", required=True, help="of the model, for the report")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=8, help="fits towards the outputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = tf.ResNetForImageClassification.from_pretrained(args.model).eval()
    pixels, _, _ = read_images(args.train)
    chosen = torch.from_numpy(np.random.default_rng(args.seed).permutation(len(pixels))[: args.samples])
    train = list(model_input(pixels[chosen], args.image_size).split(100))
    pixels, labels, _ = read_images(args.heldout)
    heldout = list(model_input(pixels, args.image_size).split(100))
    original, found = accuracy(model, heldout, labels), []
    for name, stack in find_stacks(model).items():
        for index in range(1, len(stack)):
            kept, last = stack.blocks[index - 1], stack.blocks[index]
            seen, unseen = observed(model, kept, last, train), observed(model, kept, last, heldout)
            held = each_fifth(seen, len(chosen))
            with healed(kept, last, None):
                row: dict[str, Any] = {
                    "removed": f"{'.'.join(name.split('.')[-3:-1])}: {index}",
                    "plain": accuracy(model, heldout, labels),
                }
            row["ways"] = {}
            for way in WAYS:
                change, share = refitted(way, inputs(way, seen), seen["kept"], seen["last"], held, args.repeats)
                with healed(kept, last, change, way):
                    reached = accuracy(model, heldout, labels)
                fresh = left(inputs(way, unseen), unseen["kept"], unseen["last"], change)
                row["ways"][way] = {"left": share, "left_heldout": fresh, "accuracy": reached}
            found.append(row)
            print(row, flush=True)
    together = []
    for given in args.remove:
        removal = parsed(given, list(find_stacks(model)))
        together.append(
            {
                "removed": str(removal),
                **several(model, removal, train, len(chosen), lambda: right(model, heldout, labels)),
            }
        )
        print(together[-1], flush=True)
    facts = {"model": args.name, "samples to fit on": len(chosen), "held-out samples": len(labels), "seed": args.seed}
    facts |= {**hardware(), **package_versions()}
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"healing_limits_{args.name.lower().replace(' ', '_')}"
    written = {"facts": facts, "original": original, "rows": found, "together": together}
    stem.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    note = (
        "Squared error left, on training images that were not fitted on / on held-out images, then the held-out "
        "accuracy."
    )
    lines = [f"# What limits healing, {args.name}", "", note, "", *table(found, original), ""]
    if together:
        lines += [
            "Held-out accuracy with several blocks removed (gained: by one after another, against at once; 95 % "
            "bootstrap interval):"
        ]
        lines += ["", "| removed | " + " | ".join(SEVERAL) + " | gained |", "| --- |" + " ---: |" * (len(SEVERAL) + 1)]
        for row in together:
            cells = [f"{row[mode]:.3f}" for mode in SEVERAL] + ["{:+.3f} ({:+.3f} .. {:+.3f})".format(*row["gained"])]
            lines.append(f"| {row['removed']} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [*(f"- {key}: {value}" for key, value in facts.items()), ""]
    stem.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
