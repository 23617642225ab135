"""The splits of an experiment: one to train and calibrate on, one to judge prunings on, one for the tables' figures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deeparc_hf.core.plain_text import did_you_mean
from deeparc_hf.errors import ConfigError
from deeparc_hf.reports.provenance import origin_of

from .arguments import DataArguments

__all__ = ["Splits", "load_splits"]

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_USES = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """The data of an experiment, and how each split came about.

    Attributes:
        train, validation, test: data sets of the datasets library.
        notes: what is unusual about them.
        sources: where each split came from: a file with its hash, or a data set's id, commit and split; and its number
            of rows.
    """

    train: Any
    validation: Any
    test: Any
    notes: tuple[str, ...] = ()
    sources: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def map(self, work: Any, keep: Sequence[str] = ()) -> Splits:
        """`Dataset.map` on batches of each split. The columns that were there go, but for those named in keep."""

        def mapped(part: Any) -> Any:
            gone = [column for column in part.column_names if column not in keep]
            return part.map(work, batched=True, remove_columns=gone)

        return self.each(mapped)

    def each(self, work: Callable[[Any], Any]) -> Splits:
        """The splits after some work on each."""
        return Splits(*(work(part) for part in (self.train, self.validation, self.test)), self.notes, self.sources)

    def need(self, **columns: str | None) -> None:
        """Make sure that every split has some columns, given by the names of the settings that name them; None: not
        asked for.

        Raises:
            ConfigError: if a split lacks one.
        """
        for setting, use, column in self._uses(columns):
            there = getattr(self, use).column_names
            if column not in there:
                raise ConfigError(
                    f"{setting}: there is no column {column!r} in the {use} data; there are "
                    f"{', '.join(map(repr, there))}.{did_you_mean(column, there)}"
                )

    def need_texts(self, **columns: str | None) -> None:
        """Make sure that every split has some columns, and a text in each of their rows.

        Raises:
            ConfigError: if a split lacks one, or a row has no text in it.
        """
        self.need(**columns)
        for setting, use, column in self._uses(columns):
            part = getattr(self, use)
            kind = getattr(part.features[column], "dtype", None)
            if kind not in ("string", "large_string"):
                raise ConfigError(
                    f"{setting}: the column {column!r} of the {use} data holds {kind or 'something else'}, no texts."
                )
            empty = part.select_columns([column]).with_format("arrow")[:][column].null_count
            if empty:
                rows = "1 row has" if empty == 1 else f"{empty:,} rows have"
                raise ConfigError(
                    f"{setting}: {rows} no text in the column {column!r} of the {use} data. Leave such rows out."
                )

    @staticmethod
    def _uses(columns: Mapping[str, str | None]) -> list[tuple[str, str, str]]:
        given = {setting: column for setting, column in columns.items() if column is not None}
        return [(setting, use, column) for setting, column in given.items() for use in _USES]


def load_splits(data: DataArguments, seed: int) -> Splits:
    """Load the splits: local files (or folders of images, by class) where they are given, else the data set's.

    Without a validation split a tenth of the training split is held out, or max_validation_samples of it where these
    are fewer; without a test split the figures are of the validation split, which a note says.

    Raises:
        ConfigError: if there is no data, or a split is not there.
    """
    given, names = _given(data)
    if "train" not in given:
        raise ConfigError(f"There is no split {data.train_split!r} to train on; there are {names}. Give train_split.")
    if "test" not in given and data.test_split != DataArguments.test_split:
        raise ConfigError(f"There is no split {data.test_split!r} to measure on; there are {names}. Give test_split.")
    for use in ("validation", "test"):
        if use in given and given[use].is_the_same_as(given["train"]):
            raise ConfigError(
                f"The {use} data is the training data: figures would be of what was trained on. Give other data, or "
                "leave it out."
            )
    for use, part in given.items():
        if len(part.rows) == 0:
            raise ConfigError(f"The {'training' if use == 'train' else use} data has no rows.")
    parts, notes = dict(given), []
    if "validation" not in given:
        # where the same rows are the test data too, a tenth is not too many
        parts |= _held_out(given["train"], seed, data.max_validation_samples if "test" in given else None)
        notes.append(
            f"There is no validation split: prunings were judged on {len(parts['validation'].rows):,} rows of the "
            "training split, which were not trained on."
        )
    if "test" not in given or ("validation" in given and given["test"].is_the_same_as(given["validation"])):
        origin = {**parts["validation"].origin, "same as": "validation"}
        parts["test"] = _Part(parts["validation"].rows, origin)
        notes.append(
            "There is no test split of its own: the figures are of the data that prunings were judged on, and so are "
            "optimistic."
        )
    rows, sources = {}, {}
    for use in _USES:
        rows[use] = _first(parts[use].rows, getattr(data, f"max_{use}_samples"), seed)
        sources[use] = {**parts[use].origin, "rows": len(rows[use])}
    return Splits(**rows, notes=tuple(notes), sources=sources)


@dataclass(frozen=True)
class _Part:
    """Rows, where they came from as it may be published (files by their names, and no folders), and their file."""

    rows: Any
    origin: Mapping[str, Any]
    file: str | None = None

    def is_the_same_as(self, other: _Part) -> bool:
        """Whether it is the same split of a data set, a file with the same content, or the same folder."""
        if self.file is not None and other.file is not None and "sha256" not in self.origin:
            return Path(self.file).resolve() == Path(other.file).resolve()
        digests = self.origin.get("sha256"), other.origin.get("sha256")
        if None not in digests:
            return digests[0] == digests[1]
        return self.file is other.file is None and self.origin["split"] == other.origin["split"]


def _given(data: DataArguments) -> tuple[dict[str, _Part], str]:
    """What is there of the three splits, and the names of all splits that there are. Files go before the data set."""
    import datasets  # takes seconds

    if data.train_file is None and data.dataset is None:
        raise ConfigError("There is no data: give dataset (a Hub id), or train_file.")
    loaded = _of_hub(datasets, data) if data.train_file is None else {}
    parts = {}
    for use in _USES:
        file, split = getattr(data, f"{use}_file"), getattr(data, f"{use}_split")
        if file is not None:
            parts[use] = _Part(_of_file(datasets, file), _origin_of_file(Path(file)), file)
        elif split in loaded:
            parts[use] = _Part(loaded[split], _origin_of_split(data, split, loaded[split]))
    return parts, ", ".join(loaded or parts)


def _held_out(train: _Part, seed: int, most: int | None) -> dict[str, _Part]:
    if len(train.rows) == 1:
        raise ConfigError("The training data has one row, and there is no validation data: nothing can be held out.")
    tenth = math.ceil(len(train.rows) / 10)
    count = tenth if most is None else min(tenth, most)  # what is not judged on is trained on
    parts = train.rows.train_test_split(count, seed=seed)
    return {
        "train": _Part(parts["train"], {**train.origin, "part": f"all but {count:,} rows, by seed {seed}"}),
        "validation": _Part(parts["test"], {**train.origin, "part": f"{count:,} rows, held out by seed {seed}"}),
    }


def _origin_of_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"file": "a folder"}
    with path.open("rb") as stream:
        return {"file": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _origin_of_split(data: DataArguments, split: str, rows: Any) -> dict[str, Any]:
    if data.dataset is None or Path(data.dataset).exists():
        return {"split": split}
    known = {"id": data.dataset, "revision": data.dataset_revision, "config": data.dataset_config, "split": split}
    return {key: value for key, value in {**known, **origin_of(rows)}.items() if value is not None}


def _of_hub(datasets: Any, data: DataArguments) -> dict[str, Any]:
    """The splits of a data set by name, or of a folder of files."""
    try:
        return dict(datasets.load_dataset(data.dataset, data.dataset_config, revision=data.dataset_revision))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        given = {name: getattr(data, name) for name in ("dataset", "dataset_config", "dataset_revision")}
        named = ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)
        raise ConfigError(f"The data ({named}) cannot be loaded: {' '.join(str(error).split())}") from error


def _of_file(datasets: Any, name: str) -> Any:
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"There is no file {name}.")
    if path.is_file() and path.suffix not in _FORMATS:
        raise ConfigError(
            f"{name}: cannot read {path.suffix or 'a file without an ending'}. Give one of {', '.join(_FORMATS)}."
        )
    try:
        if path.is_dir():
            return datasets.load_dataset(str(path), split="train")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return datasets.load_dataset(_FORMATS[path.suffix], data_files=str(path), split="train", **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{name} cannot be read, or has no rows: {' '.join(str(error).split())}") from error


def _first(part: Any, limit: int | None, seed: int) -> Any:
    return part if limit is None or limit >= len(part) else part.shuffle(seed=seed).select(range(limit))
