"""Similarity pruning without a Trainer: analyze a model, and carry the plan out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..architectures import Host, Stack, Subject, describe
from ..checkpoint.record import PrunedConfig, check_record, current_record
from ..core.caller import warn_caller
from ..core.progress_bars import doing
from ..core.transaction import Transaction
from ..errors import CalibrationError, CalibrationWarning, SurgeryError
from ..healing.heal import apply_healing, fit_sites, note_healing
from ..healing.sites import Healing
from ..observe.calibration import Calibration
from ..observe.collect import Observed
from ..observe.forward import require_weights
from ..observe.rows import StackObserver, observe
from ..observe.skipping import StackSkipper, skip_blocks
from ..observe.whole import WholeObserver
from ..similarity import SimilarityMetric, SkippingMetric, metrics
from .clusters import chains
from .config import MPruneConfig
from .plan import ComparedStack, PruningPlan, check_possible, make_plan, warn_if_drastic
from .rebuild import inexpressible
from .surgery import apply_plan, refuse_wrapped

__all__ = ["analyze", "apply_healed", "check_settings", "compare_blocks", "prune_model"]


def analyze(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: MPruneConfig | None = None,
    *,
    progress: bool = True,
    **settings: Any,
) -> PruningPlan:
    """Compare the blocks of every stack on calibration data, and plan what to remove. Changes nothing.

    Args:
        model: a model that `find_stacks` knows.
        dataloader: any iterable of batches: dicts of tensors as the model's forward takes them, or tuples whose first
            entry is the model's input. Up to `config.calibration_samples` samples are used. Use training data, never
            the data you evaluate on.
        config: the settings; or give them by keyword: `analyze(model, dataloader, threshold=0.95)`.
        progress: show a progress bar on a terminal.

    Returns:
        The plan; print it to see a table, `plan.replan(...)` to try other settings at once. Blocks whose removal the
        model's settings cannot express are pinned in it, with the reason.

    Raises:
        CalibrationError: if the data is empty or too little, or a block's output is constant, NaN or infinite.
        UnsupportedModelError, ConfigError, PlanError: see these.
    """
    config = MPruneConfig.from_settings(config, settings)
    plan = compare_blocks(model, Calibration(dataloader, config.calibration_samples), config, progress=progress)
    warn_if_drastic(plan)
    return plan


def compare_blocks(
    model: nn.Module | Subject,
    calibration: Calibration,
    config: MPruneConfig,
    *,
    progress: bool = True,
    labels: Mapping[str, tuple[int, ...]] | None = None,
) -> PruningPlan:
    """`analyze` for one of several processes, or for a later pruning of one training, with `ComparedStack.labels`."""
    subject = describe(model)
    host, stacks = subject.host, subject.stacks
    require_weights(host)
    check_record(subject, 0)
    blank = _uncompared(stacks, inexpressible(subject), labels)
    check_possible(blank, config)
    samples, found = _observed(host, stacks, config, calibration, progress)
    frozen = current_record(subject).frozen
    compared, obstacles = {}, {}
    for group, observed in found:
        matrix = _matrix(config, group, observed)
        first = 0
        for stack in group:
            pinned = blank[stack.name].pinned
            if observed.obstacle is not None:
                obstacles[stack.name] = observed.obstacle
                pinned = {**dict.fromkeys(range(len(stack)), f"not compared: {observed.obstacle}"), **pinned}
            rows = matrix[first : first + len(stack)]
            compared[stack.name] = dataclasses.replace(
                blank[stack.name],
                similarity=_similarity(stack.name, rows[:, first : first + len(stack)]),
                before=tuple(map(tuple, rows[:, :first].tolist())) if first else (),
                pinned=pinned,
                parameters=tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks),
                frozen=frozen.get(stack.name, ()),
            )
            first += len(stack)
    plan = make_plan(compared, config, samples, max(observed.batch for _, observed in found))
    _tell_obstacles(plan, obstacles)
    return plan


def _observed(
    host: Host, stacks: Mapping[str, Stack], config: MPruneConfig, calibration: Calibration, progress: bool
) -> tuple[int, list[tuple[list[Stack], Observed]]]:
    """Look at the model: number of samples, and what was seen of each stack, or of several together."""
    metric = metrics.get(config.similarity)
    groups = [[stack] for stack in stacks.values()]
    if issubclass(metric, SkippingMetric):
        skippers = [StackSkipper(host, stack, metric(len(stack))) for stack in stacks.values()]
        samples, found = skip_blocks(host, skippers, calibration, progress=progress)
        return samples, list(zip(groups, found, strict=True))
    metric = cast(type[SimilarityMetric], metric)
    observers: list[StackObserver | WholeObserver]
    if config.effective_rows == "flat":
        groups = [list(chain.values()) for chain in chains(stacks)]
        observers = [WholeObserver(group, metric()) for group in groups]
    else:
        observers = [StackObserver(stack, metric(), config.effective_rows) for stack in stacks.values()]
    samples, found = observe(host, observers, calibration, progress=progress)
    return samples, list(zip(groups, found, strict=True))


def _matrix(config: MPruneConfig, group: Sequence[Stack], observed: Observed) -> torch.Tensor:
    """Similarities of all blocks of some stacks. Where they could not be compared, none is similar to another."""
    if observed.obstacle is not None:
        return torch.eye(sum(map(len, group)), dtype=torch.float64)
    return metrics.get(config.similarity).matrix(observed.sums)


def check_settings(model: nn.Module | Subject, config: MPruneConfig) -> None:
    """Check settings against a model, which may be on the meta device, before any work is done.

    Raises:
        PlanError: as `make_plan`, whatever the similarities.
        SurgeryError: if the model's settings can express no removal at all.
    """
    subject = describe(model)
    refused = inexpressible(subject)
    blank = _uncompared(subject.stacks, refused, None)
    check_possible(blank, config)
    if refused and all(len(stack.pinned) == len(stack) or len(stack) == 1 for stack in blank.values()):
        name, reasons = next(iter(refused.items()))
        index, reason = next(iter(reasons.items()))
        raise SurgeryError(f"No block of {subject.name} can be removed. {name}.{index}: {reason}.")


def _uncompared(
    stacks: Mapping[str, Stack], refused: Mapping[str, Mapping[int, str]], labels: Mapping[str, tuple[int, ...]] | None
) -> dict[str, ComparedStack]:
    """What is known of the stacks before their blocks are compared."""
    return {
        name: ComparedStack(
            ((0.0,) * len(stack),) * len(stack),
            {**refused.get(name, {}), **stack.pinned},
            labels=(labels or {}).get(name, ()),
            next_stack=stack.next_stack,
        )
        for name, stack in stacks.items()
    }


def prune_model(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: MPruneConfig | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    verify: bool = True,
    progress: bool = True,
    **settings: Any,
) -> PruningPlan:
    """`analyze`, then `apply_plan`: find redundant blocks and remove them, in place, all or nothing.

    With `heal="lstsq"` each removal site is healed (see `heal_model`), which goes through the data once more for each
    site. `model`, `dataloader`, `config`, `progress` and `settings` are those of `analyze`, `optimizer` and `verify`
    those of `remove_blocks`, whose example is the first batch. Errors are those of `analyze` and `apply_plan`, and
    leave the model as it is.

    Returns:
        The plan that was carried out; the model carries the record.
    """
    config = MPruneConfig.from_settings(config, settings)
    if config.heal is not None and isinstance(dataloader, Iterator):
        raise CalibrationError(
            "heal goes through the calibration data again for each site, and an iterator can be used once. Give a list "
            "of batches."
        )
    subject = describe(model)
    check_record(subject)
    calibration = Calibration(dataloader, config.calibration_samples)
    plan = compare_blocks(subject, calibration, config, progress=progress)
    warn_if_drastic(plan)
    if plan.removed:
        refuse_wrapped(model)
    apply_healed(subject, plan, calibration, optimizer=optimizer, verify=verify, progress=progress)
    return plan


def apply_healed(
    model: nn.Module | Subject,
    plan: PruningPlan,
    calibration: Calibration,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    example: Any = None,
    verify: bool = True,
    transaction: Transaction | None = None,
    progress: bool = True,
    done: Callable[[str], None] = lambda stage: None,
) -> tuple[PrunedConfig, list[Healing]]:
    """`apply_plan`, and heal the removal sites where the plan's settings say so. All or nothing.

    Args:
        calibration: the data for the fit, and for the example where none is given.
        done: called right after the removal ("removed"), and after the healing ("healed").

    Returns:
        The record, and the outcome at each site.
    """
    subject = describe(model)
    if plan.removed:
        refuse_wrapped(model)
    example = calibration.example if example is None else example
    healings: list[Healing] = []
    heals = plan.config.heal is not None and bool(plan.removed)
    if heals:
        healings = fit_sites(subject, plan.removed, calibration, progress=progress)
    blocks = [subject.stacks[healing.site.stack].blocks[healing.site.kept] for healing in healings]
    with transaction or Transaction() as undo:
        with doing("Removing blocks and verifying the result", progress and bool(plan.removed)):
            record = apply_plan(subject, plan, optimizer=optimizer, example=example, verify=verify, transaction=undo)
        done("removed")
        if heals:
            for healing, block in zip(healings, blocks, strict=True):
                apply_healing(healing, block, undo)
            done("healed")
            record = note_healing(subject.host, healings)
    return record, healings


def _tell_obstacles(plan: PruningPlan, obstacles: Mapping[str, str]) -> None:
    """Warn of stacks of which blocks could go, if they could be compared."""
    named = plan.config.num_blocks if isinstance(plan.config.num_blocks, Mapping) else None
    for name, obstacle in obstacles.items():
        if len(plan.stacks[name].protected) < len(plan.stacks[name]) and (named is None or name in named):
            warn_caller(
                f"The blocks of {name} cannot be compared, so all of them stay: {obstacle}. To remove some, name them "
                f"yourself, with remove_blocks, or take similarity='effect'. protect='{name}.*' says that they are to "
                "stay.",
                CalibrationWarning,
            )


def _similarity(stack: str, matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    for index, row in enumerate(matrix):
        if not bool(torch.isfinite(row[index])):
            raise CalibrationError(
                f"Block {index} of {stack} hardly varies over the calibration samples, so it cannot be compared. "
                "Give more, and more different, samples, or compare other rows (rows='tokens')."
            )
    return tuple(tuple(row) for row in matrix.tolist())
