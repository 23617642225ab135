"""Calibration data inside a training: batches of its own, so that the training's data order is not touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from ..bars import samples_in
from ..config import MPruneConfig, WandaConfig
from ..distributed import process_count, process_index
from ..errors import CalibrationError

__all__ = ["Calibration"]


class Calibration:
    """Where a training takes its calibration batches from. Several processes share them out.

    Args:
        given: a data set, an iterable of batches, or None for the training data.
        loader: the training's data loader; its collator serves a data set that was given too.
        batch_size: samples of a batch.
        config: how many samples, and the seed of their choice.
        skip: leave so many of the chosen samples out, and take the next: they are others than those of a calibration.
    """

    def __init__(
        self,
        given: Dataset | Iterable[Any] | None,
        loader: DataLoader | None,
        batch_size: int,
        config: MPruneConfig | WandaConfig,
        skip: int = 0,
    ) -> None:
        if given is None and loader is None:
            raise CalibrationError("There is no training data to calibrate on. Give the callback calibration=...")
        if isinstance(given, Iterator) and (getattr(config, "iterations", 1) > 1 or getattr(config, "heal", None) is not None):
            raise CalibrationError(
                "calibration is an iterator, which can be gone through once, but every iteration compares the blocks anew, and healing "
                "goes through it again. Give a list of batches, a data loader or a data set."
            )
        self._is_dataset = given is None or _is_dataset(given)
        self._data = getattr(loader, "dataset", None) if given is None else given
        self._collate = getattr(loader, "collate_fn", None)
        self._batch_size = batch_size
        self._config = config
        self._skip = skip
        self.example: Any = None  # the first batch of the last pass

    @property
    def samples(self) -> int:
        """The most samples that this process looks at."""
        return math.ceil(self._config.calibration_samples / process_count())

    @property
    def num_samples(self) -> int | None:
        """The samples that this process goes through, for progress bars; None where that is not known."""
        count, index = process_count(), process_index()
        if not self._is_dataset:
            return samples_in(self._data) if count == 1 else None
        if isinstance(self._data, IterableDataset) or not hasattr(self._data, "__len__"):
            return None
        return len(range(index, min(max(0, len(self._data) - self._skip), self._config.calibration_samples), count))

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def batches(self) -> Iterator[Any]:
        """This process's share of the batches, from the start each time."""
        count, index = process_count(), process_index()
        data = self._data
        if not self._is_dataset:
            batches = islice(iter(data), index, None, count)
        elif isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            batches = islice(iter(self._loader(data)), index, None, count)
        else:
            generator = torch.Generator().manual_seed(self._config.seed)
            chosen = torch.randperm(len(data), generator=generator)[self._skip :][: self._config.calibration_samples].tolist()
            batches = iter(self._loader(Subset(data, chosen[index::count])) if chosen[index::count] else ())
        for number, batch in enumerate(batches):
            if number == 0:
                self.example = batch
            yield batch

    def _loader(self, data: Dataset) -> DataLoader:
        return DataLoader(data, batch_size=self._batch_size, collate_fn=self._collate)


def _is_dataset(data: Any) -> bool:
    """Whether what a user gives is a data set, whose items are samples, and not an iterable of batches."""
    return isinstance(data, Dataset) or type(data).__module__.partition(".")[0] == "datasets"
