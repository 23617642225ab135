"""Figures of an experiment: what an evaluation gives, the table, and the files."""

from __future__ import annotations

import json
import math

import pytest

from deeparc_hf.core.statistics import wilson_interval
from experiment.results import (
    Measured,
    Row,
    Speed,
    against_original,
    read_rows,
    results_table,
    whereabouts,
    write_results,
)

SHOWN = ["evaluation time (s)", "training time (s)", "freeze", "threshold", "K", "zeros (%)"]


def measured(**metrics):
    return Measured(metrics, 50, {}, 1.5)


ORIGINAL = Row(
    "original", {"encoder": 6, "decoder": 4}, 1_234_567, measured(accuracy=0.9, loss=0.25), validation=(0.5, 0.8)
)
SMALLER = Row(
    "iteration 1",
    {"encoder": 4, "decoder": 3},
    1_000_000,
    Measured({"accuracy": 0.88}, 50, {"accuracy": (0.76, 0.94)}, 1.0),
    frozen=3,
    threshold=0.98,
    k=2,
    training_seconds=1234.5,
    validation=(0.7,),
    folder="iteration-1",
    verdict="accepted",
)
SPARSE = Row(
    "iteration 1, 30 % zeros", {"encoder": 4, "decoder": 3}, 1_000_000, measured(accuracy=math.nan), sparsity=0.2999
)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_metrics_of_an_evaluation():
    found = {
        "test_loss": 0.5,
        "test_accuracy": 0.75,
        "test_runtime": 2.0,
        "test_samples_per_second": 9.0,
        "test_steps_per_second": 1.0,
        "test_model_preparation_time": 0.1,
        "test_jit_compilation_time": 0.1,
        "epoch": 3.0,
        "eval_loss": 1.0,
        "test_note": "text",
    }
    got = Measured.of_metrics(found, 20)
    assert got.metrics == {"loss": 0.5, "accuracy": 0.75} and got.samples == 20 and got.seconds is None
    assert got.intervals == {"accuracy": wilson_interval(15, 20)}
    assert Measured.of_metrics({"test_accuracy": 75.0}, 20).intervals == {}


def test_where_the_results_lie(tmp_path):
    place = tmp_path / "a run"
    (place / "iteration-1").mkdir(parents=True)
    for file in ("results.md", "scores.md", "iteration-1/README.md"):
        (place / file).touch()
    said = whereabouts(place, [ORIGINAL, SMALLER, SPARSE]).splitlines()
    assert said == [
        f"Results: {place}/results.md, the same in results.json, and scores.md",
        f"Models: {place}/iteration-1",
        f"Card: {place}/iteration-1/README.md",
        f"To publish it: deeparc push '{place}/iteration-1' ORG/NAME",
    ]
    assert whereabouts(place, [SMALLER], "me/small").splitlines()[-1] == "Published: me/small"
    assert whereabouts(place, [ORIGINAL]).count("\n") == 0


def test_the_table_has_the_columns_of_the_first_experiments():
    header, dashes, *lines = map(cells, results_table([ORIGINAL, SMALLER, SPARSE]).splitlines())
    assert header == ["model", "epoch 1", "epoch 2", "accuracy", "loss", "blocks", "parameters", *SHOWN]
    assert len({len(line) for line in (header, dashes, *lines)}) == 1
    assert lines[0] == [
        "original",
        "0.5000",
        "0.8000",
        "0.9000",
        "0.2500",
        "6 + 4",
        "1,234,567",
        "1.50",
        "-",
        "0",
        "-",
        "-",
        "-",
    ]
    first = ["iteration 1 (accepted)", "0.7000", "-", "0.8800 (0.7600 .. 0.9400)", "-", "4 + 3", "1,000,000"]
    assert lines[1] == [*first, "1.00", "1,234.50", "3", "0.9800", "2", "-"]
    assert lines[2][0] == SPARSE.name and lines[2][-1] == "30.0"


