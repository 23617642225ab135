"""`python -m tests.census [TYPE ...]`: try the types (default: all) and keep the result; two processes at a time.

`python -m tests.census --timm [FAMILY ...]`: the same for timm's families.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from . import table, timm_families, timm_table, tiny, worker


def main() -> None:
    if "--timm" in sys.argv:
        try_families([name for name in sys.argv[1:] if name != "--timm"])
        return
    asked = sys.argv[1:]
    rows = dict(table.read()["types"]) if asked else {}
    kinds = asked or tiny.types()
    with ProcessPoolExecutor(2, get_context("spawn"), worker.begin) as pool:
        for number, done in enumerate(as_completed([pool.submit(worker.row, kind) for kind in kinds]), 1):
            kind, rows[kind], verdict = done.result()
            print(f"{number}/{len(kinds)} {kind}: {verdict}", flush=True)
    table.write(rows)
    print(dict(table.counts(rows.values())))


def try_families(asked: list[str]) -> None:
    rows = dict(timm_table.read()["families"]) if asked else {}
    families = asked or timm_families.families()
    with ProcessPoolExecutor(2, get_context("spawn"), worker.begin) as pool:
        for number, done in enumerate(as_completed([pool.submit(worker.family_row, name) for name in families]), 1):
            family, rows[family] = done.result()
            print(
                f"{number}/{len(families)} {family}: {timm_table.verdict_of(rows[family], table.verdict)}", flush=True
            )
    timm_table.write(rows)
    table.PAGE.write_text(table.page(table.read()), "utf-8")
    print(*map(len, timm_table.shares(rows, table.verdict)))


if __name__ == "__main__":
    main()
