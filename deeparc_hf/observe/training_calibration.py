"""Calibration data inside a training, which afterwards finds its data as if nobody had read from it."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, SkipBatchSampler
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Subset
from transformers import (
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import find_labels

from ..core.distributed import gather, process_count, process_index
from ..core.progress_bars import samples_in
from ..core.shards import moves_together
from ..errors import CalibrationError
from .calibration import Calibration, chosen_rows
from .forward import keeping_random_states, seed_random
from .untouched import ReadOnceError, apart, untouched

__all__ = ["Sampling", "TrainingCalibration", "calibration_of", "kept_columns", "share_of"]

# dimensions of what a model reads, in a batch; a row has one less
_DIMENSIONS = {"input_ids": 2, "inputs_embeds": 3, "pixel_values": 4, "input_features": 3, "input_values": 2}
_LABELS = ("labels", "label", "label_ids")
_GROUP = 64  # samples: of 8 tokens each they fill a group of the default metric


T = TypeVar("T")


class Sampling(Protocol):
    """What a config says of calibration: how many samples, and the seed of their choice."""

    @property
    def calibration_samples(self) -> int: ...

    @property
    def seed(self) -> int: ...


class TrainingCalibration(Calibration):
    """Where a training takes its calibration batches from. Several processes share them out.

    Of a data set with a length the rows are chosen at random, with the config's seed, and collated as the training's
    are. Of a stream the first ones are taken; and where a loader makes whole batches by a rule of its own (a batch
    sampler of the user's, batch_size=None, a list), its batches. Whatever the data set, the collator and the sampler
    keep, they keep as before each pass (`untouched`).

    Args:
        given: a data set, an iterable of batches, or None for the training data.
        loader: the training's data loader; its collator serves a data set that was given too.
        skip: leave so many of the chosen samples out, and take the next: they are others than those of a calibration.
        again: whether the data is gone through more than once, so that an iterator will not do.
        columns: the columns that a collator is to see of a data set that was given; None: all.
        processing_class: makes the collator where there is no loader, as the Trainer does.
    """

    def __init__(
        self,
        given: Dataset | Iterable[Any] | None,
        loader: DataLoader | Iterable[Any] | None,
        batch_size: int,
        config: Sampling,
        skip: int = 0,
        *,
        again: bool = False,
        model: nn.Module | None = None,
        columns: frozenset[str] | None = None,
        processing_class: Any = None,
    ) -> None:
        if given is None and loader is None:
            raise CalibrationError("There is no training data to calibrate on. Give the callback calibration=...")
        samples = math.ceil(config.calibration_samples / process_count())
        super().__init__(loader if given is None else given, samples)  # type: ignore[arg-type]
        self.can_repeat = True  # what can be read once only is told by an error of its own
        self._again = again
        self.is_given = given is not None
        self._config = config
        self._skip = skip
        self._model = model
        self._columns = columns if self.is_given else None
        self._data: Any = self._batches
        self._shared_out = False  # whether each process has a share of its own already
        self._collate = _row_collator(loader, processing_class)
        self._rows = self.is_given and _is_dataset(given)
        # what a DataLoader is told; None: the data is batches already
        self._how: Any = {"batch_size": batch_size} if self._rows else None
        if isinstance(given, Mapping):
            raise CalibrationError(
                f"calibration is a {type(given).__name__} with the keys {', '.join(map(repr, list(given)[:4]))}. Give "
                "one data set, or a list of batches: [batch, ...]."
            )
        if given is None:
            self._take_from(loader, batch_size)
        self._once: Iterator[Any] | None = None
        self._pass: weakref.ref[Iterator[Any]] | None = None
        if isinstance(given, Iterator):
            self._read_once(given)

    def together(self, look: Callable[[], T]) -> list[T]:
        """What looking at its share gives in each process."""
        return gather(look, together=self._model is not None and moves_together(self._model))

    @property
    def chooses(self) -> bool:
        """Whether rows are chosen one by one, so that others than those of a calibration can be had."""
        return self._rows and not isinstance(self._data, IterableDataset) and hasattr(self._data, "__len__")

    @property
    def num_samples(self) -> int | None:
        """The samples that this process goes through, for progress bars; None where that is not known."""
        if self.chooses:
            return len(self._share())
        return None if self._how is not None or process_count() > 1 else samples_in(self._data)

    @property
    def first_number(self) -> int:
        """The number that this process's first sample has among those of all processes, as far as it is known."""
        return self._share().start if self.chooses else 0

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def batches(self) -> Iterator[Any]:
        """This process's share of the batches, from the start each time. Read them within `reading`."""
        self._close()
        if self._once is not None:
            return self._noted(self._once)
        reading = self._noted(self._untouched())
        self._pass = weakref.ref(reading)
        return reading

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Afterwards no pass is open, and the random states of the process are as before."""
        with keeping_random_states(self._model):
            try:
                yield
            finally:
                self._close()

    def first(self) -> Any:
        """The first batch, which later passes give too; None if there is none.

        Raises:
            CalibrationError: if the data can be read once only, and would be lost for the training or for a later pass.
        """
        try:
            self.example = next(self.batches(), None)
        except ReadOnceError:
            if not self.is_given:
                raise
            self._read_once(self._fetch())
            self.example = next(self.batches(), None)
        if self._once is not None and self.example is not None:
            self._once = chain([self.example], self._once)
        return self.example

    # ---- one pass ----

    def _close(self) -> None:
        reading: Any = None if self._pass is None else self._pass()
        self._pass = None
        if reading is not None:
            reading.close()

    def _untouched(self) -> Iterator[Any]:
        roots = [("the collator", self._collate), ("the sampler", self._how), ("the data", self._data)]
        # rows and batches are copied
        roots = [(name, root) for name, root in roots if not isinstance(root, (list, tuple))]
        is_stream = isinstance(getattr(self._data, "dataset", self._data), IterableDataset)
        with untouched(roots, self._model, is_stream=is_stream) as check:
            for batch in self._fetch():
                check()
                yield batch

    def _fetch(self) -> Iterator[Any]:
        count, index = process_count(), process_index()
        if self.chooses:
            share = self._share()
            self.samples = max(self.samples, len(share))
            chosen = chosen_rows(len(self._data), self._config.calibration_samples, self._config.seed, self._skip)
            own = chosen[share.start : share.stop]
            return iter(self._loader(Subset(self._data, own)) if own else ())
        seed_random(None, self._config.seed)  # samplers draw on the CPU
        batches = self._data if self._how is None else self._loader(self._data)
        return islice(iter(batches), *((None,) if self._shared_out else (index, None, count)))

    def _share(self) -> range:
        """Which of the chosen samples are this process's."""
        total = min(max(0, len(self._data) - self._skip), self._config.calibration_samples)
        return share_of(total, process_count(), process_index())

    def _loader(self, data: Any) -> DataLoader:
        return DataLoader(data, collate_fn=self._collated, generator=torch.Generator(), **self._how)

    def _collated(self, rows: Any) -> Any:
        if self._columns is not None:
            rows = [self._without_unused(row) for row in rows]
        return self._collate(apart(rows))

    def _without_unused(self, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        kept = {key: value for key, value in row.items() if key in self._columns}
        if row and not kept:
            raise CalibrationError(
                f"No column of the calibration data is one that the model takes: found {', '.join(map(repr, row))}. "
                "Tokenize or process it as the training data is, or set remove_unused_columns=False in "
                "TrainingArguments."
            )
        return kept

    def _read_once(self, batches: Iterator[Any]) -> None:
        if self._again:
            raise CalibrationError(
                "calibration is an iterator, or leads to one, which can be gone through once, but every iteration "
                "compares the blocks anew, and healing goes through it again. Give a list of batches, a data loader or "
                "a data set."
            )
        self._once = batches

    # ---- the training's loader ----

    def _take_from(self, loader: Any, batch_size: int) -> None:
        """Find out how the training makes its batches."""
        if not isinstance(loader, DataLoader):
            return  # any iterable of batches
        self._data, inner = loader.dataset, loader.batch_sampler
        self._shared_out = isinstance(self._data, IterableDatasetShard) or isinstance(
            loader.sampler if inner is None else inner, BatchSamplerShard
        )
        is_stream = isinstance(self._data, IterableDataset)
        if inner is None and loader.batch_size is None:  # the data set gives whole batches
            self._collate = loader.collate_fn
            self._how = {"batch_size": None, **({} if is_stream else {"sampler": loader.sampler})}
            return
        while isinstance(inner, (BatchSamplerShard, SkipBatchSampler)):
            inner = inner.batch_sampler
        self._rows = is_stream or type(inner).__iter__ is BatchSampler.__iter__
        # where they are not taken one by one, which rows go together is the sampler's business
        self._how = {"batch_size": batch_size} if self._rows else {"batch_sampler": loader.batch_sampler}


def calibration_of(
    given: Dataset | Iterable[Any] | None,
    config: Sampling,
    args: TrainingArguments,
    state: TrainerState,
    event: Mapping[str, Any],
    again: bool = False,
) -> TrainingCalibration:
    """The calibration data of a training that begins; `event` is what the Trainer hands to a callback."""
    model, loader = event["model"], event.get("train_dataloader")
    columns = None if given is None else kept_columns(model, args, loader)
    size, processing_class = state.train_batch_size or args.train_batch_size, event.get("processing_class")
    return TrainingCalibration(
        given, loader, size, config, again=again, model=model, columns=columns, processing_class=processing_class
    )


def share_of(total: int, processes: int, index: int) -> range:
    """Which of so many samples one of several processes looks at: neighbours, so that the groups in which metrics
    compare rows are the same whatever the number of processes, where there are enough.
    """
    unit = _GROUP if total >= _GROUP * processes else 1
    first, last = (total // unit * part // processes * unit for part in (index, index + 1))
    return range(first, total if index + 1 == processes else last)


def kept_columns(model: nn.Module, args: TrainingArguments, loader: Any) -> frozenset[str] | None:
    """The columns of a data set that the Trainer would hand to its collator; None: all.

    Those of the training data as it goes into the collator are among them: some trainers have columns of their own.
    """
    if not args.remove_unused_columns:
        return None
    labels = find_labels(type(model)) if args.label_names is None else args.label_names
    training = getattr(getattr(loader, "dataset", None), "column_names", None)
    names = [*inspect.signature(model.forward).parameters, *_LABELS[1:], *labels]
    return frozenset([*names, *(training if isinstance(training, list) else ())])


def _row_collator(loader: Any, processing_class: Any) -> Callable[[Any], Any]:
    """What makes a batch of rows: the loader's collator, where it has one for them, else what the Trainer takes."""
    if isinstance(loader, DataLoader) and not (loader.batch_sampler is None and loader.batch_size is None):
        return loader.collate_fn
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def _is_dataset(data: Any) -> bool:
    """Whether what a user gives is a data set, whose items are samples, and not an iterable of batches."""
    if isinstance(data, (list, tuple)):
        return bool(data) and _is_row(data[0])
    if isinstance(data, (Dataset, IterableDataset)) or type(data).__module__.partition(".")[0] == "datasets":
        return True
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (DataLoader, Tensor, str))


def _is_row(item: Any) -> bool:
    """Whether an item of a list is a sample, as the Trainer takes a list of samples, and not a batch."""
    if isinstance(item, (list, tuple)):
        return len(item) > 1 and _dimensions(item[-1]) == 0
    if not isinstance(item, Mapping):
        return False
    labels = [_dimensions(item[name]) for name in _LABELS if name in item]
    for name, dimensions in _DIMENSIONS.items():
        if name in item:
            # images of one channel may lack its dimension: then a label for each of them tells
            return _dimensions(item[name]) == dimensions - 1 and not (name == "pixel_values" and 1 in labels)
    return 0 in labels or not any(isinstance(value, (Tensor, np.ndarray)) for value in item.values())


def _dimensions(value: Any) -> int:
    """Dimensions of a tensor, an array or nested lists."""
    if isinstance(value, (list, tuple)):
        return 1 + (_dimensions(value[0]) if value else 0)
    return value.ndim if isinstance(value, (Tensor, np.ndarray)) else 0
