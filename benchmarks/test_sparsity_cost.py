"""What zeroing weights costs, and keeping them zero. Prints ratios.

Choosing and applying the masks: beside the straightforward way, a full sort. Keeping zeros: beside a whole training
step.

pytest benchmarks/test_sparsity_cost.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from deeparc_hf import sparsify_model
from deeparc_hf.sparsity.masks import Zeros, choose_lowest, choose_pattern, zero_chosen
from deeparc_hf.sparsity.methods import methods

from .measuring import THREADS, interval

BOUND, KEEPING = 0.5, 0.03
STEPS = 7
LAYERS, WIDTH, FFN = 12, 768, 3072  # BERT-base
ROUNDS = 3
SETTINGS = {
    "10 %": (partial(choose_lowest, sparsity=0.1), None, 0.1),
    "50 %": (partial(choose_lowest, sparsity=0.5), None, 0.5),
    "2:4": (partial(choose_pattern, keep=2, group=4), 4, 0.5),
    "4:8": (partial(choose_pattern, keep=4, group=8), 8, 0.5),
}
Way = Callable[[Tensor, Tensor], None]


@pytest.mark.benchmark
@pytest.mark.usefixtures("threads")
def test_masks_cost_at_most_half_of_a_full_sort(capsys):
    encoder = _encoder(seed=0)
    medians = {}
    on = f"{THREADS} of torch's threads, torch {torch.__version__}, numpy {np.__version__}"
    for name, (choose, group, share) in SETTINGS.items():
        ways = {
            "full sort": partial(_by_full_sort, group=group, share=share),
            "deeparc_hf": partial(_by_deeparc, choose=choose),
        }
        seconds = _rounds(encoder, ways)
        ratios = seconds["deeparc_hf"] / seconds["full sort"]
        medians[name], (low, high) = float(np.median(ratios)), interval(ratios)
        with capsys.disabled():
            print(f"\n{name}, {LAYERS} layers, {on}: full sort {np.median(seconds['full sort']):.2f} s, ", end="")
            print(
                f"deeparc_hf / full sort {medians[name]:.3f} (median of {ROUNDS}; 95 % bootstrap {low:.3f} .. "
                f"{high:.3f})",
                end="",
            )
    assert max(medians.values()) <= BOUND, medians


@pytest.mark.benchmark
@pytest.mark.usefixtures("threads")
def test_keeping_zeros_costs_at_most_3_percent_of_a_step(capsys):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": FFN,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
        "vocab_size": 1000,
    }
    model = BertForSequenceClassification(BertConfig(**sizes)).train()
    batch = {"input_ids": torch.randint(0, 1000, (8, 128)), "labels": torch.zeros(8, dtype=torch.long)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    zeros = Zeros()
    sparsify_model(model, method="magnitude", progress=False)
    for name in model.config.pruning_config["sparsity"]["matrices"]:
        weight = model.get_submodule(name).weight
        zeros.add(weight, weight.detach() == 0)
    steps, keeping = [], []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.perf_counter()
        zeros.apply()
        steps.append(stepped - start)
        keeping.append(time.perf_counter() - stepped)
    shares = np.array(keeping[1:]) / np.array(steps[1:])
    low, high = interval(shares)
    with capsys.disabled():
        print(
            f"\nkeeping zeros, 4 layers x {WIDTH}, batch 8 x 128, AdamW, float32, {THREADS} threads: step "
            f"{np.median(steps[1:]):.2f} s, ",
            end="",
        )
        print(
            f"keeping / step {np.median(shares):.4f} (median of {STEPS}; 95 % bootstrap {low:.4f} .. {high:.4f})",
            end="",
        )
    assert np.median(shares) <= KEEPING


def _encoder(seed: int) -> list[tuple[Tensor, Tensor]]:
    """The weights (float32) and input norms (float64) of each linear map."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(WIDTH, WIDTH)] * 4 + [(FFN, WIDTH), (WIDTH, FFN)]
    return [
        (
            torch.randn(shape, generator=generator) * 0.02,
            torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.1,
        )
        for shape in shapes * LAYERS
    ]


def _by_full_sort(weight: Tensor, norms: Tensor, group: int | None, share: float) -> None:
    score = weight.abs() * norms.float()
    score = score.view(-1, group or score.shape[1])
    order = torch.sort(score, dim=-1, stable=True).indices[:, : int(score.shape[1] * share)]
    weight[torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True).view(weight.shape)] = 0


def _by_deeparc(weight: Tensor, norms: Tensor, choose: Callable[[Tensor], Tensor]) -> None:
    zero_chosen(weight, choose(methods.get("wanda")().score(weight, norms)))


def _rounds(encoder: list[tuple[Tensor, Tensor]], ways: dict[str, Way]) -> dict[str, np.ndarray]:
    """Seconds of each way for the whole encoder, shape (ROUNDS,), after one round to warm up.

    The ways take turns at every matrix, so that a slow spell of the machine hits all of them. Copying the weights is
    not timed.
    """
    seconds = {name: np.zeros(ROUNDS + 1) for name in ways}
    for turn in range(ROUNDS + 1):
        for weight, norms in encoder:
            for name, way in ways.items():
                copy = weight.clone()
                start = time.perf_counter()
                way(copy, norms)
                seconds[name][turn] += time.perf_counter() - start
    return {name: values[1:] for name, values in seconds.items()}
