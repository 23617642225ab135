"""The links of a chain of trainings, as files: what one is told when it is launched, and what it tells when it is done.

A chain is one training with prunings in it that is cut wherever the model's structure changes: each link is a launch of
the same script, in a structure that stays, so that its parameters may be sharded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from ..core.checks import MalformedError, read_json
from ..core.files import finite, write_whole
from ..errors import RecordError
from .machine import Saved

__all__ = ["LINK_VARIABLE", "WHOLE", "Kind", "Link", "Standing", "Told", "Wish"]

LINK_VARIABLE = "DEEPARC_HF_LINK"  # of the environment: the file that tells a script which link it is
WHOLE = "deeparc_whole"  # in a checkpoint that every process has written its part of


class Kind(StrEnum):
    """What a link is for."""

    TRAIN = "train"
    HEAL = "heal"  # fit the repairs of a pruning that follows one that was taken back; trains nothing
    END = "end"  # what the script does after its training, with the model that the chain has come to


class Wish(StrEnum):
    """What is to come after a link."""

    PRUNE = "prune"
    HEAL = "heal"
    TRAIN = "train"  # the model as it is, to the end
    END = "end"


@dataclass
class Standing(Saved):
    """Where a chain stands between two links; JSON types, but for the settings that its first link found.

    Attributes:
        accepted: folder of the last accepted model.
        progress: of the one training that the chain is cut from (`machine.Progress`); None before its first link.
        settings: of the callback when the chain began.
        epochs: of the whole training; evaluates_on_start: whether its first link evaluates before any step.
        steps_done, epochs_done: of the links so far.
        comparison: the plan that the blocks of the last accepted model gave; plan: of the last accepted pruning.
        data: what the evaluations were of, by use; validation: what tells the data set that was evaluated on.
        mark, model_class: of the last accepted model: the mark of its weights, the name of its class.
        base_model, base_revision: the Hub's name and commit of the model that the chain began with.
    """

    FORMAT_VERSION = 1
    TELLS = "where the chain stood"

    accepted: str
    progress: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    epochs: float | None = None
    evaluates_on_start: bool = False
    steps_done: int = 0
    epochs_done: float = 0.0
    comparison: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    validation: list[str] = field(default_factory=list)
    mark: str | None = None
    model_class: str | None = None
    base_model: str | None = None
    base_revision: str | None = None


@dataclass(frozen=True)
class Link:
    """What a link is told.

    Attributes:
        model: the model that the script has to load: a folder, of the first link whatever the user named.
        output: the folder that the script has to give its Trainer.
        folder: where the link puts what it tells (`Told`), and the model.
        pruned: folder with the plan and the repairs that the model has just been through; None where it has not.
        after: the plan that is to be healed for (`Kind.HEAL`).
        max_shard_size: of the files of the model that it saves.
    """

    kind: Kind
    model: str
    output: Path
    folder: Path
    standing: Standing
    pruned: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    max_shard_size: int | str | None = None

    @classmethod
    def of_environment(cls) -> Link | None:
        """The link that this process was launched for; None if it is none of a chain.

        Raises:
            RecordError: if its file cannot be read.
        """
        file = os.environ.get(LINK_VARIABLE)
        return None if file is None else cls.read(Path(file))

    def write(self, file: Path) -> None:
        _write(
            file,
            {
                "kind": self.kind.value,
                "model": self.model,
                "output": str(self.output),
                "folder": str(self.folder),
                "standing": self.standing.to_dict(),
                "pruned": self.pruned,
                "after": self.after,
                "max_shard_size": self.max_shard_size,
            },
        )

    @classmethod
    def read(cls, file: Path) -> Self:
        data = _read(file)
        try:
            places = {name: Path(data[name]) for name in ("output", "folder")}
            standing = Standing.from_dict(data["standing"])
            rest = {name: data[name] for name in ("model", "pruned", "after", "max_shard_size")}
            return cls(kind=Kind(data["kind"]), standing=standing, **places, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(file) from error

    @property
    def told(self) -> Path:
        """The file in which it tells what it has come to."""
        return self.folder / "told.json"

    @property
    def saved(self) -> Path:
        """The folder of the model as the link leaves it."""
        return self.folder / "model"

    @property
    def repairs(self) -> Path:
        """The folder of the repairs that it has fitted."""
        return self.folder / "repairs"


@dataclass(frozen=True)
class Told:
    """What a link tells.

    Attributes:
        wish: what is to come.
        standing: where the chain stands.
        model: the folder of the model that it is to come for.
        plan: to prune by, or to heal for.
        repairs: folder of the repairs that go with the plan.
        stages: what was measured before the pruning.
        record: the model's pruning record, where the chain has come to its end.
    """

    wish: Wish
    standing: Standing
    model: str
    plan: dict[str, Any] | None = None
    repairs: str | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] | None = None

    def write(self, file: Path) -> None:
        _write(file, {**vars(self), "wish": self.wish.value, "standing": self.standing.to_dict()})

    @classmethod
    def read(cls, file: Path) -> Self:
        data = _read(file)
        try:
            known = {**data, "wish": Wish(data["wish"]), "standing": Standing.from_dict(data["standing"])}
            return cls(**known)
        except (KeyError, TypeError, ValueError) as error:
            raise _foreign(file) from error


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(finite(data), indent=1, allow_nan=False) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(read_json(file))
    except (OSError, MalformedError, TypeError, ValueError) as error:
        raise RecordError(f"{file} cannot be read: {error}. {_ADVICE}") from error


def _foreign(file: Path) -> RecordError:
    return RecordError(f"{file} was not written by this version of deeparc_hf. {_ADVICE}")


_ADVICE = "Start the chain with `deeparc run`, which launches the script; to begin it anew, delete its output folder."
