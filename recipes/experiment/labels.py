"""Labels of a classification data set: names or numbers, the same numbers in every split."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from deeparc_hf.errors import ConfigError

from .splits import Splits

__all__ = ["classes_of", "encode_labels", "label_settings"]

_MOST = 10_000


def encode_labels(splits: Splits, column: str, order: Sequence[str] | None = None) -> tuple[Splits, list[str]]:
    """Make the labels of all splits whole numbers in the column "labels". Other columns are not read.

    Args:
        column: ClassLabel, whole numbers from 0, or names (numbered in the order of the alphabet).
        order: the classes of a model that is fine-tuned already; labels that have names are numbered as these.

    Returns:
        The splits, and the names by number.

    Raises:
        ConfigError: if there is no such column, a row has no label, or a split has a label that the training split
            lacks.
    """
    splits.need(label_column=column)
    names = _names_of(splits.train, column)
    if names is None:
        values = _values(splits.train, column)
        if len(values) > _MOST:
            raise ConfigError(
                f"The column {column!r} has {len(values):,} different values: these are no classes. Give label_column."
            )
        whole = all(isinstance(value, int) for value in values)
        keys: list[Hashable] = (
            list(range(values[-1] + 1)) if whole and values[0] >= 0 and values[-1] < _MOST else values
        )
        names, numbers = [str(key) for key in keys], {key: index for index, key in enumerate(keys)}
    else:
        numbers = {name: index for index, name in enumerate(names)}
    unnamed = names == [str(index) for index in range(len(names))]  # numbers from 0, which no name goes with
    order = None if order is None else _one_name_each(order, names)
    if order is not None and names != order and not unnamed:
        if sorted(order) != sorted(names):
            raise ConfigError(
                f"The model's classes are {', '.join(order[:20])}, the data's {', '.join(names[:20])}. Fine-tune it "
                "(finetune_epochs), or give data with the model's classes."
            )
        names, numbers = order, {name: index for index, name in enumerate(order)}
    return splits.each(lambda part: _encoded(part, column, names, numbers)), list(names)


def _encoded(part: Any, column: str, names: list[str], numbers: dict[Hashable, int]) -> Any:
    """A split with the column "labels"."""
    if "labels" in part.column_names and column != "labels":
        part = part.remove_columns("labels")
    own, found = _names_of(part, column), {}
    for value in _values(part, column):
        index = _number(value, own, names, numbers)
        if index is None:
            raise ConfigError(f"The label {value!r} is not among those of the training split: {', '.join(names[:20])}.")
        found[value] = index
    if all(isinstance(value, int) and value == index for value, index in found.items()):
        return part if column == "labels" else part.rename_column(column, "labels")  # nothing is written anew
    encoded = part.map(
        lambda labels: {"labels_": [found[label] for label in labels]}, batched=True, input_columns=[column]
    )
    return encoded.remove_columns(column).rename_column("labels_", "labels")


def _one_name_each(order: Sequence[str], names: Sequence[str]) -> list[str]:
    """A model's names of its classes. Where several have one name ("crane", a bird and a machine, in ImageNet) the
    first keeps it, and the others are told apart as the data tells them apart at the same places ("crane2"), or else by
    their numbers.
    """
    found = list(order)
    for index, name in enumerate(order):
        if name in order[:index]:
            there = names[index] if index < len(names) else ""
            found[index] = there if there.startswith(name) and there != name else f"{name} ({index})"
    return found


def _number(value: Any, own: list[str] | None, names: list[str], numbers: dict[Hashable, int]) -> int | None:
    """The number of a label; None if the training split has no such label."""
    is_number = isinstance(value, int)
    if own is not None and is_number and 0 <= value < len(own) and own[value] in numbers:
        return numbers[own[value]]  # a folder of images numbers the classes that it has, and may lack one
    if value in numbers:
        return numbers[value]
    unnamed = own is None and all(isinstance(key, str) for key in numbers)
    return value if unnamed and is_number and 0 <= value < len(names) else None


def _names_of(part: Any, column: str) -> list[str] | None:
    return getattr(part.features[column], "names", None)


def _values(part: Any, column: str) -> list[Any]:
    """The different values of a column, in order."""
    values = part.select_columns([column]).unique(column)  # of this column alone: unique() copies what it is given
    if any(value is None for value in values):
        raise ConfigError(f"A row has no label in the column {column!r}. Leave such rows out.")
    return sorted(values)


def classes_of(config: Any) -> list[str] | None:
    """Names of a fine-tuned model's classes by number; None where nobody named them."""
    labels = getattr(config, "id2label", None) or {}
    names = [str(labels[index]) for index in sorted(labels)]
    return None if not names or all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def label_settings(names: Sequence[str]) -> dict[str, Any]:
    """The settings of a model's config that say which classes there are."""
    numbers = {name: index for index, name in enumerate(names)}
    return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}
