"""A removal site repaired, in forward passes over the same samples; beside it ReplaceMe's way.

ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819, section 2.2) collects, in one pass, the MLP output of the kept block
and what the removed blocks add, and solves one least-squares problem; it is written here after the paper's equations.
Ours weighs positions by a backward pass through what is behind, and holds each fifth sample out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
import transformers as tf

from deeparc_hf.architectures import describe
from deeparc_hf.healing.fit import SiteFit
from deeparc_hf.healing.heal import fit_sites
from deeparc_hf.healing.ridge import RidgeSums, solve
from deeparc_hf.observe.calibration import Calibration
from deeparc_hf.observe.forward import forward

from .rows import Row, in_turn, median_of, profile, row_of

__all__ = ["measure"]

PART = "healing"
PARTS = {
    "forward": [forward],
    "back": [torch.autograd.grad],
    "sums over positions": [SiteFit.take],
    "solves": [SiteFit.finish],
}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    model = tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=1000)).eval()
    ids = torch.randint(5, 1000, (64 if quick else 512, 64))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]
    subject = describe(model)

    def fit(first: int) -> None:
        removed = {"bert.encoder.layer": [first, first + 1]}
        fit_sites(subject, removed, Calibration(batches, len(ids)), progress=False)

    places = {"near the end (9, 10)": 9, "in the middle (5, 6)": 5, "near the start (1, 2)": 1}
    calls = {name: partial(fit, first) for name, first in places.items()}
    rounds = max(3, rounds // 2)
    seconds = in_turn({"forward": partial(_forward, model, batches), **calls}, rounds)
    solving = _solving()
    size = f"{len(ids)} texts of 64 tokens, 12 blocks of 384; the solves take {solving:.2f} s more, whatever the data; "
    for name, call in calls.items():
        ratio = (seconds[name] - solving) / seconds["forward"]
        told = size + profile(call, PARTS, median_of(seconds["forward"]))
        yield row_of(PART, f"a site {name}: passes without the solves / forward", ratio, "<= 1.5", told)
    seconds = in_turn(
        {"forward": partial(_forward, model, batches), "ReplaceMe": partial(_replace_me, model, batches)}, rounds
    )
    yield row_of(PART, "ReplaceMe's least squares, middle / forward", seconds["ReplaceMe"] / seconds["forward"])


def _forward(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def _solving() -> float:
    """Seconds of the solves of a site, whose size is that of the map."""
    x, e = torch.randn(4000, 1537), torch.randn(4000, 384)
    sums = RidgeSums.of(x, e)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        solve(sums, sums, True)
        times.append(time.perf_counter() - start)
    return median_of(torch.tensor(times).numpy())


def _replace_me(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """X: MLP output of block 4, Y: its residual input; Z: what block 6 puts out. min |X T + Y - Z|."""
    layers = model.bert.encoder.layer
    seen: dict[str, list[torch.Tensor]] = {"mlp": [], "out": [], "last": []}
    handles = [
        layers[4].output.dense.register_forward_hook(lambda m, a, o: seen["mlp"].append(o.flatten(0, 1))),
        layers[4].register_forward_hook(lambda m, a, o: seen["out"].append(_hidden(o).flatten(0, 1))),
        layers[6].register_forward_hook(lambda m, a, o: seen["last"].append(_hidden(o).flatten(0, 1))),
    ]
    _forward(model, batches)
    for handle in handles:
        handle.remove()
    mlp, out, last = (torch.cat(values) for values in seen.values())
    torch.linalg.lstsq(mlp.double().T @ mlp.double(), mlp.double().T @ (last - out + mlp).double())


def _hidden(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]
