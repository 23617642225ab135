"""Questions and the passages that answer them, as pairs for the recipe of sentence embeddings: train.jsonl,
validation.jsonl and test.jsonl (anchor, positive), no passage in two of them.

    python model_cards/make_pairs.py --train squad_qg/train.jsonl --test squad_qg/validation.jsonl --output pairs

The files hold a context and a question a line, as SQuAD's do. A tenth of the training passages is for validation.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path


def pairs_in(path: Path) -> list[tuple[str, str]]:
    """Questions with their passages, each pair once, in the file's order."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return list(dict.fromkeys((row["question"].strip(), row["context"].strip()) for row in rows))


def split(train: list[tuple[str, str]], test: list[tuple[str, str]], seed: int) -> dict[str, list[tuple[str, str]]]:
    """The pairs by use: by passages, so that none is in two of them; a question of the test data is in no other."""
    passages, questions = {passage for _, passage in test}, {question for question, _ in test}
    train = [pair for pair in train if pair[1] not in passages and pair[0] not in questions]
    known = list(dict.fromkeys(passage for _, passage in train))
    held = set(random.Random(seed).sample(known, len(known) // 10))
    validation = [pair for pair in train if pair[1] in held]
    asked = {question for question, _ in validation}
    rest = [pair for pair in train if pair[1] not in held and pair[0] not in asked]
    return {"train": rest, "validation": validation, "test": test}


def main(argv: list[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "test", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    for use, pairs in split(pairs_in(args.train), pairs_in(args.test), args.seed).items():
        lines = [json.dumps({"anchor": anchor, "positive": positive}, ensure_ascii=False) for anchor, positive in pairs]
        (args.output / f"{use}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        passages = len({passage for _, passage in pairs})
        sys.stdout.write(f"{use}: {len(pairs):,} questions, {passages:,} passages\n")


if __name__ == "__main__":
    main()
