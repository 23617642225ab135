"""The journal of a search: scores that are known, so that a search which was killed goes on where it stood.

A file of JSON lines: the first says which search it is of, each other one holds the scores of a step.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..core.checks import Entry, MalformedError
from ..core.files import write_whole
from ..core.plain_text import plain
from ..errors import ConfigError
from .objectives import Score
from .playback import Block

__all__ = ["Journal"]

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
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"asked": dict(asked)})

    def get(self, what: str, removed: Collection[Block], blocks: Iterable[Block] = ()) -> dict[str, Score] | None:
        """The scores that a step gave, by name; None if it has not been made."""
        return self._known.get(_key(what, removed, blocks))

    def put(
        self, what: str, removed: Collection[Block], scores: Mapping[str, Score], blocks: Iterable[Block] = ()
    ) -> None:
        """Keep what a step gave."""
        key = _key(what, removed, blocks)
        self._known[key] = dict(scores)
        if self._path is not None:
            lists = {name: [score.losses.tolist(), score.weights.tolist()] for name, score in scores.items()}
            self._append({"step": key, "scores": lists})

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
            raise ConfigError(
                f"{self._path.name} is not the journal of a search ({plain(error, 200)}). Give another file, or delete "
                "it."
            ) from error
        if cut_off:  # the process was killed while it wrote
            write_whole(self._path, f"{whole}\n")


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
