"""The three splits of an experiment: one to train and calibrate on, one to judge prunings on, one for the figures of the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MissingDependencyError
from .arguments import DataArguments

__all__ = ["Splits", "load_splits"]

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Splits:
    """The data of an experiment, and how each split came about.

    Attributes:
        train, validation, test: data sets of the datasets library.
        notes: what is unusual about them.
    """

    train: Any
    validation: Any
    test: Any
    notes: tuple[str, ...] = ()

    def map(self, work: Any, **settings: Any) -> Splits:
        """`Dataset.map` on each split."""
        return Splits(*(part.map(work, **settings) for part in (self.train, self.validation, self.test)), self.notes)


def load_splits(data: DataArguments, seed: int) -> Splits:
    """Load the splits: local files where they are given, else the data set's.

    Without a validation split a tenth of the training split is held out; without a test split the figures are of the validation split,
    which a note says.

    Raises:
        ConfigError: if there is no data, or a split is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError('Recipes need the datasets library: pip install "deeparc_hf[recipes]".') from error
    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    names = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    if data.train_file is not None:
        loaded: Mapping[str, Any] = {use: _of_file(datasets, file) for use, file in files.items() if file is not None}
        names = {use: use for use in names}
    elif data.dataset is not None:
        loaded = datasets.load_dataset(data.dataset, data.dataset_config, revision=data.dataset_revision)
    else:
        raise ConfigError("There is no data: give dataset (a Hub id), or train_file.")
    if names["train"] not in loaded:
        raise ConfigError(f"There is no split {names['train']!r} to train on; there are {', '.join(loaded)}. Give train_split.")
    train, notes = loaded[names["train"]], []
    if names["validation"] in loaded:
        validation = loaded[names["validation"]]
    else:
        parts = train.train_test_split(0.1, seed=seed)
        train, validation = parts["train"], parts["test"]
        notes.append("There is no validation split: prunings were judged on a tenth of the training split, which was not trained on.")
    test = loaded.get(names["test"]) if hasattr(loaded, "get") else None
    if test is None or (data.dataset is not None and names["test"] == names["validation"]):
        test = validation
        notes.append("There is no test split of its own: the figures are of the data that prunings were judged on, and so are optimistic.")
    limits = (data.max_train_samples, data.max_validation_samples, data.max_test_samples)
    return Splits(*(_first(part, limit, seed) for part, limit in zip((train, validation, test), limits, strict=True)), tuple(notes))


def _of_file(datasets: Any, name: str) -> Any:
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"There is no file {name}.")
    if path.suffix not in _FORMATS:
        raise ConfigError(f"{name}: cannot read {path.suffix or 'a file without an ending'}. Give one of {', '.join(_FORMATS)}.")
    return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train")


def _first(part: Any, limit: int | None, seed: int) -> Any:
    return part if limit is None or limit >= len(part) else part.shuffle(seed=seed).select(range(limit))
