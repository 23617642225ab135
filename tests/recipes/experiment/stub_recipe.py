"""A recipe that trains nothing: the sweep's own behaviour is tested with it. What it does is told by files beside its
config.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class StubArguments:
    """Arguments that only this recipe has."""

    width: int = 1


def row(name: str, blocks: int, width: int) -> dict:
    measured = {
        "metrics": {"accuracy": 0.5 + blocks / 100 + width / 1000},
        "intervals": {},
        "samples": 10,
        "seconds": blocks / 10,
    }
    folder = "original" if name == "original" else "iteration-1"
    return {
        "name": name,
        "blocks": {"layers": blocks},
        "parameters": 1000 * blocks,
        "measured": measured,
        "folder": folder,
        "training_seconds": None if name == "original" else 5.0,
        "validation": [] if name == "original" else [0.61, 0.62],
        "tested": []
        if name == "original"
        else [measured["metrics"]["accuracy"] + 0.002, measured["metrics"]["accuracy"]],
    }


def main(words: list[str]) -> int:
    given = {words[index].removeprefix("--"): words[index + 1] for index in range(0, len(words), 2)}
    place, width = Path(given["output_dir"]), int(given.get("width", 1))
    beside = Path(given["config"]).parent
    with (beside / "calls.jsonl").open("a") as file:
        file.write(json.dumps(given) + "\n")
    (place / "half-done").touch()
    if (beside / f"fail-{place.name}").exists():
        print("this recipe was told to fail")
        return 3
    (beside / "began").write_text(place.name)
    while (beside / f"wait-{place.name}").exists():
        time.sleep(0.02)
    rows, ends = [row("original", 4, 0)], {}
    end = beside / f"ends-{place.name}"
    if end.exists():
        ends["iteration 1"] = end.read_text()
    elif given.get("iterations") != "0":
        rows.append(row("iteration 1", int(given["num_blocks"]), width))
    (place / "results.json").write_text(json.dumps({"rows": rows, "ends": ends}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
