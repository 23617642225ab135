"""Trainings that shard their parameters (FSDP, DeepSpeed): prune before anything is wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainerState, TrainingArguments

from ..architectures import find_host
from ..core.compat import accelerate_has_state
from ..core.distributed import agree
from ..core.progress_bars import shows_bars
from ..errors import ConfigError
from ..observe.training_calibration import calibration_of
from ..pruning.compare import compare_blocks
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..search.prune import apply_healed
from ..search.search import search_plan
from .searching import batches_of_all

__all__ = ["is_sharded", "prune_before_sharding"]

_SHARDING = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


def is_sharded(args: TrainingArguments) -> bool:
    """Whether the Trainer will shard the model's parameters: by its own arguments, or by the launcher's settings."""
    launched = accelerate_has_state() and AcceleratorState().distributed_type in _SHARDING
    return bool(args.deepspeed or args.fsdp) or launched


def prune_before_sharding(
    model: nn.Module,
    config: MPruneConfig,
    calibration: Dataset | Iterable[Any],
    args: TrainingArguments,
    processing_class: Any = None,
) -> PruningPlan:
    """Prune once, in every process alike, when the Trainer is made; settings that ask for more are refused."""
    if config.start_epoch or config.iterations > 1 or config.gated:
        raise ConfigError(
            "With sharded parameters (FSDP, DeepSpeed) one pruning is possible, when the Trainer is made. Leave "
            "start_epoch, iterations and max_drop out, or train in DistributedDataParallel."
        )
    if config.distill is not None:
        raise ConfigError(
            "With sharded parameters (FSDP, DeepSpeed) no whole model is left that could teach. Leave distill out, or "
            "train in DistributedDataParallel."
        )
    known = {"model": model, "processing_class": processing_class}
    source = calibration_of(calibration, config, args, TrainerState(), known, again=config.heal is not None)
    bars = shows_bars(args)
    with source.reading():
        if config.search is not None:
            batches = batches_of_all(find_host(model), source)
            plan = search_plan(model, batches, config, shared=True, progress=bars)
        else:
            plan = compare_blocks(model, source, config, progress=bars)
        plan = PruningPlan.from_dict(agree(plan.to_dict))
        apply_healed(model, plan, source, progress=bars)
    return plan
