"""What a command is asked to work on: a model and calibration data, checked before the weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoint import loading
from ..errors import ConfigError
from ..pruning.config import MPruneConfig
from ..sparsity.config import WandaConfig
from .data import Columns, load_rows, make_batches, processor_of
from .sources import ModelSource, find_source, load_model, skeleton

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """A model that was asked for and the data for it, checked before its weights are read.

    Attributes:
        args: the command's arguments.
        source: where the model comes from.
        frame: the model without its weights.
        device: where the work is done.
        batches: calibration batches; None where no data was given.
        processor: the tokenizer or image processor to save with the checkpoint; None where there is none.
    """

    args: argparse.Namespace
    source: ModelSource
    frame: nn.Module
    device: torch.device
    batches: DataLoader | None
    processor: Any

    @classmethod
    def of(
        cls, args: argparse.Namespace, config: MPruneConfig | WandaConfig, check: Callable[[nn.Module], object]
    ) -> Job:
        """What the arguments ask for.

        Args:
            args: those of `common_options`, `data_options` and `output_options`.
            config: says how many samples, and the seed of their choice.
            check: refuses a model, given without its weights, that the settings are not for.
        """
        source = find_source(args.model)
        frame = skeleton(source, args.auto_class)
        check(frame)
        device = _device(args.device)
        if args.data is None:
            return cls(args, source, frame, device, None, processor_of(source, frame))
        columns = Columns(args.text_column, args.text_pair_column, args.target_column, args.image_column)
        rows = load_rows(args.data, args.split, args.subset)
        size = {"batch_size": args.batch_size, "max_length": args.max_length}
        batches, processor = make_batches(
            source, frame, rows, columns, samples=config.calibration_samples, seed=config.seed, **size
        )
        return cls(args, source, frame, device, batches, processor)

    def load(self) -> nn.Module:
        """The model with its weights, on the device."""
        return load_model(self.source, self.args.auto_class).to(self.device)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Save the checkpoint with its record, and its tokenizer or image processor where there is one."""
        loading.save_pruned(model, folder)
        if self.processor is not None:
            self.processor.save_pretrained(folder)


def _device(name: str | None) -> torch.device:
    """The device that was asked for, tried out."""
    if name is None:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"--device: cannot use {name!r}: {str(error).splitlines()[0]}") from error
