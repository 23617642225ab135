"""Compare the blocks of a model on calibration data: what a plan is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from ..architectures import Host, Stack, Subject, describe
from ..checkpoint.record import check_record, current_record
from ..core.caller import warn_caller
from ..core.shards import numel
from ..errors import CalibrationError, CalibrationWarning, SurgeryError
from ..healing.sites import refuse_healing
from ..observe.calibration import Calibration
from ..observe.collect import Observed
from ..observe.forward import require_weights
from ..observe.rows import StackObserver, observe
from ..observe.skipping import StackSkipper, skip_blocks
from ..observe.whole import WholeObserver
from ..similarity import SimilarityMetric, SkippingMetric, metrics
from .clusters import chains
from .config import MPruneConfig
from .plan import ComparedStack, PruningPlan, check_possible, make_plan
from .rebuild import inexpressible, skeletons, tell_package

__all__ = ["check_settings", "compare_blocks", "uncompared_plan"]


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
    require_weights(host, offloaded=True)
    check_record(subject, 0)
    blank = _uncompared(stacks, inexpressible(subject, stock_only=config.stock_only), labels)
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
                parameters=tuple(sum(map(numel, block.parameters())) for block in stack.blocks),
                frozen=frozen.get(stack.name, ()),
            )
            first += len(stack)
    plan = make_plan(compared, config, samples, max(observed.batch for _, observed in found))
    _tell_obstacles(plan, obstacles)
    _tell_package(subject, plan)
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
        UnsupportedModelError: if the model is to be healed and cannot be.
    """
    subject = describe(model)
    if config.heal is not None:
        refuse_healing(subject.host)
    refused = inexpressible(subject, stock_only=config.stock_only)
    blank = _uncompared(subject.stacks, refused, None)
    check_possible(blank, config)
    if refused and all(len(stack.pinned) == len(stack) or len(stack) == 1 for stack in blank.values()):
        name, reasons = next(iter(refused.items()))
        index, reason = next(iter(reasons.items()))
        raise SurgeryError(f"No block of {subject.name} can be removed. {name}.{index}: {reason}.")


def uncompared_plan(
    subject: Subject, config: MPruneConfig, labels: Mapping[str, tuple[int, ...]] | None = None
) -> PruningPlan:
    """A plan of settings that remove nothing: which blocks are pinned and protected, without comparing any."""
    return make_plan(_uncompared(subject.stacks, inexpressible(subject, stock_only=config.stock_only), labels), config)


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


def _tell_package(subject: Subject, plan: PruningPlan) -> None:
    """Warn of a plan whose result will need the package to be loaded."""
    if plan.removed and not plan.config.stock_only and subject.host.can_drop:
        try:
            tell_package(subject, skeletons(subject, subject.without(plan.removed), stock_only=False))
        except SurgeryError:
            return  # which whoever carries it out will hear


def _similarity(stack: str, matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    for index, row in enumerate(matrix):
        if not bool(torch.isfinite(row[index])):
            raise CalibrationError(
                f"Block {index} of {stack} hardly varies over the calibration samples, so it cannot be compared. "
                "Give more, and more different, samples, or compare other rows (rows='tokens')."
            )
    return tuple(tuple(row) for row in matrix.tolist())
