"""A sweep: the cells of a grid, each a recipe in a process of its own, and a table beside earlier experiments."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from deeparc_hf.core.checks import Entry, MalformedError, read_json
from deeparc_hf.core.files import alone, write_whole
from deeparc_hf.core.markdown import table
from deeparc_hf.core.plain_text import did_you_mean
from deeparc_hf.errors import ConfigError
from deeparc_hf.trainer.gate import larger_is_better

from .arguments import DataArguments, PruningArguments, parse_settings, read_config
from .results import RESULTS, Row, read_ends, read_rows, shown

__all__ = ["Cell", "Figures", "Sweep", "SweepFile", "recipe_types", "slug"]

SWEEP, CELL, ORIGINAL = "sweep.md", "cell.json", "original"
PATIENCE = 20.0  # seconds that a stopped recipe gets to end by itself
_COLUMNS = 3  # metrics that are columns; more are lines of a table of their own
_WAITS = (
    "Another sweep, or a recipe that one started before it was killed, is at work in this folder: waiting for its end."
)
TAIL = 12  # lines of a failed recipe's log that are shown
_KEYS = {"recipe", "config", "grid", "metrics", "scale", "seed", "title"}
# set for each cell by the sweep, or of no use where all cells share one original (held-out data follow the seed)
_NOT_IN_A_GRID = {"model", "finetune_epochs", "iterations", "output_dir", "sparsity_original", "repo_id", "seed"}
_NOT_FOR_ALL_CELLS = ("--config", "--output_dir", "--repo_id")


# ---- the file ----


@dataclass(frozen=True)
class Cell:
    """One run of the recipe: its name, and the settings in which it differs from the others."""

    name: str
    settings: Mapping[str, Any]

    @property
    def words(self) -> list[str]:
        """The settings on a command line; null leaves one out, as in a config file."""
        given = {name: value for name, value in self.settings.items() if value is not None}
        return [word for name, value in given.items() for word in (f"--{name}", *map(str, _list(value)))]


@dataclass(frozen=True)
class Figures:
    """What a row of the table tells of a model: one of ours, or one of the earlier experiments as it was printed.

    Attributes:
        blocks: of all stacks, or a list with those of each.
        parameters: number of parameters.
        metrics: by name.
        seconds: evaluation time.
        training_seconds: training time.
        freeze: number of frozen blocks.
        epochs: the main metric on held-out data after each epoch.
        tested: the same on the data that the other metrics are of; None where it was not printed.
        slip: which of these figures is known to be wrong, and why.
        note: anything else.
    """

    blocks: int | list[int] | None = None
    parameters: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    training_seconds: float | None = None
    freeze: int | None = None
    epochs: list[float] = field(default_factory=list)
    tested: list[float | None] = field(default_factory=list)
    slip: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class SweepFile:
    """A recipe, its config, a grid of settings, and the figures of earlier experiments to compare with.

    Attributes:
        path: of the file.
        recipe, config_path: of the recipe and its config file; in the file, relative to it.
        config: what that file holds.
        cells: the original first, then the cells of the grid.
        metrics: names of the metrics to compare; the first is the main one.
        scale: by metric, what to multiply our figures by, to print them as the earlier experiments (100: percent).
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
    seed: Mapping[str, Mapping[str, Figures]]
    title: str

    @classmethod
    def read(cls, path: Path, config: Path | None = None) -> SweepFile:
        """Read a file.

        Args:
            path: of the file.
            config: the recipe's config, instead of the one that the file names.

        Raises:
            ConfigError: if it names something that there is not, or what it asks for makes no sense.
        """
        data = _named(read_config(path, "the sweep file"), str(path), _KEYS)
        for key in ("recipe", "config", "grid"):
            if key not in data:
                raise ConfigError(f"{path}: {key} is missing.")
        recipe, config_path = ((path.parent / str(data[key])).resolve() for key in ("recipe", "config"))
        if not recipe.is_file():
            raise ConfigError(f"{path}: there is no recipe {recipe}.")
        config_path = config_path if config is None else config.resolve()
        settings = {spec.name for each in recipe_types(recipe) for spec in dataclasses.fields(each) if spec.init}
        cells = (Cell(ORIGINAL, {}), *_cells(_named(data["grid"], f"{path}: grid", settings), path))
        return cls(
            path,
            recipe,
            config_path,
            dict(read_config(config_path)),
            cells,
            tuple(_list(data.get("metrics", ["accuracy"]))),
            _named(data.get("scale", {}), f"{path}: scale"),
            _seed(data.get("seed", {}), [cell.name for cell in cells], path),
            str(data.get("title", path.stem)),
        )


