"""Tables, intervals, timings, strips, heatmaps and report files."""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import pytest
from PIL import Image

from deeparc_hf.core.environment import hardware
from deeparc_hf.core.statistics import wilson_interval
from deeparc_hf.errors import ConfigError, MissingDependencyError
from deeparc_hf.pruning.config import MPruneConfig
from deeparc_hf.pruning.heatmap import save_heatmap
from deeparc_hf.pruning.plan import ComparedStack, PruningPlan, make_plan
from deeparc_hf.reports.plan_report import Measurement, blocks_strip, iteration_table, timed_evaluation, write_report

Z95 = 1.959963984540054


def compared(steps: list[float], pinned: dict[int, str] | None = None) -> ComparedStack:
    """A stack in which the similarity of two blocks falls with the distance between them; steps[i] lies between i and
    i+1.
    """
    place = np.concatenate([[0.0], np.cumsum(steps)])
    matrix = np.exp(-np.abs(place[:, None] - place[None, :]))
    return ComparedStack(tuple(map(tuple, matrix.tolist())), pinned or {}, (10,) * len(place))


def plan_of(steps: list[float], pinned: dict[int, str] | None = None, **settings) -> PruningPlan:
    return make_plan({"encoder.layer": compared(steps, pinned)}, MPruneConfig(**settings), 512)


@pytest.fixture
def plan() -> PruningPlan:
    # blocks 1 and 2 are near block 0; block 5 is near block 4
    return plan_of([0.001, 0.001, 1.0, 1.0, 0.001], threshold=0.9)


@pytest.mark.parametrize(("correct", "n"), [(1, 10), (8, 10), (912, 1000), (50, 100), (1999, 2000)])
def test_wilson_bounds_solve_the_score_equation(correct, n):
    for bound in wilson_interval(correct, n):
        deviation = abs(correct / n - bound) / math.sqrt(bound * (1 - bound) / n)
        assert deviation == pytest.approx(Z95, rel=1e-9)


def test_wilson_at_the_ends():
    low, high = wilson_interval(0, 20)
    assert low == 0
    assert high == pytest.approx(Z95**2 / (20 + Z95**2))
    assert wilson_interval(20, 20) == (pytest.approx(1 - high), 1.0)


def test_wilson_narrows_with_n():
    def width(*args):
        low, high = wilson_interval(*args)
        return high - low

    assert width(80, 100) > width(800, 1000)


@pytest.mark.parametrize("arguments", [(1, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_share(arguments):
    with pytest.raises(ConfigError):
        wilson_interval(*arguments)


def test_measurement_survives_json():
    row = Measurement("pruned", 8, 81_135_366, 0.915, 2000, 0.31, 12.5, 601.0, 5, 0.98, 1)
    assert Measurement.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    assert row.to_dict()["interval"] == list(wilson_interval(1830, 2000))


def test_measurement_from_a_newer_file_is_read():
    assert Measurement.from_dict({"label": "pruned", "energy": 3}) == Measurement("pruned")


def test_accuracy_in_percent_is_refused_with_a_hint():
    with pytest.raises(ConfigError, match=r"Did you mean 0\.915"):
        Measurement("pruned", accuracy=91.5)


def test_table_shows_measured_values_and_a_dash_for_the_others():
    header, rule, full, bare = iteration_table(
        [
            Measurement("full", 12, 109_486_854, 0.921, 2000, 0.3112, 14.2, 601.256, 0, 0.98, 1),
            Measurement("a|b"),
        ]
    ).splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert len(columns) == rule.count("---") == 11
    cells = dict(zip(columns, [cell.strip() for cell in full.strip("|").split("|")], strict=True))
    low, high = wilson_interval(1842, 2000)
    assert cells["accuracy (95 % interval)"] == f"92.10 % ({100 * low:.2f} to {100 * high:.2f})"
    assert cells["parameters"] == "109,486,854"
    assert cells["training time (s)"] == "601.26"
    assert cells["freeze"] == "0"
    assert cells["threshold"] == "0.98"
    assert bare == "| a\\|b " + "| - " * 10 + "|"


def test_accuracy_without_a_number_of_samples_has_no_interval():
    row = Measurement("pruned", accuracy=0.5)
    assert row.interval is None
    assert "| 50.00 % | - |" in iteration_table([row])


def test_timing_is_warm_and_complete():
    calls = []

    def evaluate() -> int:
        calls.append(None)
        time.sleep(0.3 if len(calls) == 1 else 0.002 * len(calls))
        return len(calls)

    timing = timed_evaluation(evaluate, repeats=3, warmup=1)
    assert timing.result == len(calls) == 4
    assert len(timing.times) == 3
    assert timing.seconds == sorted(timing.times)[1]
    assert 0.004 <= timing.times[0] < 0.3


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"warmup": -1}])
def test_timing_refuses_senseless_counts(settings):
    with pytest.raises(ConfigError):
        timed_evaluation(int, **settings)


