"""Labels of a classification data set: names or numbers, the same numbers in every split."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .splits import Splits

__all__ = ["encode_labels"]

_MOST = 10_000


def encode_labels(splits: Splits, column: str) -> tuple[Splits, list[str]]:
    """Make the labels of all splits whole numbers in the column "labels".

    Args:
        column: of the labels: ClassLabel, whole numbers from 0, or names (numbered in the order of the alphabet).

    Returns:
        The splits, and the names by number.

    Raises:
        ConfigError: if there is no such column, or a split has a label that the training split lacks.
    """
    if column not in splits.train.column_names:
        raise ConfigError(f"There is no column {column!r}; there are {', '.join(splits.train.column_names)}. Give label_column.")
    feature = splits.train.features[column]
    names = getattr(feature, "names", None)
    if names is None:
        values = sorted(set(splits.train.unique(column)))
        if len(values) > _MOST:
            raise ConfigError(f"The column {column!r} has {len(values):,} different values: these are no classes. Give label_column.")
        whole = all(isinstance(value, int) for value in values)
        names = [str(value) for value in (range(values[-1] + 1) if whole else values)]
    numbers = {name: index for index, name in enumerate(names)}

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[int]]:
        found = []
        for value in rows[column]:
            index = value if isinstance(value, int) else numbers.get(value)
            if index is None or not 0 <= index < len(names):
                raise ConfigError(f"The label {value!r} is not among those of the training split: {', '.join(names[:20])}.")
            found.append(index)
        return {"labels": found}

    return splits.map(encode, batched=True, remove_columns=[column]), list(names)