def recipe_types(path: Path) -> list[type]:
    """The dataclasses of a recipe's arguments: its own, and those that all recipes share; the last is the Trainer's,
    which a recipe names by a function `training_type` where it is of another library.
    """
    name = f"_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    own = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == name]
    training = getattr(module, "training_type", lambda: Seq2SeqTrainingArguments)()
    return [DataArguments, *filter(dataclasses.is_dataclass, own), PruningArguments, training]


def _cells(grid: Mapping[str, Any], path: Path) -> list[Cell]:
    """A cell for each combination of the values, in their order."""
    choices = []
    for setting, values in grid.items():
        if setting in _NOT_IN_A_GRID:
            raise ConfigError(
                f"{path}: grid: {setting} is set by the sweep itself, or must be the same in all cells. Leave it out."
            )
        if not isinstance(values, Mapping):
            values = {f"{setting}={','.join(map(str, _list(value)))}": value for value in _list(values)}
        if not values:
            raise ConfigError(f"{path}: grid: {setting} has no values.")
        choices.append([(str(label), setting, value) for label, value in values.items()])
    if not choices:
        raise ConfigError(f"{path}: grid is empty. Give settings, each with the values to try.")
    cells = [
        Cell(" ".join(label for label, *_ in chosen if label), {setting: value for _, setting, value in chosen})
        for chosen in itertools.product(*choices)
    ]
    names = [cell.name for cell in cells]
    if len({*names, ORIGINAL}) != len(names) + 1:
        raise ConfigError(
            f"{path}: two cells of the grid have the same name: {', '.join(names)}. Name the values differently."
        )
    return cells


def _seed(data: Any, cells: list[str], path: Path) -> dict[str, dict[str, Figures]]:
    known = {spec.name for spec in dataclasses.fields(Figures)}
    rows: dict[str, dict[str, Figures]] = {}
    for cell, entries in _named(data, f"{path}: seed", cells).items():
        for name, row in _named(entries, f"{path}: seed: {cell}").items():
            where = f"{path}: seed: {cell}: {name}"
            if not (name == ORIGINAL or str(name).startswith(("iteration ", "original, "))):
                raise ConfigError(
                    f"{where}: rows are named as in results.md: original, iteration 1, or iteration 1, 30 % zeros."
                )
            rows.setdefault(cell, {})[name] = Figures(**_named(row, where, known))
    return rows


