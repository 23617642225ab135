"""A tiny model and data for runs of the recipe of text classification."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import yaml

from tests.publishing import WORDS, tiny_tokenizer
from tests.zoo import VOCAB, ZOO

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"


def make_tiny(folder: Path) -> None:
    """A model with its tokenizer in `model`, and train.csv, validation.csv and test.csv."""
    ZOO["bert"].model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    for name, rows in {"train": 48, "validation": 16, "test": 24}.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(rows):
                words = [f"w{draw.randrange(VOCAB - len(WORDS))}" for _ in range(6)]
                writer.writerow([" ".join(words), int(words[0][1:]) % 2])


def write_task(folder: Path, name: str, rows: list[dict[str, object]], question: str, **more: object) -> dict[str, str]:
    """A local task of lm-evaluation-harness, of rows with "choices" and "answer"; the settings that ask for it."""
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": question,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        **more,
    }
    (folder / "tasks" / "task.yaml").write_text(yaml.safe_dump(settings))
    return {"harness_tasks": name, "harness_folder": str(folder / "tasks")}


def write_sweep(folder: Path, grid: dict[str, object], **more: object) -> Path:
    """A config and a sweep file for it."""
    config = {
        "model": str(folder / "model"),
        **{f"{name}_file": str(folder / f"{name}.csv") for name in ("train", "validation", "test")},
        "retrain_epochs": 1,
        "calibration_samples": 16,
        "repeats": 1,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    data = {"recipe": str(RECIPES / "text_classification.py"), "config": "config.yaml", "grid": grid, **more}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path
