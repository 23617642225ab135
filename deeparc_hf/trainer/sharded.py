"""Trainings that shard their parameters (FSDP, DeepSpeed): prune before anything is wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from ..core.compat import accelerate_has_state
from ..core.distributed import agree
from ..core.progress_bars import shows_bars
from ..errors import ConfigError
from ..observe.training_calibration import TrainingCalibration, kept_columns
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..pruning.prune import apply_healed, compare_blocks

__all__ = ["is_sharded", "prune_before_sharding"]


_SHARDING = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)


def is_sharded(args: TrainingArguments) -> bool:
    """Whether the Trainer will shard the model's parameters: by its own arguments, or by the launcher's settings."""
    state = AcceleratorState() if accelerate_has_state() else None
    return bool(args.deepspeed or args.fsdp) or (state is not None and state.distributed_type in _SHARDING)


def prune_before_sharding(
    model: nn.Module,
    config: MPruneConfig,
    calibration: Dataset | Iterable[Any],
    args: TrainingArguments,
    processing_class: Any = None,
) -> PruningPlan:
    """Prune once, in every process alike, when the Trainer is made.

    Args:
        processing_class: the Trainer's; of a tokenizer the collator is made, as the Trainer makes it.

    Raises:
        ConfigError: if the config asks for more than one pruning at the start.
    """
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
    columns = kept_columns(model, args, None)
    source = TrainingCalibration(
        calibration,
        None,
        args.train_batch_size,
        config,
        again=config.heal is not None,
        model=model,
        columns=columns,
        processing_class=processing_class,
    )
    bars = shows_bars(args)
    with source.reading():
        plan = compare_blocks(model, source, config, progress=bars)
        plan = PruningPlan.from_dict(agree(plan.to_dict))
        apply_healed(model, plan, source, progress=bars)
    return plan
