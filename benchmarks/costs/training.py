"""What the callback costs a training: idle, its share of a step; with a pruning in it, the whole training beside the
sum of its parts, which are timed by hand: the epochs of both models, and the evaluations that the Trainer makes. What
partial freezing saves, beside what the frozen share allows.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
import transformers as tf
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from deeparc_hf import MPruneCallback, find_stacks, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.healing.heal import fit_sites
from deeparc_hf.observe.quality import measure_quality
from deeparc_hf.pruning.compare import compare_blocks
from deeparc_hf.pruning.freezing import freeze_blocks

from .rows import Row, in_turn, profile, row_of

__all__ = ["measure"]

PART = "training"
STACK = "bert.encoder.layer"
PARTS = {"comparing": [compare_blocks], "losses told of each step": [measure_quality], "repairs": [fit_sites]}


def measure(rounds: int, quick: bool) -> Iterator[Row]:
    steps, evaluated, samples = (2, 16, 32) if quick else (60, 128, 256)
    yield _idle(rounds, 2 * min(steps, 20))
    for name, settings in {
        "by similarity": {},
        "by similarity, with healing": {"heal": "lstsq"},
    }.items():
        sampled = {"calibration_samples": samples, **settings}
        yield _whole(name, 1 if quick else max(3, rounds // 2), 16 * steps, evaluated, sampled)
    yield _freezing(max(rounds, 5), 6 if quick else 12)


def _bert(blocks: int = 12, width: int = 256) -> tf.BertForSequenceClassification:
    torch.manual_seed(0)
    heads = {"num_hidden_layers": blocks, "num_attention_heads": width // 64}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, **heads}
    return tf.BertForSequenceClassification(tf.BertConfig(**sizes, vocab_size=8000, num_labels=4))


def _texts(rows: int) -> datasets.Dataset:
    ids = torch.randint(5, 8000, (rows, 64), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": ids.tolist(), "labels": (ids[:, 0] % 4).tolist()}
    return datasets.Dataset.from_dict(data).with_format("torch")


def _train(model: Any, rows: int, evaluated: int, *callbacks: TrainerCallback, **arguments: Any) -> float:
    """Seconds of `train()`."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=16,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to=[],
            seed=0,
            **arguments,
        )
        data = {"train_dataset": _texts(rows), "eval_dataset": _texts(evaluated)}
        trainer = Trainer(model, args, **data, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


class _Timed(MPruneCallback):
    """Counts the seconds that the callback takes in every step."""

    spent = 0.0

    def on_step_begin(self, *event: Any, **more: Any) -> None:
        began = time.perf_counter()
        super().on_step_begin(*event, **more)
        self.spent += time.perf_counter() - began

    def on_step_end(self, *event: Any, **more: Any) -> None:
        began = time.perf_counter()
        super().on_step_end(*event, **more)
        self.spent += time.perf_counter() - began


class _Steps(TrainerCallback):
    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_begin(self, *event: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *event: Any, **more: Any) -> None:
        self.seconds += time.perf_counter() - self._began


def _idle(rounds: int, steps: int) -> Row:
    shares = []
    for _ in range(rounds):
        callback, clock = _Timed(threshold=1.0, start_epoch=1, retrain_epochs=1, calibration_samples=32), _Steps()
        _train(_bert(6), 16 * steps, 16, callback, clock, num_train_epochs=2)
        shares.append(callback.spent / clock.seconds)
    told = f"{2 * steps} steps of 16 x 64 tokens, 6 blocks of 256"
    return row_of(PART, "a callback that has nothing to do / a step", np.array(shares), "<= 0.01", told)


def _whole(name: str, rounds: int, rows: int, evaluated: int, settings: dict[str, Any]) -> Row:
    """2 epochs, 4 of 12 blocks gone, 2 epochs."""
    ratios = []
    every: dict[str, Any] = {"eval_strategy": "epoch"}

    def train() -> tuple[MPruneCallback, float]:
        callback = MPruneCallback(num_blocks=8, start_epoch=2, retrain_epochs=2, **settings)
        return callback, _train(_bert(width=128), rows, evaluated, callback, num_train_epochs=4, **every)

    for turn in range(rounds + 1):
        callback, whole = train()
        parts = _train(_bert(width=128), rows, evaluated, num_train_epochs=2, **every)
        smaller = _bert(width=128)
        remove_blocks(smaller, {STACK: callback.plan.removed[STACK]})
        parts += _train(smaller, rows, evaluated, num_train_epochs=2, **every)
        if turn:
            ratios.append(whole / parts)
    told = f"4 epochs of {rows} texts of 64 tokens, 4 of 12 blocks of 128 removed, {settings}; "
    told += profile(train, PARTS, parts)
    return row_of(PART, f"a training with a pruning {name} / its parts", np.array(ratios), "<= 1.05", told)


def _freezing(rounds: int, blocks: int) -> Row:
    """A sixth of the blocks goes; of those that stay all are frozen up to the last two before the end, and the last.

    What that allows: of a step that trains all, the way back below the lowest trained block goes, and so do the weight
    gradients and optimizer steps of what is frozen. What these cost is measured in the same rounds on the same model.
    """
    gone = list(range(blocks - 4, blocks - 4 + blocks // 6))
    full, partly = _bert(blocks), _bert(blocks)
    remove_blocks(full, {STACK: gone})
    frozen = remove_blocks(partly, {STACK: gone}, freeze="partial").frozen[STACK]
    left = len(find_stacks(full)[STACK])
    lowest = min(set(range(left)) - set(frozen))
    ways: dict[str, Callable[[], Any]] = {"full": _step(full), "partly": _step(partly)}
    ways |= {"no embeddings": _step(_frozen_by_hand(full, False)), "head": _step(_frozen_by_hand(full, True))}
    there, back = _way_through(full, False), _way_through(full, True)
    seconds = in_turn({**ways, "there": there, "there and back": back}, rounds)
    inputs = (seconds["there and back"] - seconds["there"]) / left  # gradients of one block's inputs
    weights = (seconds["no embeddings"] - seconds["head"] - (left - 1) * inputs) / left
    allowed = seconds["head"] + (left - 1 - lowest) * inputs + (left - len(frozen)) * weights
    saved, bound = seconds["partly"] / seconds["full"], allowed / seconds["full"]
    told = (
        f"{left} blocks of 256, frozen {list(frozen)}; {np.median(saved):.3f} of a step, {np.median(bound):.3f} allowed"
    )
    return row_of(PART, "a step with partial freezing / what the frozen share allows", saved / bound, "<= 1.10", told)


def _batch() -> dict[str, torch.Tensor]:
    return dict(_texts(16)[:16])


def _step(model: nn.Module) -> Callable[[], None]:
    batch = _batch()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _frozen_by_hand(model: tf.BertForSequenceClassification, blocks_too: bool) -> nn.Module:
    model = copy.deepcopy(model)
    model.bert.embeddings.requires_grad_(False)
    if blocks_too:
        model.bert.encoder.requires_grad_(False)
    return model


def _way_through(full: nn.Module, back: bool) -> Callable[[], None]:
    """All blocks, frozen, forward, and back to what the first is given."""
    subject = describe(copy.deepcopy(full))
    freeze_blocks(subject, {STACK: list(range(len(subject.stacks[STACK])))})
    model = subject.host.root.train()
    embedded = model.bert.embeddings(_batch()["input_ids"]).detach()

    def run() -> None:
        hidden = embedded.clone().requires_grad_()
        for block in model.bert.encoder.layer:
            output = block(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        if back:
            hidden.sum().backward()

    return run
