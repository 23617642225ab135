"""Pruning without a Trainer: analyze a model, by similarity or by a search, and carry the plan out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..architectures import Subject, describe
from ..checkpoint.record import PrunedConfig, check_record
from ..core.progress_bars import doing
from ..core.transaction import Transaction
from ..errors import CalibrationError, ConfigError
from ..healing.heal import apply_healing, fit_sites, note_healing
from ..healing.sites import Healing
from ..observe.calibration import Calibration
from ..observe.forward import require_weights
from ..pruning.compare import compare_blocks
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan, warn_if_drastic
from ..pruning.surgery import apply_plan, refuse_wrapped, require_fitting
from .search import search_plan

__all__ = ["analyze", "apply_healed", "prune_model", "take_example"]


def analyze(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: MPruneConfig | None = None,
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    greater_is_better: bool = True,
    progress: bool = True,
    **settings: Any,
) -> PruningPlan:
    """Compare the blocks of every stack on calibration data, or search for those that are missed least (`search`,
    `speedup`), and plan what to remove. Changes nothing.

    Args:
        model: a model that `find_stacks` knows.
        dataloader: any iterable of batches: dicts of tensors as the model's forward takes them, or tuples whose first
            entry is the model's input. Up to `config.calibration_samples` samples are used. Use training data, never
            the data you evaluate on.
        config: the settings; or give them by keyword: `analyze(model, dataloader, threshold=0.95)`.
        evaluate: what a search with objective="metric" goes by: measures a model, on data of its own that are not
            those of the final figures.
        greater_is_better: whether a larger number from `evaluate` is better.
        progress: show a progress bar on a terminal.

    Returns:
        The plan; print it to see a table, `plan.replan(...)` to try other settings at once. Blocks whose removal the
        model's settings cannot express are pinned in it, with the reason.

    Raises:
        CalibrationError: if the data is empty or too little, or a block's output is constant, NaN or infinite.
        UnsupportedModelError, ConfigError, PlanError: see these.
    """
    config = MPruneConfig.from_settings(config, settings)
    if evaluate is not None and (config.search is None or config.objective != "metric"):
        raise ConfigError(
            "evaluate is what a search with objective='metric' goes by, found "
            + ("no search." if config.search is None else f"objective={config.objective!r}.")
            + " Give search='greedy' and objective='metric', or leave evaluate out."
        )
    measure = {"evaluate": evaluate, "greater_is_better": greater_is_better}
    return _planned(describe(model), Calibration(dataloader, config.calibration_samples), config, progress, **measure)


def _planned(
    subject: Subject, calibration: Calibration, config: MPruneConfig, progress: bool, **measure: Any
) -> PruningPlan:
    """The plan that settings lead to: by similarity, or by a search."""
    if config.search is not None:
        require_weights(subject.host)
        return search_plan(subject, list(calibration.inputs(subject.host)), config, progress=progress, **measure)
    plan = compare_blocks(subject, calibration, config, progress=progress)
    warn_if_drastic(plan)
    return plan


def prune_model(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: MPruneConfig | PruningPlan | None = None,
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

    In place of a `config` a plan may stand, of `analyze` or of a search (`search_blocks(...).choose(...)`): it is
    carried out as it is, and healed where its settings say so.

    Returns:
        The plan that was carried out; the model carries the record.
    """
    given = config if isinstance(config, PruningPlan) else None
    if given is not None and settings:
        raise ConfigError(
            f"A plan is carried out with its own settings, found {', '.join(settings)} beside it. Leave them out, or "
            "make another plan: plan.replan(...)."
        )
    config = MPruneConfig.from_settings(config, settings) if given is None else given.config  # type: ignore[arg-type]
    if config.heal is not None and isinstance(dataloader, Iterator):
        raise CalibrationError(
            "heal goes through the calibration data again for each site, and an iterator can be used once. Give a list "
            "of batches."
        )
    subject = describe(model)
    check_record(subject)
    calibration = Calibration(dataloader, config.calibration_samples)
    if given is None:
        plan = _planned(subject, calibration, config, progress)
    else:
        plan = given
        require_fitting(subject, plan)
        if plan.removed:
            take_example(subject, calibration)
    if plan.removed:
        refuse_wrapped(model)
    apply_healed(subject, plan, calibration, optimizer=optimizer, verify=verify, progress=progress)
    return plan


def take_example(model: nn.Module | Subject, calibration: Calibration) -> None:
    """Note the first batch in the calibration: a removal is verified on it.

    Raises:
        CalibrationError: if there is none.
    """
    if calibration.example is None and next(calibration.inputs(describe(model).host), None) is None:
        raise CalibrationError("The calibration data is empty. Give batches: the result is verified on the first one.")


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
