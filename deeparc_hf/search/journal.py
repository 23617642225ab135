"""The journal of a search: scores that are known, so that a search which was killed goes on where it stood.

A file of JSON lines: the first says which search it is of, each other one holds the scores of a step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..architectures import Subject
from ..core.checks import Entry, MalformedError
from ..core.environment import package_versions
from ..core.files import write_whole
from ..core.plain_text import plain
from ..errors import ConfigError
from ..pruning.config import MPruneConfig
from .objectives import ModelObjective, Score, objectives
from .playback import Block

__all__ = ["Journal", "asked_of"]

_SCORES = 4  # counts up where the same search gives other scores than in an earlier version
_MOST_SAMPLES, _MOST_OUTPUTS = 1_000_000, 1_000


class Journal:
    """Scores by what was asked for; in a file, where there is one.

    Args:
        path: of the file; None: nothing is kept.
        asked: what the search depends on, in plain JSON types.

    Raises:
        ConfigError: if the file is that of another search, or none of a search.
    """

    def __init__(self, path: str | Path | None, asked: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._known: dict[str, dict[str, Score]] = {}
        if self._path is None:
            return
        if self._path.is_dir():
            raise ConfigError(f"The journal of a search is a file, and {self._path.name or '.'} is a folder.")
        if self._path.exists() and self._path.stat().st_size:
            self._read(dict(asked))
        else:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._append({"asked": dict(asked)})
            except OSError as error:
                raise ConfigError(
                    f"The journal cannot be written: {plain(error, 200)}. Give a file in a folder that can."
                ) from error

    def get(
        self, what: str, removed: Collection[Block], names: Collection[str], blocks: Iterable[Block] = ()
    ) -> dict[str, Score] | None:
        """The scores of these names that a step gave; None if it has not been made.

        Raises:
            ConfigError: if the file holds scores of others.
        """
        known = self._known.get(_key(what, removed, blocks))
        if known is not None and known.keys() != set(names):
            raise self._no_journal(
                f"it has scores of {', '.join(map(plain, known)) or 'nothing'} where those of {', '.join(names)} belong"
            )
        return known

    def put(
        self, what: str, removed: Collection[Block], scores: Mapping[str, Score], blocks: Iterable[Block] = ()
    ) -> None:
        """Keep what a step gave."""
        key = _key(what, removed, blocks)
        self._known[key] = dict(scores)
        if self._path is not None:
            lists = {name: [score.losses.tolist(), score.weights.tolist()] for name, score in scores.items()}
            self._append({"step": key, "scores": lists})

    def _no_journal(self, why: str) -> ConfigError:
        assert self._path is not None
        return ConfigError(
            f"{self._path.name} is not the journal of a search ({why}). Give another file, or delete it."
        )

    def _append(self, entry: Mapping[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, allow_nan=False) + "\n")

    def _read(self, asked: dict[str, Any]) -> None:
        assert self._path is not None
        try:
            whole, ended, cut_off = self._path.read_text("utf-8").rpartition("\n")
            if not ended and cut_off.startswith('{"asked"'):  # killed while it wrote its first line
                write_whole(self._path, json.dumps({"asked": asked}, allow_nan=False) + "\n")
                return
            first, *steps = [Entry(json.loads(line)) for line in whole.split("\n")]
            found = first["asked"].mapping()
            if found != json.loads(json.dumps(asked)):
                odd = sorted(name for name in {*found, *asked} if found.get(name) != asked.get(name))
                raise ConfigError(
                    f"The journal {self._path.name} is of another search: {', '.join(map(plain, odd))} differ. Give "
                    "another file, or delete it."
                )
            for entry in steps:
                self._known[entry["step"].text(limit=100_000)] = {
                    name: _score_in(score) for name, score in entry["scores"].entries().items()
                }
        except ConfigError:
            raise
        except (MalformedError, RecursionError, ValueError) as error:
            raise self._no_journal(plain(error, 200)) from error
        if cut_off:  # the process was killed while it wrote
            write_whole(self._path, f"{whole}\n")


def asked_of(
    subject: Subject,
    batches: Sequence[Mapping[str, Any]],
    config: MPruneConfig,
    evaluation: str | None,
    greater_is_better: bool,
) -> dict[str, Any]:
    """What the scores of a search depend on, for its journal.

    Args:
        evaluation: what tells the function that the user measures models by from others.
    """
    judged = config.objective
    if issubclass(objectives.get(judged), ModelObjective):
        judged += f", {evaluation}, {greater_is_better}"
    state = {name: value for name, value in subject.root.state_dict().items() if isinstance(value, torch.Tensor)}
    return {
        "model": [subject.name, subject.lengths],
        "weights": _digest([state]),
        "config": hashlib.sha256(json.dumps(subject.host.settings(), sort_keys=True, default=str).encode()).hexdigest(),
        "data": _digest(batches),
        "settings": {name: getattr(config, name) for name in ("heal", "search", "min_blocks")},
        "objective": judged,
        "protect": list(config.protect),
        "versions": package_versions(),
        "scores": _SCORES,
    }


def _digest(batches: Sequence[Mapping[str, Any]]) -> str:
    """What tells the data of one search from that of another."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(what: str, removed: Collection[Block], blocks: Iterable[Block]) -> str:
    return json.dumps([what, sorted(removed), sorted(blocks)])


def _score_in(entry: Entry) -> Score:
    parts = []
    for part in entry.items(2):
        rows = part.items(_MOST_OUTPUTS)
        part.must_be(bool(rows), "a list for each output")
        width = len(rows[0].items(_MOST_SAMPLES))
        parts.append(torch.tensor([row.numbers(width) for row in rows], dtype=torch.float64))
    entry.must_be(len(parts) == 2 and parts[0].shape == parts[1].shape, "losses and weights")
    return Score(*parts)
