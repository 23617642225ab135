"""What the tests of the recipes share: a recipe as a module, its command line, and what its models saw."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from experiment.results import Row, read_rows

PUBLISHED = {
    "README.md",
    "card.json",
    "evaluations.json",
    "pruning_report.json",
    "report.json",
    "results.json",
    "results.md",
    "scores.md",
}
RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name: str) -> Any:
    """A recipe as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def words(**settings: Any) -> list[str]:
    """A command line."""
    shared = {
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 16,
        "learning_rate": 2e-3,
        "seed": 3,
        "calibration_samples": 64,
        "sparsity_samples": 16,
        "repeats": 1,
    }
    found = []
    for key, value in {**shared, **settings}.items():
        if value is not None:
            found += [f"--{key}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return found


@dataclass
class Seen:
    """One forward pass of a whole model."""

    training: bool
    labelled: bool
    inputs: torch.Tensor


@contextmanager
def watched(cls: type) -> Iterator[list[Seen]]:
    """Every forward pass of a class of models. Calibration asks for no loss, so it gives no labels."""
    seen: list[Seen] = []
    forward = cls.forward

    @functools.wraps(forward)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = kwargs.get(self.main_input_name, args[0] if args else None)
        seen.append(Seen(self.training, kwargs.get("labels") is not None, inputs.clone()))
        return forward(self, *args, **kwargs)

    cls.forward = noting
    try:
        yield seen
    finally:
        cls.forward = forward


def without_times(rows: list[Row]) -> list[Row]:
    """The rows as far as they are the same in each run."""
    return [replace(row, training_seconds=None, measured=replace(row.measured, seconds=None)) for row in rows]


def figure(value: float) -> str:
    """As a card shows it."""
    return f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.1f}"


def check_files(folder: Path, rows: list[Row], retrained: bool = True) -> None:
    """The files that every experiment leaves: results, models, reports and the card."""
    assert [row.to_dict() for row in read_rows(folder)] == [row.to_dict() for row in rows]
    table = (folder / "results.md").read_text("utf-8")
    assert all(re.search(rf"^\| {re.escape(row.name)}( \(accepted\))? \|", table, re.MULTILINE) for row in rows)
    results = json.loads((folder / "results.json").read_text("utf-8"))
    assert results["versions"]["deeparc_hf"] and results["hardware"]["device"] and results["pruning"]["iterations"] == 2
    assert "epochs" not in results["training"] and results["training"]["seed"] == 3
    assert results["recipe"] in results["command"] and results["settings"]
    written = [path for path in folder.rglob("*") if path.name in PUBLISHED]
    assert len(written) > 4
    for path in written:  # model and data of the tests lie in the same place as the results
        assert str(folder.parent) not in path.read_text("utf-8"), path
    assert {use: facts["rows"] > 0 for use, facts in results["data"].items()} == {
        "train": True,
        "validation": True,
        "test": True,
    }
    assert all(len(facts["sha256"]) == 64 for facts in results["data"].values() if facts["file"] != "a folder")
    last = [row for row in rows if row.name.startswith("iteration") and row.sparsity is None][-1]
    assert set(results["speeds"]) == {last.name} and 0 < results["speeds"][last.name]["blocks"] < 1
    card = (folder / last.folder / "README.md").read_text("utf-8")
    figures = {
        result.metric_name: result.metric_value
        for result in ModelCard(card).data.eval_results
        if result.dataset_split == "test"
    }
    assert {name: figures[name] for name in last.measured.metrics} == pytest.approx(last.measured.metrics)
    shown = card.rpartition("## Evaluation\n")[2].partition("\n## ")[0]
    assert "| metric | original | this model |" in shown and "of the time of the original" in shown
    for name, (low, high) in {**rows[0].measured.intervals, **last.measured.intervals}.items():
        assert f"{figure(low)} .. {figure(high)}" in shown, name
    assert "python recipes/" in card and str(folder) not in card
    for row in rows:
        if row.folder is not None:
            assert (folder / row.folder / "model.safetensors").is_file()
        if row.name.startswith("iteration") and row.sparsity is None:
            assert (folder / row.folder / "pruning_plan.json").is_file()
            assert (folder / row.folder / ("pruning_report.md" if retrained else "report.md")).is_file()
        if row.name.endswith("retrained"):
            assert (folder / row.folder / "sparsity_report.json").is_file()
    assert not (folder / "_scratch").exists()


def zeros(model: Any, stack: str) -> float:
    """Share of zeros in the linear maps of a stack."""
    maps = [module.weight for module in model.get_submodule(stack).modules() if isinstance(module, torch.nn.Linear)]
    return float(sum((weight == 0).sum() for weight in maps) / sum(weight.numel() for weight in maps))


def parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
