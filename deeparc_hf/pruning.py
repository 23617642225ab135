"""Similarity pruning without a Trainer: analyze a model, and carry the plan out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from .architectures import Stack, describe
from .config import MPruneConfig
from .errors import CalibrationError
from .observe import StackObserver, observe
from .plan import PruningPlan, StackFacts, check_possible, make_plan, warn_if_drastic
from .record import PrunedConfig
from .similarity import metrics
from .surgery import apply_plan

__all__ = ["analyze", "check_settings", "compare_blocks", "prune_model"]


def analyze(
    model: nn.Module, dataloader: Iterable[Any], config: MPruneConfig | None = None, *, progress: bool = True, **settings: Any
) -> PruningPlan:
    """Compare the blocks of every stack on calibration data, and plan what to remove. Changes nothing.

    Args:
        model: a model that `find_stacks` knows.
        dataloader: any iterable of batches: dicts of tensors as the model's forward takes them, or tuples whose first entry is the
            model's input. Up to `config.calibration_samples` samples are used. Use training data, never the data you evaluate on.
        config: the settings; or give them by keyword: `analyze(model, dataloader, threshold=0.95)`.
        progress: show a progress bar on a terminal.

    Returns:
        The plan; print it to see a table, `plan.replan(...)` to try other settings at once.

    Raises:
        CalibrationError: if the data is empty or too little, or a block's output is constant, NaN or infinite.
        UnsupportedModelError, ConfigError, PlanError: see these.
    """
    plan = compare_blocks(model, dataloader, MPruneConfig.from_settings(config, settings), progress=progress)
    warn_if_drastic(plan)
    return plan


def compare_blocks(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: MPruneConfig,
    *,
    progress: bool = True,
    gather: Callable[[Callable[[], Any]], list[Any]] | None = None,
    max_samples: int | None = None,
    labels: Mapping[str, tuple[int, ...]] | None = None,
) -> PruningPlan:
    """`analyze` for one of several processes, or for a later pruning of one training.

    Args:
        gather: as in `observe`.
        max_samples: samples of this process; None: `config.calibration_samples`.
        labels: by stack, what patterns call each block (`StackFacts.labels`).
    """
    host, _, stacks = describe(model)
    if any(p.device.type == "meta" for p in host.root.parameters()):
        raise CalibrationError(
            f"{type(host.root).__name__} has no weights (meta device), so its blocks cannot be compared. Load its checkpoint."
        )
    metric = metrics.get(config.similarity)
    observers = [StackObserver(stack, metric(), config.effective_rows) for stack in stacks.values()]
    limit = config.calibration_samples if max_samples is None else max_samples
    samples, found = observe(host, observers, dataloader, limit, progress=progress, gather=gather)
    frozen = PrunedConfig.from_model(model).frozen if host.record() is not None else {}
    facts = {}
    for (name, stack), observed in zip(stacks.items(), found, strict=True):
        facts[name] = dataclasses.replace(
            _facts(stack, metric.matrix(observed.sums)), labels=(labels or {}).get(name, ()), frozen=frozen.get(name, ())
        )
    return make_plan(facts, config, samples)


def check_settings(model: nn.Module, config: MPruneConfig) -> None:
    """Check names and targets in the settings against a model, before any work is done.

    Raises:
        PlanError: if a pattern or a stack name matches nothing, or a target cannot be reached whatever the similarities.
    """
    stacks = describe(model)[2]
    facts = {n: StackFacts(((0.0,) * len(s),) * len(s), dict(s.pinned), next_stack=s.next_stack) for n, s in stacks.items()}
    check_possible(facts, config)


def prune_model(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: MPruneConfig | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    progress: bool = True,
    **settings: Any,
) -> PruningPlan:
    """`analyze`, then `apply_plan`: find redundant blocks and remove them, in place, all or nothing.

    Args:
        model, dataloader, config, progress, settings: as in `analyze`.
        optimizer: as in `remove_blocks`.

    Returns:
        The plan that was carried out; the model carries the record.

    Raises:
        As `analyze` and `apply_plan`; nothing is changed then.
    """
    seen: list[Any] = []
    plan = analyze(model, _noting_first(dataloader, seen), config, progress=progress, **settings)
    apply_plan(model, plan, optimizer=optimizer, example=seen[0])
    return plan


def _noting_first(batches: Iterable[Any], seen: list[Any]) -> Iterator[Any]:
    iterator = iter(batches)
    for first in iterator:
        seen.append(first)
        yield from chain([first], iterator)


def _facts(stack: Stack, matrix: torch.Tensor) -> StackFacts:
    for index, row in enumerate(matrix):
        if not bool(torch.isfinite(row[index])):
            raise CalibrationError(
                f"Block {index} of {stack.name} hardly varies over the calibration samples, so it cannot be compared. Give more, "
                "and more different, samples, or compare other rows (rows='tokens')."
            )
    return StackFacts(
        similarity=tuple(tuple(row) for row in matrix.tolist()),
        pinned=dict(stack.pinned),
        parameters=tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks),
        next_stack=stack.next_stack,
    )
