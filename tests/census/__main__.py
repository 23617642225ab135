"""`python -m tests.census [TYPE ...]`: try the types (default: all) and keep the result; two processes at a time."""

from __future__ import annotations

import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any

from . import table, tiny
from .trial import Loaders, try_type

_loaders: list[Loaders] = []  # of this worker


def _start() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    _loaders.append(Loaders.started())


def _row(kind: str) -> tuple[str, dict[str, Any], str]:
    row = try_type(kind, _loaders[0])
    return kind, table.row_of(row), row.verdict


def main() -> None:
    asked = sys.argv[1:]
    rows = dict(table.read()["types"]) if asked else {}
    kinds = asked or tiny.types()
    with ProcessPoolExecutor(2, get_context("spawn"), _start, max_tasks_per_child=200) as pool:
        for number, done in enumerate(as_completed([pool.submit(_row, kind) for kind in kinds]), 1):
            kind, rows[kind], verdict = done.result()
            print(f"{number}/{len(kinds)} {kind}: {verdict}", flush=True)
    table.write(rows)
    print(dict(table.counts(rows.values())))


if __name__ == "__main__":
    main()