def _named(value: Any, where: str, known: Iterable[str] | None = None) -> Mapping[str, Any]:
    """What must be names and values, with no other names than those that are known."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must hold names and values, found {value!r}.")
    for key in value if known is not None else ():
        if key not in known:
            hint = did_you_mean(str(key), known) or f" There are {', '.join(sorted(known)[:20])}."
            raise ConfigError(f"{where}: there is no {str(key)!r}.{hint}")
    return value


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---- the run ----


@dataclass
class Sweep:
    """The run of a sweep file.

    Attributes:
        file: the sweep.
        output: folder of the cells, their logs, and the table.
        extra: arguments for every cell; the grid's values win over them.
        say: takes what the user should read.
        failed: names of the cells that failed.

    Raises:
        ConfigError: if an argument is the sweep's own business, or the settings of a cell make no sense.
    """

    file: SweepFile
    output: Path
    extra: Sequence[str] = ()
    say: Callable[[str], None] = print
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in (word.partition("=")[0] for word in self.extra):
            if name in _NOT_FOR_ALL_CELLS:
                raise ConfigError(f"{name} is not for all cells of a sweep. Leave it out.")
        if self.file.config.get("repo_id"):
            raise ConfigError(f"{self.file.config_path}: repo_id would publish every cell in one place. Leave it out.")
        self._folders: dict[str, str] = {}
        for cell in self.file.cells:  # different names may read the same as names of folders
            name, number = slug(cell.name), 2
            while name in self._folders.values():
                name, number = f"{slug(cell.name)}.{number}", number + 1
            self._folders[cell.name] = name
        types = recipe_types(self.file.recipe)
        original, *_ = [self._settings(cell, types) for cell in self.file.cells]  # all are checked
        self._fine_tunes = original.finetune_epochs != 0

    @property
    def table(self) -> Path:
        """File of the table."""
        return self.output / SWEEP

    def commands(self) -> list[tuple[str, list[str]]]:
        """The name and the command of each cell; the original comes first."""
        shared = self._place(ORIGINAL) / ORIGINAL if self._fine_tunes else None
        return [(cell.name, self._command(cell, shared)) for cell in self.file.cells]

    def run(self) -> int:
        """Run what is not done yet; 0, or 1 if a cell failed. The table is written after each cell."""
        self.output.mkdir(parents=True, exist_ok=True)
        with alone(self.output / "sweep.lock", partial(self.say, _WAITS)) as lock:
            original, *others = self.file.cells
            run = self._do(original, None, None, lock)
            if run is None:
                self.say("The original could not be made, so no cell could be run.")
                self.failed += [cell.name for cell in others]
            else:
                folder = read_rows(self._place(ORIGINAL))[0].folder
                self.write()
                for cell in others:
                    self._do(cell, None if folder is None else self._place(ORIGINAL) / folder, run, lock)
                    self.write()
            self.write()
        if self.failed:
            self.say(
                f"Failed: {', '.join(self.failed)}. Start the sweep again to try these once more; what is done is not "
                "done again."
            )
        return 1 if self.failed else 0

    def write(self) -> str:
        """Write the table of what is done, and return it."""
        done = {cell.name: self._place(cell.name) for cell in self.file.cells if self._finished(cell.name)}
        rows = {name: read_rows(folder) for name, folder in done.items()}
        ends = {name: read_ends(folder) for name, folder in done.items()}
        text = sweep_report(self.file, rows, self.failed, ends)
        write_whole(self.table, text)
        return text

    def _do(self, cell: Cell, model: Path | None, original: str | None, lock: Any) -> str | None:
        """Run one cell if it is not done. Returns what tells this run of it from others; None if it failed."""
        place = self._place(cell.name)
        wanted = {"recipe": self.file.recipe.name, "config": self.file.config, "cell": cell.settings}
        wanted = json.loads(json.dumps({**wanted, "extra": list(self.extra), "original": original}))
        known = _json(place / CELL)
        changed = _difference(known, wanted) if known is not None and "run" in known else "what was asked for"
        goes_on = place.exists() and not changed
        run = str(known["run"] if goes_on and known is not None else time.time_ns())
        if goes_on and self._finished(cell.name):
            self.say(f"{cell.name}: done before")
            return run
        if goes_on:
            self.say(f"{cell.name}: was not finished, so it goes on where it stood")
        else:
            if place.exists():
                self._put_away(place, f"{cell.name}: {changed} changed, so it is run again")
            place.mkdir(parents=True)
            write_whole(place / CELL, json.dumps({**wanted, "run": run}, indent=1) + "\n")
        log = self.output / "logs" / f"{place.name}.log"
        log.parent.mkdir(exist_ok=True)
        self.say(f"{cell.name}: runs; what it prints goes to {log}")
        began = time.monotonic()
        code = _call([*self._command(cell, model), "--resume_from_checkpoint", "true"], log, lock)
        if code == 0 and self._finished(cell.name):
            self.say(f"{cell.name}: done in {time.monotonic() - began:,.0f} s")
            return run
        tail = "\n".join(f"    {line}" for line in log.read_text("utf-8", errors="replace").splitlines()[-TAIL:])
        self.say(f"{cell.name}: failed with exit code {code}. The end of {log}:\n{tail}")
        self.failed.append(cell.name)
        return None

    def _words(self, cell: Cell) -> list[str]:
        """The arguments of a cell that do not depend on what was done before."""
        more = ["--iterations", "0"] if cell.name == ORIGINAL else ["--sparsity_original", "false"]
        return ["--config", str(self.file.config_path), *self.extra, *cell.words, *more]

    def _command(self, cell: Cell, model: Path | None) -> list[str]:
        words = self._words(cell)
        if cell.name != ORIGINAL and model is not None:
            words += ["--model", str(model), "--finetune_epochs", "0"]
        return [sys.executable, str(self.file.recipe), *words, "--output_dir", str(self._place(cell.name))]

    def _settings(self, cell: Cell, types: Sequence[type]) -> PruningArguments:
        """The settings of a cell, checked before any work is done."""
        try:
            found = parse_settings(types, self._words(cell))
            return PruningArguments(**{spec.name: found[spec.name] for spec in dataclasses.fields(PruningArguments)})
        except ConfigError as error:
            raise ConfigError(f"{self.file.path}, {cell.name}: {error}") from None

    def _place(self, name: str) -> Path:
        return self.output / "cells" / self._folders[name]

    def _finished(self, name: str) -> bool:
        results = _json(self._place(name) / f"{RESULTS}.json")
        return results is not None and bool(results.get("complete", True)) and (self._place(name) / CELL).is_file()

    def _put_away(self, place: Path, why: str) -> None:
        aside = self.output / "set_aside"
        aside.mkdir(exist_ok=True)
        numbered = (aside / f"{place.name}.{number}" for number in itertools.count(1))
        target = next(path for path in numbered if not path.exists())
        place.rename(target)
        self.say(f"{why}; what was there is now in {target}")


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-.") or "cell"


def _json(path: Path) -> dict[str, Any] | None:
    """What a file of JSON holds by name; None where there is none, or not a whole one."""
    try:
        return dict(Entry(read_json(path)).mapping())
    except (OSError, MalformedError):
        return None


def _difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What differs between the arguments of then and of now, in words; empty if nothing does."""
    names = {"config": "config file", "cell": "grid", "extra": "arguments"}
    parts = []
    for key, now in wanted.items():
        then = known.get(key)
        both = isinstance(then, Mapping) and isinstance(now, Mapping)
        changed = sorted(each for each in {*then, *now} if then.get(each) != now.get(each)) if both else []
        if then != now:
            parts.append(f"the {names.get(key, key)}" + (f" ({', '.join(changed)})" if changed else ""))
    return " and ".join(parts)