def test_strip_marks_every_kind_of_block():
    plan = plan_of(
        [0.001, 0.001, 1, 1, 1, 1, 1, 1, 1, 1], {0: "first block", 10: "last block"}, threshold=0.9, freeze="partial"
    )
    line, legend = blocks_strip(plan).splitlines()
    assert line == "encoder.layer  p..#****** P  9 of 11 stay"
    assert all(word in legend for word in ("kept", "removed", "frozen", "pinned"))


def test_strip_explains_only_what_occurs():
    assert blocks_strip(plan_of([1.0], threshold=0.9)).splitlines() == ["encoder.layer  ##  2 of 2 stay", "# kept"]


def test_strip_marks_protected_blocks():
    assert "#.p" in blocks_strip(plan_of([0.001, 0.001], threshold=0.9, protect="encoder.layer.2"))


def red_pixels(path) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - (0xC1, 0x27, 0x2D)).sum(axis=2) < 30).sum())


def test_heatmap_marks_removed_blocks_in_red(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its global state must not be needed
    save_heatmap(plan, tmp_path / "pruned.png")
    save_heatmap(plan.replan(threshold=1.0), tmp_path / "whole.png")
    assert red_pixels(tmp_path / "pruned.png") > 100
    assert red_pixels(tmp_path / "whole.png") == 0


@pytest.mark.parametrize(("stacks", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 4, 1), (5, 4, 2)])
def test_heatmap_has_up_to_four_stacks_a_row(tmp_path, stacks, columns, rows):
    plan = make_plan(
        {f"stage{i}": compared([0.1] * (2 + 15 * i)) for i in range(stacks)}, MPruneConfig(threshold=0.9), 0
    )
    save_heatmap(plan, tmp_path / "map.png")
    width, height = Image.open(tmp_path / "map.png").size
    assert 0.75 * columns < width / height * rows < 1.1 * columns


def test_heatmap_without_matplotlib_says_what_to_install(plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "deeparc_hf\[plots\]"'):
        save_heatmap(plan, tmp_path / "map.png")
    assert not (tmp_path / "map.png").exists()


def test_report_holds_plan_rows_versions_and_hardware(plan, tmp_path):
    rows = [Measurement("original", 6, 60, 0.9, 100), Measurement("pruned", 3, 30)]
    write_report(tmp_path / "new", plan, rows, {"model": "tiny"}, device="cpu")
    data = json.loads((tmp_path / "new" / "report.json").read_text("utf-8"))
    assert PruningPlan.from_dict(data["plan"]) == plan
    assert [Measurement.from_dict(row) for row in data["measurements"]] == rows
    assert {"python", "torch", "transformers"} <= data["versions"].keys()
    assert data["hardware"] == hardware("cpu")
    assert data["extra"] == {"model": "tiny"}


def test_report_says_what_was_measured_and_what_was_not(plan, tmp_path):
    write_report(tmp_path, plan, [Measurement("pruned", 3, 30, 0.9, 100)], device="cpu")
    text = (tmp_path / "report.md").read_text("utf-8")
    assert blocks_strip(plan) in text
    assert "3 of 6 blocks removed" in text
    assert "512 calibration samples" in text
    assert "Wilson" in text
    missing = next(line for line in text.splitlines() if "Not measured" in line)
    assert "evaluation time (s)" in missing
    assert "warm" not in missing
    assert "accuracy" not in missing.partition("Not measured")[2]


def test_report_without_measurements_has_no_table(plan, tmp_path):
    write_report(tmp_path, plan.replan(threshold=1.0))
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "No block was removed." in text
    assert "## Measurements" not in text


def test_hardware_counts_what_can_be_used():
    found = hardware("cpu")
    assert found["device"] == "cpu"
    assert found["cpu_count"] >= 1
    assert found["torch_threads"] >= 1


def test_heatmap_of_blocks_that_are_all_but_the_same_shows_how_they_differ():
    """The distances from 1 decide what goes: where they differ by powers of ten, their logarithm is shown."""
    from deeparc_hf.pruning.heatmap import Scale

    near = [1 - 10.0**-power for power in range(1, 7)]
    scale = Scale.over(near)
    shades = [float(scale.norm()(scale.place(value))) for value in near]
    assert scale.logarithmic and np.allclose(np.diff(shades), np.diff(shades)[0]) and abs(np.diff(shades)[0]) > 0.15
    plain_ = Scale.over([0.1, 0.5, 0.9])
    assert not plain_.logarithmic and [float(plain_.norm()(value)) for value in (0.1, 0.5, 0.9)] == pytest.approx(
        [0.0, 0.5, 1.0]
    )
    assert not Scale.over([0.9, 0.9]).logarithmic and not Scale.over([]).logarithmic


def test_heatmap_has_the_numbers_that_it_is_given(plan, tmp_path):
    (name,) = plan.stacks
    save_heatmap(plan, tmp_path / "places.png")
    save_heatmap(plan, tmp_path / "numbers.png", {name: range(20, 20 + len(plan.stacks[name]))})
    assert (tmp_path / "places.png").read_bytes() != (tmp_path / "numbers.png").read_bytes()
