"""One table of what `search_evidence` measured on several models.

    python -m benchmarks.search_summary FOLDER/search_*.json

The files are those that `search_evidence` writes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .search_evidence import BEST, OURS, interval, means


def verdicts(result: Mapping[str, Any], count: int) -> dict[str, tuple[float, str]]:
    """By way: the repaired divergence, and whether it is less ("<"), more (">") or neither beside that of the search
    with repairs, by a 95 % interval of the difference, sample by sample.
    """
    found = {}
    ours = means(result, count, OURS, "repaired")
    assert ours is not None
    for way in dict.fromkeys(row["way"] for row in result["rows"]):
        theirs = means(result, count, way, "repaired")
        if theirs is None:  # this way cannot choose so many
            continue
        _, low, high = interval(theirs[0] - ours[0])
        found[way] = float(theirs[0].mean()), ">" if low > 0 else "<" if high < 0 else ""
    return found


def undone(result: Mapping[str, Any], count: int) -> tuple[float, float]:
    """Of what plain removal by CKA costs, what the search with repairs undoes: in divergence, and in the metric."""
    cka, ours = means(result, count, "CKA", "plain"), means(result, count, OURS, "repaired")
    assert cka is not None and ours is not None
    whole = result["original"][0]
    return float(1 - ours[0].mean() / cka[0].mean()), 1 - (ours[1] - whole) / (cka[1] - whole)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    ways = [way for way in dict.fromkeys(row["way"] for row in results[0]["rows"]) if way not in (OURS, BEST)]
    lines = [
        f"| model | samples | seeds | removed | {' | '.join(ways)} | {OURS} | undone: divergence | metric |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * (len(ways) + 3),
    ]
    rows = worse = best = 0
    for result in results:
        name, facts = result["facts"]["model"], result["facts"]
        for count in sorted({row["count"] for row in result["rows"]}):
            found, shares = verdicts(result, count), undone(result, count)
            others = [found[way] for way in ways if way in found]
            cells = [f"{found[way][0]:.4f} {found[way][1]}".strip() if way in found else "-" for way in ways]
            lines.append(
                f"| {name} | {facts['samples to choose and repair on']} | {len({r['seed'] for r in result['rows']})} | "
                f"{count} of {facts['blocks']} | {' | '.join(cells)} | {found[OURS][0]:.4f} | "
                f"{100 * shares[0]:.0f} % | {100 * shares[1]:.0f} % |"
            )
            rows, name = rows + 1, ""
            worse += any(sign == "<" for _, sign in others)
            best += found[OURS][0] < min(value for value, _ in others)
    told = f"{rows} rows: worse than another way beyond the interval in {worse}, the least of all in {best}."
    return "\n".join(lines) + "\n\n" + told + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    print(table([json.loads(path.read_text()) for path in parser.parse_args().files]))


if __name__ == "__main__":
    main()
