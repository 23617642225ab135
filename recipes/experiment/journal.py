"""What of an experiment is done, on disk, so that one that was killed goes on where it stood: the rows of its table,
and within a training the newest whole checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from deeparc_hf.core.checks import Entry, MalformedError, read_json
from deeparc_hf.core.files import finite, write_whole
from deeparc_hf.errors import ConfigError

from .results import Row, Speed

__all__ = ["JOURNAL", "Clock", "Journal", "folder_of", "newest_checkpoint"]

JOURNAL, CLOCK = "experiment.json", "clock.json"


@dataclass
class Journal:
    """What is done, and why rows are missing. The first process writes it; all read it when they begin.

    Attributes:
        folder: output folder of the experiment.
        asked: what the figures depend on; an experiment goes on only where it is the same.
        writes: whether this process writes.
        rows, speeds, ends: by name of the row.
        revision: commit of the model on the Hub.
        complete: whether all of it is done.
    """

    folder: Path
    asked: Mapping[str, Any]
    writes: bool
    rows: dict[str, Row] = field(default_factory=dict)
    speeds: dict[str, Speed] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    complete: bool = False

    def read(self) -> bool:
        """Take over what is noted; whether there was a journal. It is begun with the experiment, before any training.

        Raises:
            ConfigError: if it is of other settings, or cannot be read.
        """
        path = self.folder / JOURNAL
        if not path.exists():
            return False
        try:
            data = Entry(read_json(path)).mapping()
            then = {part: Entry(settings).mapping() for part, settings in Entry(data["asked"]).mapping().items()}
            rows = {entry["name"]: Row.from_dict(entry) for entry in data["rows"]}
            speeds = {name: Speed(**entry) for name, entry in data["speeds"].items()}
            ends, revision, complete = (data[key] for key in ("ends", "revision", "complete"))
        except (MalformedError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({error}). Give another output_dir, or delete that one."
            ) from error
        now = json.loads(json.dumps(finite(self.asked)))
        changed = [
            f"{part}.{name}"
            for part in now
            for name in sorted({*now[part], *then.get(part, {})})
            if now[part].get(name) != then.get(part, {}).get(name)
        ]
        if changed:
            raise ConfigError(
                f"{self.folder} holds an experiment with other settings ({', '.join(changed[:5])}). Give the same ones "
                "to go on with it, or another output_dir."
            )
        self.rows, self.speeds, self.ends, self.revision, self.complete = rows, speeds, dict(ends), revision, complete
        return True

    def write(self) -> None:
        """Note what is done so far."""
        if not self.writes:
            return
        data = {
            "asked": self.asked,
            "rows": [row.to_dict() for row in self.rows.values()],
            "speeds": {name: vars(speed) for name, speed in self.speeds.items()},
            "ends": self.ends,
            "revision": self.revision,
            "complete": self.complete,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / JOURNAL, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")

    def row(self, name: str, work: Callable[[], Row | None]) -> Row | None:
        """The row of that name: as noted, or made by the work and noted. None where there is none, which is noted as
        an end by the work.
        """
        if name in self.rows or name in self.ends:
            return self.rows.get(name)
        row = work()
        if row is not None:
            self.rows[name] = row
        self.write()
        if self.writes:
            for path in (self.folder / folder_of(name)).glob("checkpoint-*"):  # of a training whose end is noted
                shutil.rmtree(path, ignore_errors=True)
        return row


def folder_of(name: str) -> str:
    """The folder of a row, within that of the experiment."""
    return name.replace(" ", "-").replace(",", "").replace("%", "percent").replace(":", "-")


class Clock(TrainerCallback):
    """The time of the training steps, and the main metric of each evaluation: on the validation data, and by `test` on
    the test data. Each checkpoint holds them, for a training that goes on from it.

    Args:
        metrics: names of the main metric, of which the first that there is counts.
    """

    def __init__(self, metrics: list[str]) -> None:
        self.seconds = 0.0
        self.values: list[float] = []
        self.tested: list[float] = []
        self.test: Callable[[], Mapping[str, float]] | None = None
        self._metrics = metrics
        self._began = 0.0

    def on_step_begin(self, *event: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *event: Any, **more: Any) -> None:
        self.seconds += time.perf_counter() - self._began

    def on_evaluate(self, *event: Any, metrics: Mapping[str, float] | None = None, **more: Any) -> None:
        self.values += self._main(metrics or {})
        if self.test is not None and self._main(metrics or {}):
            self.tested += self._main(self.test())

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            known = {"seconds": self.seconds, "values": self.values, "tested": self.tested}
            write_whole(folder / CLOCK, json.dumps(known) + "\n")

    def resume(self, checkpoint: Path) -> None:
        """Go on from what a checkpoint holds."""
        known = json.loads((checkpoint / CLOCK).read_text("utf-8"))
        self.seconds, self.values, self.tested = known["seconds"], known["values"], known["tested"]

    def _main(self, metrics: Mapping[str, float]) -> list[float]:
        return [float(metrics[name]) for name in self._metrics if name in metrics][:1]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in the folder of a training that is whole; None if there is none. The clock's file is
    written last.
    """
    found = [path for path in folder.glob("checkpoint-*") if (path / CLOCK).is_file() and path.name[11:].isdigit()]
    return max(found, key=lambda path: int(path.name[11:]), default=None)
