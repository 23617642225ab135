"""What the callback costs a training step when it is idle, and what partial freezing saves. Prints both.

Bounds are asserted only with DEEPARC_BENCHMARK_BOUND=1: on a shared machine a time is no test. The share of a step that
is spent in the callback is small enough to be bounded anyway.

    DEEPARC_BENCHMARK_BOUND=1 pytest -m benchmark benchmarks/test_training_cost.py
"""

from __future__ import annotations

import copy
import os
import time

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from deeparc_hf import MPruneCallback, find_stacks, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.pruning.freezing import freeze_blocks
from tests.zoo import as_trained

from .measuring import THREADS, interval

BATCH_SIZE, LENGTH, WIDTH, SEED = 16, 64, 256, 0
STEPS, WARMUP, ROUNDS = 7, 2, 3
STACK = "bert.encoder.layer"


def small_bert(layers: int) -> tf.BertForSequenceClassification:
    torch.manual_seed(SEED)
    config = tf.BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        vocab_size=8000,
        num_labels=4,
    )
    return as_trained(tf.BertForSequenceClassification(config))


def texts(rows: int) -> datasets.Dataset:
    ids = torch.randint(5, 8000, (rows, LENGTH), generator=torch.Generator().manual_seed(SEED))
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 4).tolist()}).with_format(
        "torch"
    )


class StepTimes(TrainerCallback):
    """Seconds of each training step: forward, backward, optimizer."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self._began)


class Timed(MPruneCallback):
    """Counts the seconds that the callback spends in each event."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.spent: dict[str, float] = {}

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        if not name.startswith("on_"):
            return value

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return value(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began

        return timed


def train(model, folder, data, *callbacks, **arguments) -> Trainer:
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=SEED,
        **arguments,
    )
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


@pytest.mark.benchmark
@pytest.mark.usefixtures("threads")
def test_an_idle_callback_costs_at_most_a_hundredth_of_a_step(tmp_path, capsys):
    callback, steps = Timed(threshold=1.0, retrain_epochs=1, calibration_samples=64), StepTimes()
    train(small_bert(6), tmp_path, texts(BATCH_SIZE * 40), callback, steps, num_train_epochs=1, logging_strategy="no")
    assert callback.plan is not None and not callback.plan.removed
    every_step = callback.spent["on_step_begin"] + callback.spent["on_step_end"]
    share = every_step / sum(steps.seconds)
    once = sum(seconds for name, seconds in callback.spent.items() if name not in ("on_step_begin", "on_step_end"))
    with capsys.disabled():
        print(
            f"\nidle callback: {share:.5%} of a step (median step {np.median(steps.seconds) * 1000:.0f} ms, "
            f"n={len(steps.seconds)})"
        )
        print(
            f"once, to compare the blocks on 64 samples: the time of {once / np.median(steps.seconds):.1f} training "
            "steps"
        )
    assert share <= 0.01


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.usefixtures("threads")
def test_partial_freezing_saves_what_the_frozen_share_allows(tmp_path, capsys):
    """12 blocks, 2 removed: of the 10 that stay the first 7 and the last are frozen.

    The bound: of a step that trains everything, the backward pass below the lowest trained block goes, and so do weight
    gradients and optimizer steps of what is frozen. What these cost is measured in the same run, on the same model, by
    freezing by hand.
    """
    full = small_bert(12)
    remove_blocks(full, {STACK: [8, 9]})
    partial = small_bert(12)
    record = remove_blocks(partial, {STACK: [8, 9]}, freeze="partial")
    frozen = record.frozen[STACK]
    blocks = len(find_stacks(full)[STACK])
    lowest = min(set(range(blocks)) - set(frozen))
    models = {"full": full, "partial": partial}
    models |= {name: frozen_by_hand(full, name) for name in ("no embeddings", "head only")}
    data = texts(BATCH_SIZE * STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():  # in turn, so that a slow spell of the machine hits all
            steps = StepTimes()
            train(copy.deepcopy(model), tmp_path, data, steps, num_train_epochs=1, logging_strategy="no")
            if turn > 0:
                seconds[name].append(float(np.median(steps.seconds[WARMUP:])))
    times = {name: np.array(values) for name, values in seconds.items()}
    inputs_only = input_gradients(full, data)
    per_block_inputs = inputs_only * (times["full"] / np.median(times["full"]))
    weights = (times["no embeddings"] - times["head only"] - (blocks - 1) * per_block_inputs) / blocks
    allowed = times["head only"] + (blocks - 1 - lowest) * per_block_inputs + (blocks - len(frozen)) * weights
    ratio, bound = times["partial"] / times["full"], allowed / times["full"]
    with capsys.disabled():
        print(
            f"\n{blocks} blocks of width {WIDTH}, frozen {list(frozen)}; {BATCH_SIZE} x {LENGTH} tokens a step; "
            f"{THREADS} threads"
        )
        milliseconds = {name: f"{np.median(times[name]) * 1000:.0f} ms" for name in ("full", "partial")}
        print(f"step: {milliseconds}, medians of {ROUNDS} trainings of {STEPS - WARMUP} steps, seed {SEED}")
        low, high = interval(ratio)
        print(f"partial / full: {np.median(ratio):.3f} (95 % bootstrap {low:.3f} .. {high:.3f})")
        low, high = interval(bound)
        print(f"what the frozen share allows: {np.median(bound):.3f} ({low:.3f} .. {high:.3f})")
        excess = ratio / bound
        low, high = interval(excess)
        print(f"measured / allowed: {np.median(excess):.3f} ({low:.3f} .. {high:.3f})")
    if os.environ.get("DEEPARC_BENCHMARK_BOUND") == "1":
        assert np.median(excess) <= 1.10


def frozen_by_hand(model: tf.PreTrainedModel, what: str) -> tf.PreTrainedModel:
    model = copy.deepcopy(model)
    model.bert.embeddings.requires_grad_(False)
    if what == "head only":
        model.bert.encoder.requires_grad_(False)
    return model


def input_gradients(full: tf.PreTrainedModel, data: datasets.Dataset) -> float:
    """Seconds that one frozen block adds to a backward pass that walks through it."""
    subject = describe(copy.deepcopy(full))
    host, stacks = subject.host, subject.stacks
    model = host.root
    freeze_blocks(subject, {STACK: list(range(len(stacks[STACK])))})
    batch = {key: value for key, value in data[:BATCH_SIZE].items() if key != "labels"}
    embedded = model.bert.embeddings(batch["input_ids"]).detach()
    times = {True: [], False: []}
    for _ in range(WARMUP + 3 * ROUNDS):
        for walks in times:
            hidden = embedded.clone().requires_grad_(walks)
            model.train()
            model.zero_grad()
            for block in model.bert.encoder.layer:
                output = block(hidden)
                hidden = output[0] if isinstance(output, tuple) else output
            loss = hidden.sum() if walks else None
            began = time.perf_counter()
            if loss is not None:
                loss.backward()
            times[walks].append(time.perf_counter() - began)
    return float(np.median(times[True][WARMUP:])) / len(stacks[STACK])
