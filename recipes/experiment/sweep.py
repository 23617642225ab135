"""A sweep: the cells of a grid, each a recipe in a process of its own. What is done is kept; a sweep that was stopped
goes on.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deeparc_hf.core.files import write_whole

from .results import RESULTS, read_rows
from .sweep_file import Cell, SweepFile
from .sweep_table import sweep_report

__all__ = ["CELL", "SWEEP", "Sweep"]

SWEEP, CELL, ORIGINAL = "sweep.md", "cell.json", "original"
PATIENCE = 20.0  # seconds that a stopped recipe gets to end by itself
TAIL = 12  # lines of a failed recipe's log that are shown
_NO_EXTRA = ("--config", "--output_dir", "--repo_id")


@dataclass
class Sweep:
    """The run of a sweep file.

    Attributes:
        file: the sweep.
        output: folder of the cells, their logs, and the table.
        extra: arguments for every cell; the grid's values win over them.
        say: takes what the user should read.
    """

    file: SweepFile
    output: Path
    extra: Sequence[str] = ()
    say: Callable[[str], None] = print
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file.check(self.extra, refused=_NO_EXTRA)
        self._folders: dict[str, str] = {}
        for cell in self.file.cells:  # different names may read the same as names of folders
            name, number = slug(cell.name), 2
            while name in self._folders.values():
                name, number = f"{slug(cell.name)}.{number}", number + 1
            self._folders[cell.name] = name

    @property
    def table(self) -> Path:
        """File of the table."""
        return self.output / SWEEP

    def commands(self) -> list[tuple[str, list[str]]]:
        """The name and the command of each cell; the original comes first."""
        shared = self._place(ORIGINAL) / ORIGINAL if self.file.setting("finetune_epochs", self.extra) != 0 else None
        return [(cell.name, self._command(cell, shared)) for cell in self.file.cells]

    def run(self) -> int:
        """Run what is not done yet; 0, or 1 if a cell failed. The table is written after each cell."""
        self.output.mkdir(parents=True, exist_ok=True)
        with _alone(self.output / "sweep.lock", self.say) as lock:
            original, *others = self.file.cells
            run = self._do(original, None, None, lock)
            if run is None:
                self.say("The original could not be made, so no cell could be run.")
                self.failed += [cell.name for cell in others]
            else:
                folder = read_rows(self._place(ORIGINAL))[0].folder
                for cell in others:
                    self._do(cell, None if folder is None else self._place(ORIGINAL) / folder, run, lock)
                    self.write()
            self.write()
        if self.failed:
            self.say(
                f"Failed: {', '.join(self.failed)}. Start the sweep again to try these once more; what is done is not "
                f"done again."
            )
        return 1 if self.failed else 0

    def write(self) -> str:
        """Write the table of what is done, and return it."""
        done = {cell.name: self._place(cell.name) for cell in self.file.cells if self._finished(cell.name)}
        text = sweep_report(self.file, {name: read_rows(folder) for name, folder in done.items()}, self.failed)
        write_whole(self.table, text)
        return text

    # ---- one cell ----

    def _do(self, cell: Cell, model: Path | None, original: str | None, lock: Any) -> str | None:
        """Run one cell if it is not done. Returns what tells this run of it from others; None if it failed."""
        place = self._place(cell.name)
        wanted = {
            "recipe": self.file.recipe.name,
            "config": self.file.config,
            "cell": cell.settings,
            "extra": list(self.extra),
        }
        wanted = json.loads(json.dumps({**wanted, "original": original}))
        known = self._known(place)
        if known is not None and self._finished(cell.name):
            reason = _difference({**known, "run": None}, {**wanted, "run": None})
            if reason is None:
                self.say(f"{cell.name}: done before")
                return str(known["run"])
            self._put_away(place, f"{cell.name}: {reason} changed, so it is run again")
        elif place.exists():
            self._put_away(place, f"{cell.name}: was not finished, so it is run again from its beginning")
        place.mkdir(parents=True)
        run = str(time.time_ns())
        write_whole(place / CELL, json.dumps({**wanted, "run": run}, indent=1) + "\n")
        log = self.output / "logs" / f"{place.name}.log"
        log.parent.mkdir(exist_ok=True)
        self.say(f"{cell.name}: runs; what it prints goes to {log}")
        began = time.monotonic()
        code = _call(self._command(cell, model), log, lock)
        if code == 0 and self._finished(cell.name):
            self.say(f"{cell.name}: done in {time.monotonic() - began:,.0f} s")
            return run
        tail = "\n".join(f"    {line}" for line in log.read_text("utf-8", errors="replace").splitlines()[-TAIL:])
        self.say(f"{cell.name}: failed with exit code {code}. The end of {log}:\n{tail}")
        self.failed.append(cell.name)
        return None

    def _command(self, cell: Cell, model: Path | None) -> list[str]:
        words = [
            sys.executable,
            str(self.file.recipe),
            "--config",
            str(self.file.config_path),
            *self.extra,
            *_words(cell.settings),
        ]
        if cell.name == ORIGINAL:
            words += ["--iterations", "0"]
        else:
            words += ["--sparsity_original", "false"]
            if model is not None:
                words += ["--model", str(model), "--finetune_epochs", "0"]
        return [*words, "--output_dir", str(self._place(cell.name))]

    def _place(self, name: str) -> Path:
        return self.output / "cells" / self._folders[name]

    def _finished(self, name: str) -> bool:
        try:
            results = json.loads((self._place(name) / f"{RESULTS}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return bool(results.get("complete", True)) and (self._place(name) / CELL).is_file()

    def _known(self, place: Path) -> dict[str, Any] | None:
        try:
            known = json.loads((place / CELL).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return known if isinstance(known, dict) and "run" in known else None

    def _put_away(self, place: Path, why: str) -> None:
        aside = self.output / "set_aside"
        aside.mkdir(exist_ok=True)
        number = 1
        while (target := aside / f"{place.name}.{number}").exists():
            number += 1
        place.rename(target)
        self.say(f"{why}; what was there is now in {target}")


def slug(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", name).strip("-.") or "cell"


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    return shlex.join(command)


def _words(settings: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in settings.items():
        if value is None:  # left out, as in a config file
            continue
        words.append(f"--{name}")
        words += [str(entry) for entry in value] if isinstance(value, list) else [str(value)]
    return words


def _difference(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What differs between the arguments of then and of now, in words; None if nothing does."""
    names = {
        "recipe": "the recipe",
        "config": "the config file",
        "cell": "the grid",
        "extra": "the arguments",
        "original": "the original",
    }
    parts = []
    for key in wanted:
        then, now = known.get(key), wanted[key]
        if then == now:
            continue
        both = isinstance(then, Mapping) and isinstance(now, Mapping)
        changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name)) if both else []
        parts.append(names.get(key, key) + (f" ({', '.join(changed)})" if changed else ""))
    return " and ".join(parts) or None


def _call(command: Sequence[str], log: Path, lock: Any) -> int:
    """Run a command; stopping this process stops it too. It holds the lock as long as it lives, even if this process is
    killed.
    """
    held = {} if lock is None else {"pass_fds": (lock.fileno(),)}
    with log.open("w", encoding="utf-8") as out:
        out.write(shown(command) + "\n")
        out.flush()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **held)
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


@contextlib.contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[Any]:
    """Hold a lock, which the recipes inherit: waits for another sweep there, and for a recipe that outlived a killed
    one.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield None
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(
                "Another sweep, or a recipe that one started before it was killed, is at work in this folder: waiting "
                "for its end."
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