def test_rows_come_back_from_the_disk_as_they_were(tmp_path):
    speed = Speed(0.75, 0.7, 0.8, 0.7, 5)
    write_results(
        tmp_path / "new",
        [ORIGINAL, SMALLER],
        {"iteration 1": speed},
        {"model": "bert", "nothing": math.inf},
        ["A note."],
    )
    assert read_rows(tmp_path / "new") == [ORIGINAL, SMALLER]
    data = json.loads((tmp_path / "new" / "results.json").read_text("utf-8"))
    assert data["model"] == "bert" and data["nothing"] is None and data["notes"] == ["A note."]
    assert data["speeds"]["iteration 1"]["ratio"] == 0.75 and data["hardware"]["device"] and data["versions"]["torch"]
    text = (tmp_path / "new" / "results.md").read_text("utf-8")
    assert (
        results_table([ORIGINAL, SMALLER]) in text
        and f"iteration 1: {speed}" in text
        and "A note." in text
        and "on 50 test samples" in text
    )
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["results.json", "results.md"]


def test_each_pruned_model_is_held_against_the_interval_of_the_original(tmp_path):
    def row(name, value, **more):
        return Row(
            name,
            {"layers": 4},
            100,
            Measured({"loss": 1.0, "accuracy": value}, 50, {"accuracy": (value - 0.05, value + 0.05)}),
            **more,
        )

    rows = [row("original", 0.8), row("a", 0.76), row("b", 0.7), row("c", 0.9), row("d", 0.1, sparsity=0.5)]
    assert against_original(rows) == [
        "a: accuracy 0.7600 lies within the original's 95 % interval (0.7500 .. 0.8500).",
        "b: accuracy 0.7000 lies 0.0500 below the original's 95 % interval (0.7500 .. 0.8500).",
        "c: accuracy 0.9000 lies 0.0500 above the original's 95 % interval (0.7500 .. 0.8500).",
    ]
    assert against_original([ORIGINAL, SMALLER]) == []  # nothing is known of the original's interval
    write_results(tmp_path, rows, {}, {})
    assert "warm, the median of several" in (tmp_path / "results.md").read_text("utf-8")
    write_results(tmp_path, rows, {}, {"pruning": {"repeats": 1}})
    assert "warm, one evaluation" in (tmp_path / "results.md").read_text("utf-8")
    write_results(tmp_path, rows, {}, {"pruning": {"repeats": 3}})
    assert "warm, the median of 3" in (tmp_path / "results.md").read_text("utf-8")
    assert "b: accuracy 0.7000 lies 0.0500 below" in (tmp_path / "results.md").read_text("utf-8")


def test_a_figure_that_is_no_number_is_null_on_the_disk(tmp_path):
    write_results(tmp_path, [SPARSE], {}, {})
    (row,) = read_rows(tmp_path)
    assert row.measured.metrics == {"accuracy": None} and "| - |" in results_table([row])


def test_a_speed_tells_how_near_the_ideal_it_is():
    speed = Speed(ratio=0.8, low=0.75, high=0.9, blocks=0.72, turns=5)
    assert speed.of_ideal == pytest.approx(0.9)
    assert str(speed).startswith(
        "Evaluation time: 0.800 of the original's (0.750 .. 0.900, 5 turns)"
    ) and "0.90 of the ideal" in str(speed)


def test_long_trainings_show_their_first_epochs_and_the_last():
    def row(*values):
        return Row("original", {"layers": 4}, 100, Measured({"accuracy": 0.5}, 10), validation=values)

    header, _, long, short = results_table([row(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), row(0.8)]).splitlines()
    assert header.startswith("| model | epoch 1 | epoch 2 | epoch 3 | last epoch | accuracy |")
    assert long.startswith("| original | 0.1000 | 0.2000 | 0.3000 | 0.7000 | 0.5000 |")
    assert short.startswith("| original | 0.8000 | - | - | 0.8000 | 0.5000 |")
