"""The file of a sweep: a recipe, its config, a grid of settings, and the figures of earlier experiments to compare
with.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from deeparc_hf.errors import ConfigError

from .arguments import DataArguments, PruningArguments, read_config

__all__ = ["Cell", "SeedRow", "SweepFile", "recipe_types"]

ORIGINAL = "original"
# set for each cell by the sweep, or of no use where all cells share one original (held-out data follow the seed)
_OWN = {"model", "finetune_epochs", "iterations", "output_dir", "sparsity_original", "repo_id", "seed"}


@dataclass(frozen=True)
class Cell:
    """One run of the recipe: its name, and the settings in which it differs from the others."""

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class SeedRow:
    """A model of the earlier experiments, with the figures as they were printed.

    Attributes:
        blocks: of all stacks, or a list with those of each.
        parameters: number of parameters.
        metrics: by name.
        seconds: evaluation time.
        training_seconds: training time.
        freeze: number of frozen blocks.
        epochs: the main metric after each epoch, None where it was not printed.
        slip: which of these figures is known to be wrong, and why.
        note: anything else.
    """

    blocks: int | list[int] | None = None
    parameters: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float | None = None
    training_seconds: float | None = None
    freeze: int | None = None
    epochs: list[float | None] = dataclasses.field(default_factory=list)
    slip: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class SweepFile:
    """A sweep.

    Attributes:
        path: of the file.
        recipe, config_path: of the recipe and its config file; in the file, relative to it.
        config: what that file holds.
        cells: the original first, then the cells of the grid.
        metrics: names of the metrics to compare; the first is the main one.
        scale: by metric, what to multiply our figures by to have them as the earlier experiments printed them (100:
            percent).
        seed: rows of the earlier experiments, by cell and by row of its table.
        title: of the table.
    """

    path: Path
    recipe: Path
    config_path: Path
    config: Mapping[str, Any]
    cells: tuple[Cell, ...]
    metrics: tuple[str, ...]
    scale: Mapping[str, float]
    seed: Mapping[str, Mapping[str, SeedRow]]
    title: str

    @classmethod
    def read(cls, path: Path) -> SweepFile:
        """Read a file.

        Raises:
            ConfigError: if it names something that there is not, or what it asks for makes no sense.
        """
        data = dict(read_config(path, "the sweep file"))
        _check_keys(data, _KEYS, str(path))
        for key in ("recipe", "config", "grid"):
            if key not in data:
                raise ConfigError(f"{path}: {key} is missing.")
        recipe, config_path = ((path.parent / str(data[key])).resolve() for key in ("recipe", "config"))
        if not recipe.is_file():
            raise ConfigError(f"{path}: there is no recipe {recipe}.")
        settings = {spec.name for each in recipe_types(recipe) for spec in dataclasses.fields(each) if spec.init}
        cells = (Cell(ORIGINAL, {}), *_cells(data["grid"], settings, path))
        return cls(
            path,
            recipe,
            config_path,
            dict(read_config(config_path)),
            cells,
            tuple(_list(data.get("metrics", ["accuracy"]))),
            _mapping(data.get("scale", {}), f"{path}: scale"),
            _seed(data.get("seed", {}), [cell.name for cell in cells], path),
            str(data.get("title", path.stem)),
        )

    def setting(self, name: str, extra: Sequence[str] = ()) -> Any:
        """What a setting is for all cells: from the arguments, or the config file, or the default."""
        found: Any = None
        for word, following in itertools.zip_longest(extra, extra[1:]):
            if word == f"--{name}":
                found = following
            elif word.startswith(f"--{name}="):
                found = word.partition("=")[2]
        if found is None:
            defaults = {spec.name: spec.default for spec in dataclasses.fields(PruningArguments)}
            return self.config.get(name, defaults.get(name))
        try:
            return float(found)
        except ValueError:
            return found

    def check(self, extra: Sequence[str], refused: Iterable[str] = ()) -> None:
        """Say what makes no sense before any work is done.

        Raises:
            ConfigError: if an argument is the sweep's own business, or the settings of a cell make no sense.
        """
        for word in extra:
            if word.partition("=")[0] in refused:
                raise ConfigError(f"{word.partition('=')[0]} is not for all cells of a sweep. Leave it out.")
        if self.config.get("repo_id"):
            raise ConfigError(f"{self.config_path}: repo_id would publish every cell in one place. Leave it out.")
        known = {spec.name for spec in dataclasses.fields(PruningArguments)}
        for cell in self.cells:
            given = {**self.config, **cell.settings, **({"iterations": 0} if cell.name == ORIGINAL else {})}
            values = {name: value for name, value in given.items() if name in known and value is not None}
            if "num_blocks" in values:
                values["num_blocks"] = [str(value) for value in _list(values["num_blocks"])]
            try:
                PruningArguments(**values)
            except ConfigError as error:
                raise ConfigError(f"{self.path}, {cell.name}: {error}") from None


def recipe_types(path: Path) -> list[type]:
    """The dataclasses of a recipe's arguments: its own, and those that all recipes share."""
    name = f"_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    own = [
        each
        for each in vars(module).values()
        if isinstance(each, type) and dataclasses.is_dataclass(each) and each.__module__ == name
    ]
    return [DataArguments, *own, PruningArguments, Seq2SeqTrainingArguments]