def _call(command: Sequence[str], log: Path, lock: Any) -> int:
    """Run a command. It stops with this process; if that is killed, it holds the lock as long as it lives."""
    held = {} if lock is None else {"pass_fds": (lock.fileno(),)}
    with log.open("w", encoding="utf-8") as out:
        out.write(shlex.join(command) + "\n")
        out.flush()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **held)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
            process.wait()
            raise


# ---- the table ----


@dataclass(frozen=True)
class _Line:
    """A model of the table: our figures and the seed's, each with those of its original."""

    cell: str
    name: str
    ours: Figures
    our_original: Figures
    seed: Figures
    seed_original: Figures
    missing: str | None  # why there is no such model of ours

    @property
    def sides(self) -> tuple[tuple[Figures, Figures], tuple[Figures, Figures]]:
        return (self.ours, self.our_original), (self.seed, self.seed_original)


def sweep_report(
    file: SweepFile,
    done: Mapping[str, Sequence[Row]],
    failed: Sequence[str] = (),
    ends: Mapping[str, Mapping[str, str]] | None = None,
) -> str:
    """Markdown: a line for each cell and iteration, in a table of models, one of epochs and one of times.

    Args:
        file: the sweep.
        done: the rows of the cells that are done.
        failed: names of the cells that failed.
        ends: by cell and name of a row that there is not, why there is none.
    """
    lines = list(_lines(file, done, ends or {}))
    few = file.metrics[:_COLUMNS]
    about = "Metrics are of one run on the test samples; each cell's results.md has intervals."
    if file.seed:
        about += " * marks rows of the seed's with a known slip, which is explained below."
    parts = [f"# {file.title}", _both(file, lines, ["blocks", "parameters", *few, "change", "freeze"], _model), about]
    if any(line.ours.epochs or line.ours.tested or line.seed.tested for line in lines):
        about = _ABOUT_EPOCHS + (" The seed counts it so." if file.seed else "")
        parts += ["## After each epoch", _epochs(file, lines), about]
    titles = ["evaluation time (s)", "time / original", "training time (s)"]
    about = _ABOUT_TIMES + (" The seed's are from other hardware, so only ratios can be compared." if file.seed else "")
    parts += ["## Times", _both(file, lines, titles, _times), about]
    more = [
        [line.cell, line.name, metric, *(_number(figures.metrics.get(metric)) for figures in (line.ours, line.seed))]
        for line in lines
        for metric in file.metrics[_COLUMNS:]
    ]
    more = [entry for entry in more if entry[3:] != ["-", "-"]]
    if more:
        parts += ["## Other figures", _table(["cell", "model", "figure", "here", "seed"], more, 3)]
    remarks = []
    for line in lines:
        remarks += [f"- {line.cell}, {line.name}: \\* known slip: {line.seed.slip}"] * bool(line.seed.slip)
        remarks += [f"- {line.cell}, {line.name}: {line.seed.note}"] * bool(line.seed.note)
    if remarks:
        parts += ["## About the seed's figures", "\n".join(remarks)]
    missing = [cell.name for cell in file.cells if cell.name not in done and cell.name not in failed]
    parts += [f"Failed: {', '.join(failed)}."] * bool(failed) + [f"Not run yet: {', '.join(missing)}."] * bool(missing)
    return "\n\n".join(parts) + "\n"


