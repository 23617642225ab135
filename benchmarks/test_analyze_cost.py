"""What `analyze` costs beside a bare forward pass over the same batches. Prints the ratio.

No bound is asserted unless the environment variable DEEPARC_BENCHMARK_BOUND is 1: on a shared machine a time is no
test.

    DEEPARC_BENCHMARK_BOUND=1 pytest benchmarks/test_analyze_cost.py
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from deeparc_hf import analyze

from .measuring import THREADS, interval

BOUND = 1.15
BATCHES, BATCH_SIZE, LENGTH = 4, 8, 64
ROUNDS = 4
Batches = list[dict[str, torch.Tensor]]


@pytest.mark.benchmark
@pytest.mark.usefixtures("threads")
def test_analyze_costs_little_more_than_a_forward_pass(capsys):
    model = tf.BertModel(
        tf.BertConfig(), add_pooling_layer=False
    ).eval()  # the defaults are BERT-base: 12 layers, 768 features
    batches = [_batch() for _ in range(BATCHES)]
    calls: dict[str, Callable[[], Any]] = {"forward": partial(_forward, model, batches)}
    for rows in ("mean", "tokens"):
        calls[rows] = partial(analyze, model, batches, num_blocks=8, rows=rows, progress=False)
    seconds = _in_turn(calls)
    ratios = {rows: seconds[rows] / seconds["forward"] for rows in ("mean", "tokens")}
    with capsys.disabled():
        print(
            f"\nforward {np.median(seconds['forward']):.2f} s: {BATCHES} batches of {BATCH_SIZE} x {LENGTH} tokens, "
            f"{THREADS} threads"
        )
        for rows, values in ratios.items():
            low, high = interval(values)
            print(
                f"analyze / forward, rows={rows}: {np.median(values):.3f} (median of {ROUNDS}; 95 % bootstrap "
                f"{low:.3f} .. {high:.3f})"
            )
    if os.environ.get("DEEPARC_BENCHMARK_BOUND") == "1":
        assert all(np.median(values) <= BOUND for values in ratios.values())


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 30_000, (BATCH_SIZE, LENGTH))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _forward(model: nn.Module, batches: Batches) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


def _in_turn(calls: Mapping[str, Callable[[], Any]]) -> dict[str, np.ndarray]:
    """Seconds of each call, shape (ROUNDS,): all once to warm up, then in turn, so that a slow spell of the machine
    hits all.
    """
    seconds = {name: np.empty(ROUNDS + 1) for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name][turn] = time.perf_counter() - start
    return {name: values[1:] for name, values in seconds.items()}
