"""Removing blocks without a training: calibration batches of the training data, the removal, and its reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import Trainer

from deeparc_hf.healing.sites import Healing
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.pruning.plan import PruningPlan
from deeparc_hf.pruning.prune import analyze, apply_healed
from deeparc_hf.publish.gather import PLAN_FILE
from deeparc_hf.reports.plan_report import Measurement, write_report

from .results import Row

__all__ = ["Removal", "calibration_batches", "remove_at_once"]


@dataclass(frozen=True)
class Removal:
    """What was removed.

    Attributes:
        plan: that was carried out.
        healings: what became of each removal site.
    """

    plan: PruningPlan
    healings: tuple[Healing, ...]

    def write(self, folder: Path, before: Row, after: Row) -> None:
        """Write the plan, and the report with the figures of both models."""
        self.plan.to_json(folder / PLAN_FILE)
        write_report(
            folder, self.plan, [_measurement("before", before), _measurement("removed", after)], healings=self.healings
        )


def calibration_batches(trainer: Trainer, samples: int, seed: int, given: Any = None) -> Iterable[Any]:
    """Batches of randomly chosen training samples, which one can go through again and again; the same in each process.

    Args:
        trainer: its training data is used, and collated as for a training.
        samples: the number of samples.
        seed: of the choice.
        given: data to use instead.
    """
    loader = trainer.get_train_dataloader()
    data = loader.dataset if given is None else given
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    return DataLoader(Subset(data, chosen), batch_size=trainer.args.train_batch_size, collate_fn=loader.collate_fn)


def remove_at_once(model: nn.Module, batches: Iterable[Any], config: MPruneConfig, progress: bool = True) -> Removal:
    """`prune_model`, with what became of each removal site."""
    plan = analyze(model, batches, config, progress=progress)
    if not plan.removed:
        return Removal(plan, ())
    _, healings = apply_healed(model, plan, batches, example=next(iter(batches)), progress=progress)
    return Removal(plan, tuple(healings))


def _measurement(label: str, row: Row) -> Measurement:
    metrics = row.measured.metrics
    return Measurement(
        label,
        blocks=sum(row.blocks.values()),
        parameters=row.parameters,
        accuracy=metrics.get("accuracy"),
        samples=row.measured.samples,
        evaluation_loss=metrics.get("loss"),
        evaluation_seconds=row.measured.seconds,
        threshold=row.threshold,
        k=row.k,
    )