_ABOUT_EPOCHS = (
    "The main metric after each epoch of the training that led to the model, on the test data (where test_each_epoch "
    "asks for it) and on the data held out. Change: of the best epoch on the test data, against the original after its "
    "last one. It flatters, for the epoch is chosen on what it is measured on; the change in the first table is of the "
    "last epoch."
)
_ABOUT_TIMES = (
    "Evaluation: warm. time / original: over that of the original, which each cell measures in its own process. "
    "Training: of the training steps alone."
)


def _lines(
    file: SweepFile, done: Mapping[str, Sequence[Row]], ends: Mapping[str, Mapping[str, str]]
) -> Iterator[_Line]:
    seed_original = file.seed.get(ORIGINAL, {}).get(ORIGINAL, Figures())
    for cell in file.cells:
        rows = {row.name: _printed(row, file) for row in done.get(cell.name, ())}
        seeds, missing = file.seed.get(cell.name, {}), ends.get(cell.name, {})
        # the original, and what was zeroed of it, stand in the table once
        names = [
            name for name in {**rows, **missing, **seeds} if cell.name == ORIGINAL or not name.startswith(ORIGINAL)
        ]
        original = rows.get(ORIGINAL, Figures())
        for name in sorted(names, key=lambda name: "zeros" in name) or ["-"]:
            ours, seed = rows.get(name, Figures()), seeds.get(name, Figures())
            yield _Line(cell.name, name, ours, original, seed, seed_original, missing.get(name))


def _printed(row: Row, file: SweepFile) -> Figures:
    """One of our models, with its metrics as the earlier experiments printed them."""
    scale, main = file.scale, file.metrics[0]
    metrics = {name: scale.get(name, 1) * value for name, value in row.measured.metrics.items() if value is not None}
    held, tested = ([scale.get(main, 1) * value for value in values] for values in (row.validation, row.tested))
    blocks, seconds = list(row.blocks.values()), row.measured.seconds
    return Figures(blocks, row.parameters, metrics, seconds, row.training_seconds, row.frozen, held, tested)