def _cells(grid: Any, settings: set[str], path: Path) -> list[Cell]:
    grid = _mapping(grid, f"{path}: grid")
    _check_keys(grid, settings, f"{path}: grid")
    named = {}
    for setting, values in grid.items():
        if setting in _OWN:
            raise ConfigError(
                f"{path}: grid: {setting} is set by the sweep itself, or must be the same in all cells. Leave it out."
            )
        entries = (
            values if isinstance(values, Mapping) else {f"{setting}={_plain(value)}": value for value in _list(values)}
        )
        if not entries:
            raise ConfigError(f"{path}: grid: {setting} has no values.")
        named[setting] = list(entries.items())
    if not named:
        raise ConfigError(f"{path}: grid is empty. Give settings, each with the values to try.")
    cells = []
    for combination in itertools.product(*named.values()):
        name = " ".join(str(label) for label, _ in combination if str(label))
        cells.append(Cell(name, {setting: value for setting, (_, value) in zip(named, combination, strict=True)}))
    names = [cell.name for cell in cells]
    if len({*names, ORIGINAL}) != len(names) + 1:
        raise ConfigError(
            f"{path}: two cells of the grid have the same name: {', '.join(names)}. Name the values differently."
        )
    return cells


def _seed(data: Any, names: list[str], path: Path) -> dict[str, dict[str, SeedRow]]:
    data = _mapping(data, f"{path}: seed")
    _check_keys(data, names, f"{path}: seed")
    fields = {spec.name for spec in dataclasses.fields(SeedRow)}
    rows: dict[str, dict[str, SeedRow]] = {}
    for cell, entries in data.items():
        rows[cell] = {}
        for name, row in _mapping(entries, f"{path}: seed: {cell}").items():
            where = f"{path}: seed: {cell}: {name}"
            if not (name == ORIGINAL or str(name).startswith(("iteration ", "original, "))):
                raise ConfigError(
                    f"{where}: rows are named as in results.md: original, iteration 1, or iteration 1, 30 % zeros."
                )
            _check_keys(_mapping(row, where), fields, where)
            rows[cell][name] = SeedRow(**row)
    return rows


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must hold names and values, found {value!r}.")
    return value


def _check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(sorted(known)[:20])}."
            raise ConfigError(f"{where}: there is no {str(key)!r}. {hint}")


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


_KEYS = {"recipe", "config", "grid", "metrics", "scale", "seed", "title"}
