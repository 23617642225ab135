"""`python -m tests.census [TYPE ...]`: try the types (default: all) and keep the result; two processes at a time."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from . import table, tiny, worker


def main() -> None:
    asked = sys.argv[1:]
    rows = dict(table.read()["types"]) if asked else {}
    kinds = asked or tiny.types()
    with ProcessPoolExecutor(2, get_context("spawn"), worker.begin) as pool:
        for number, done in enumerate(as_completed([pool.submit(worker.row, kind) for kind in kinds]), 1):
            kind, rows[kind], verdict = done.result()
            print(f"{number}/{len(kinds)} {kind}: {verdict}", flush=True)
    table.write(rows)
    print(dict(table.counts(rows.values())))


if __name__ == "__main__":
    main()