def _both(
    file: SweepFile,
    lines: Sequence[_Line],
    titles: Sequence[str],
    cells: Callable[[SweepFile, Figures, Figures], list[str]],
) -> str:
    """A table with a column of ours for each title, and beside it the seed's, where there are earlier figures."""
    header = [name for title in titles for name in ((title, f"seed: {title}") if file.seed else (title,))]
    found = []
    for line in lines:
        sides = [cells(file, *side) for side in line.sides]
        if line.missing is not None:
            sides[0][0] = f"none: {line.missing}"
        if line.seed.slip:
            sides[1][0] += " *"
        pairs = zip(*sides, strict=True) if file.seed else ((cell,) for cell in sides[0])
        found.append([line.cell, line.name, *(text for pair in pairs for text in pair)])
    return _table(["cell", "model", *header], found, 2)


def _model(file: SweepFile, figures: Figures, original: Figures) -> list[str]:
    blocks = [] if figures.blocks is None else _list(figures.blocks)
    parts = " + ".join(map(str, blocks)) or "-"
    return [
        f"{sum(blocks)} ({parts})" if len(blocks) > 2 else parts,  # of the many stages of a CNN their sum comes first
        shown(figures.parameters, ","),
        *(_number(figures.metrics.get(metric)) for metric in file.metrics[:_COLUMNS]),
        _change(file.metrics[0], figures, original),
        shown(figures.freeze),
    ]


def _times(file: SweepFile, figures: Figures, original: Figures) -> list[str]:
    other = figures is not original
    ratio = figures.seconds / original.seconds if other and figures.seconds and original.seconds else None
    return [shown(figures.seconds, ",.2f"), shown(ratio, ".3f"), shown(figures.training_seconds, ",.2f")]


def _epochs(file: SweepFile, lines: Sequence[_Line]) -> str:
    """Of each model the main metric after each epoch, on the test data and as held out, and the change of the best."""
    main, kinds = (
        file.metrics[0],
        [name for name in ("tested", "epochs") if any(getattr(line.ours, name) for line in lines)],
    )
    count = max(len(values) for line in lines for values in (line.ours.tested, line.ours.epochs, line.seed.tested))
    header, found = [], [[line.cell, line.name] for line in lines]
    columns = [("ours", kind, "" if kind == "tested" else " (held out)") for kind in kinds]
    columns += [("seed", "tested", "")] if file.seed else []
    for epoch in range(count):
        for side, kind, told in columns:
            header.append(f"{'seed: ' if side == 'seed' else ''}epoch {epoch + 1}{told}")
            for line, cells in zip(lines, found, strict=True):
                value = getattr(getattr(line, side), kind)[epoch : epoch + 1]
                cells.append(_number(value[0] if value else None))
    header += ["change (best epoch)", *(["seed: change (best epoch)"] if file.seed else [])]
    for line, cells in zip(lines, found, strict=True):
        cells += [_change(main, *side, best=True) for side in line.sides[: 2 if file.seed else 1]]
    return _table(["cell", "model", *header], found, 2)


def _change(main: str, figures: Figures, original: Figures, *, best: bool = False) -> str:
    """Change of the main metric against the original, of the last epoch or of the best one on the test data."""
    value, before = figures.metrics.get(main), original.metrics.get(main)
    if best:
        values = [each for each in figures.tested if each is not None]
        value = (min if larger_is_better(main) is False else max)(values) if values else None
    if value is None or before is None or figures is original:
        return "-"
    return f"{value - before:+.3f}" if abs(before) >= 10 else f"{value - before:+.4f}"


def _number(value: float | None) -> str:
    return shown(value, ".4f" if value is None or abs(value) < 10 else ".3f")


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    cells = [[cell.replace("|", "/") for cell in line] for line in (header, *lines)]
    return table(cells[0], cells[1:], range(left))
