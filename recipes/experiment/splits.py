"""The three splits of an experiment: one to train and calibrate on, one to judge prunings on, one for the figures of
the tables.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deeparc_hf.errors import ConfigError
from deeparc_hf.reports.provenance import dataset_facts

from .arguments import DataArguments

__all__ = ["Splits", "load_splits"]

_FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


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
        for setting, column in columns.items():
            for use in ("train", "validation", "test"):
                there = getattr(self, use).column_names
                if column is not None and column not in there:
                    near = difflib.get_close_matches(column, there, n=1)
                    hint = f" Did you mean {near[0]!r}?" if near else ""
                    raise ConfigError(
                        f"{setting}: there is no column {column!r} in the {use} data; there are "
                        f"{', '.join(map(repr, there))}.{hint}"
                    )

    def need_texts(self, **columns: str | None) -> None:
        """Make sure that every split has some columns, and a text in each of their rows.

        Raises:
            ConfigError: if a split lacks one, or a row has no text in it.
        """
        self.need(**columns)
        for setting, column in columns.items():
            for use in ("train", "validation", "test") if column is not None else ():
                part = getattr(self, use)
                kind = getattr(part.features[column], "dtype", None)
                if kind not in ("string", "large_string"):
                    raise ConfigError(
                        f"{setting}: the column {column!r} of the {use} data holds {kind or 'something else'}, no "
                        f"texts."
                    )
                empty = part.select_columns([column]).with_format("arrow")[:][column].null_count
                if empty:
                    rows = "1 row has" if empty == 1 else f"{empty:,} rows have"
                    raise ConfigError(
                        f"{setting}: {rows} no text in the column {column!r} of the {use} data. Leave such rows out."
                    )


def load_splits(data: DataArguments, seed: int) -> Splits:
    """Load the splits: local files (or folders of images, by class) where they are given, else the data set's.

    Without a validation split a tenth of the training split is held out; without a test split the figures are of the
    validation split, which a note says.

    Raises:
        ConfigError: if there is no data, or a split is not there.
    """
    import datasets  # takes seconds

    files = {"train": data.train_file, "validation": data.validation_file, "test": data.test_file}
    names = {"train": data.train_split, "validation": data.validation_split, "test": data.test_split}
    if data.train_file is not None:
        loaded: Mapping[str, Any] = {use: _of_file(datasets, file) for use, file in files.items() if file is not None}
        names = {use: use for use in names}
    elif data.dataset is not None:
        loaded = _of_hub(datasets, data)
        for use, file in files.items():
            if file is not None:  # a file instead of that split
                names[use] = f"the file of {use}"
                loaded[names[use]] = _of_file(datasets, file)
    else:
        raise ConfigError("There is no data: give dataset (a Hub id), or train_file.")
    if names["train"] not in loaded:
        raise ConfigError(
            f"There is no split {names['train']!r} to train on; there are {', '.join(loaded)}. Give train_split."
        )
    train, notes = loaded[names["train"]], []
    origins = {use: _origin(data, files[use], names[use], loaded.get(names[use])) for use in files}
    for use in ("validation", "test"):
        if names[use] in loaded and _same(origins, files, use, "train"):
            raise ConfigError(
                f"The {use} data is the training data: figures would be of what was trained on. Give other data, or "
                f"leave it out."
            )
    if len(train) == 0:
        raise ConfigError("The training data has no rows.")
    if names["validation"] in loaded:
        validation = loaded[names["validation"]]
    else:
        if len(train) < 2:
            raise ConfigError(
                "The training data has one row, and there is no validation data: nothing can be held out."
            )
        parts = train.train_test_split(0.1, seed=seed)
        train, validation = parts["train"], parts["test"]
        origins["validation"] = {**origins["train"], "part": f"a tenth, held out by seed {seed}"}
        origins["train"] = {**origins["train"], "part": f"all but a tenth, by seed {seed}"}
        notes.append(
            "There is no validation split: prunings were judged on a tenth of the training split, which was not "
            "trained on."
        )
    if names["test"] not in loaded and data.test_split != DataArguments.test_split:
        raise ConfigError(
            f"There is no split {data.test_split!r} to measure on; there are {', '.join(loaded)}. Give test_split."
        )
    test = loaded.get(names["test"])
    if test is None or (names["validation"] in loaded and _same(origins, files, "test", "validation")):
        test = validation
        origins["test"] = {**origins["validation"], "same as": "validation"}
        notes.append(
            "There is no test split of its own: the figures are of the data that prunings were judged on, and so are "
            "optimistic."
        )
    for use, part in (("validation", validation), ("test", test)):
        if len(part) == 0:
            raise ConfigError(f"The {use} data has no rows.")
    limits = (data.max_train_samples, data.max_validation_samples, data.max_test_samples)
    parts = [_first(part, limit, seed) for part, limit in zip((train, validation, test), limits, strict=True)]
    sources = {use: {**origins[use], "rows": len(part)} for use, part in zip(files, parts, strict=True)}
    return Splits(*parts, tuple(notes), sources)


def _origin(data: DataArguments, file: str | None, split: str, part: Any) -> dict[str, Any]:
    """Where a split came from, as it may be published: files by their names, and no folders."""
    if file is not None:
        path = Path(file)
        if not path.is_file():
            return {"file": "a folder"}
        with path.open("rb") as stream:
            return {"file": path.name, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    if data.dataset is None or Path(data.dataset).exists():
        return {"split": split}
    known = {
        "id": data.dataset,
        "revision": data.dataset_revision,
        "config": data.dataset_config,
        "split": split,
        **dataset_facts(part),
    }
    return {key: value for key, value in known.items() if value is not None}


def _same(origins: Mapping[str, Mapping[str, Any]], files: Mapping[str, str | None], one: str, other: str) -> bool:
    """Whether two splits are the same: of one data set by name, or files with the same content, or one folder."""
    pair = files[one], files[other]
    if None not in pair and "sha256" not in origins[one]:
        return Path(str(pair[0])).resolve() == Path(str(pair[1])).resolve()
    digests = [origins[use].get("sha256") for use in (one, other)]
    return (
        digests[0] == digests[1]
        if None not in digests
        else pair == (None, None) and origins[one]["split"] == origins[other]["split"]
    )


def _of_hub(datasets: Any, data: DataArguments) -> dict[str, Any]:
    """The splits of a data set by name, or of a folder of files."""
    try:
        return dict(datasets.load_dataset(data.dataset, data.dataset_config, revision=data.dataset_revision))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        given = {
            "dataset": data.dataset,
            "dataset_config": data.dataset_config,
            "dataset_revision": data.dataset_revision,
        }
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
