"""Frontiers: budgets, JSON in and out, hostile files, tables, pictures and plans."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import numpy as np
import pytest

from deeparc_hf import Frontier, PruningPlan, apply_plan, find_stacks, search_blocks
from deeparc_hf.errors import ConfigError, MissingDependencyError, PlanError
from tests.zoo import ZOO

from .judging import made_up

FRONTIER = made_up()


def chosen(frontier=FRONTIER, **budget) -> int:
    """The blocks that stay by a budget."""
    plan = frontier.choose(**budget)
    return plan.num_kept


# ---- budgets ----


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ({"num_blocks": 6}, 6),
        ({"num_blocks": 2}, 2),
        ({"parameters": 1e9}, 6),
        ({"parameters": 1000}, 6),  # the most that it may have
        ({"parameters": 999}, 5),
        ({"parameters": 600}, 2),
        ({"speedup": 0.5}, 6),
        ({"speedup": 1.0}, 6),
        ({"speedup": 1.1}, 5),  # as measured, 5.5 / 5, not by the blocks, 6 / 5
        ({"speedup": 1.101}, 4),
        ({"speedup": 2.75}, 2),
        ({"max_value": 0.0}, 6),
        ({"max_value": 0.1}, 5),
        ({"max_value": 0.35}, 3),
        ({"max_value": 100}, 2),
        ({"max_drop": 0}, 6),
        ({"max_drop": 0.02}, 5),  # 0.9 - 0.88 is a little more
        ({"max_drop": 0.05}, 4),
        ({"max_drop": 1}, 2),
        ({"max_value": np.float64(0.1)}, 5),
        ({"num_blocks": np.int64(3)}, 3),
    ],
    ids=str,
)
def test_a_budget_chooses(budget, kept):
    assert chosen(**budget) == kept


def test_without_measures_the_times_of_the_blocks_count():
    points = [dataclasses.replace(point, measured=None) for point in FRONTIER.points]
    assert chosen(dataclasses.replace(FRONTIER, points=tuple(points)), speedup=1.2) == 5
    assert chosen(speedup=1.2) == 4


def test_a_metric_that_is_better_when_smaller():
    points = [dataclasses.replace(point, metric=-point.metric) for point in FRONTIER.points]
    assert chosen(dataclasses.replace(FRONTIER, points=tuple(points), greater_is_better=False), max_drop=0.05) == 4


@pytest.mark.parametrize(
    ("frontier", "budget", "error", "message"),
    [
        (FRONTIER, {}, ConfigError, r"Exactly one of num_blocks, parameters, .* found none"),
        (FRONTIER, {"num_blocks": 3, "speedup": 1.5}, ConfigError, "found num_blocks, speedup"),
        (FRONTIER, {"num_blocks": 1}, PlanError, r"No model with 1 blocks was found, only with 6, 5, 4, 3, 2\. Take"),
        (FRONTIER, {"num_blocks": 2.5}, PlanError, "No model with 2.5 blocks"),
        (FRONTIER, {"parameters": 599}, PlanError, r"meets parameters=599: the smallest has 600\. Search further"),
        (FRONTIER, {"speedup": 2.76}, PlanError, r"meets speedup=2\.76: the fastest is 2\.75 times as fast"),
        (FRONTIER, {"max_value": -0.1}, PlanError, r"meets max_value=-0\.1: the least value is 0"),
        (FRONTIER, {"max_drop": -0.1}, PlanError, r"Give 0 or more"),
        (FRONTIER, {"speedup": float("nan")}, ConfigError, "speedup must be a finite number, found nan"),
        (FRONTIER, {"speedup": "1.5"}, ConfigError, "speedup must be a finite number"),
        (made_up(times=False), {"speedup": 1.5}, ConfigError, r"measured none \(measure_times=False\)"),
        (
            made_up(metric=False),
            {"max_drop": 0.1},
            ConfigError,
            r"evaluate=\.\.\., and there is none",
        ),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(frontier, budget, error, message):
    with pytest.raises(error, match=message):
        frontier.choose(**budget)


# ---- plans ----


def test_plans_say_what_goes_and_why():
    frontier = made_up(stacks=("a", "b"))
    plan = frontier.plan_of(frontier.points[2])
    assert plan.removed == {"a": (3, 4)} and plan.stacks["a"].clusters == ((0,), (1,), (2, 3, 4), (5,))
    assert plan.stacks["a"].threshold == pytest.approx(0.88)  # of blocks 2 and 4
    assert plan.config.num_blocks == {"a": 4, "b": 6} and plan.config.heal == "lstsq"
    assert (plan.choice.search, plan.choice.value, plan.choice.measured) == ("greedy", 0.2, 5.5 / 4)
    assert "greedy search: divergence 0.2 (0.18 .. 0.24) on 96 samples, 1.38 times as fast" in str(plan)
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_what_is_frozen_is_asked_for_with_the_budget():
    plan = FRONTIER.choose(num_blocks=5, freeze="partial")
    assert plan.stacks["layers"].frozen == (0, 1, 5) and plan.config.freeze == "partial"
    assert FRONTIER.choose(num_blocks=5, freeze=["layers.0"]).stacks["layers"].frozen == (0,)
    assert FRONTIER.choose(num_blocks=5).num_frozen == 0
    with pytest.raises(PlanError, match="matches no block"):
        FRONTIER.choose(num_blocks=5, freeze=["nothing"])


@pytest.mark.parametrize("kind", ["bert", "t5", "resnet"])
def test_plans_of_real_frontiers_are_carried_out(kind):
    model, batches = ZOO[kind].model(), ZOO[kind].batches()
    frontier = search_blocks(model, batches, measure_times=False, progress=False)
    assert len(frontier.points) > 2
    again = Frontier.from_json(frontier.to_json())
    assert again == frontier and str(again) == str(frontier)
    for point in frontier.points:
        smaller = copy.deepcopy(model)
        plan = PruningPlan.from_json(again.plan_of(point).to_json())
        apply_plan(smaller, plan, example=batches[0])
        assert sum(map(len, find_stacks(smaller).values())) == point.num_blocks
        assert sum(p.numel() for p in smaller.parameters()) == point.parameters


# ---- JSON ----


@pytest.mark.parametrize(
    "frontier",
    [FRONTIER, made_up(False, False), made_up(stacks=("a", "b")), dataclasses.replace(FRONTIER, complete=False)],
)
def test_round_trip_as_text_and_as_file(frontier, tmp_path):
    text = frontier.to_json(tmp_path / "f.json")
    assert Frontier.from_json(text) == Frontier.from_json(tmp_path / "f.json") == frontier
    assert Frontier.from_json(str(tmp_path / "f.json")).to_json() == text == (tmp_path / "f.json").read_text("utf-8")


def test_a_metric_that_is_no_number_is_none_in_the_file():
    points = [dataclasses.replace(point, metric=float("nan")) for point in FRONTIER.points]
    again = Frontier.from_json(dataclasses.replace(FRONTIER, points=tuple(points)).to_json())
    assert [point.metric for point in again.points] == [None] * 5


DATA = FRONTIER.to_dict()
WRONG = {  # of each field what it can never be; a point's are those of the second
    "format_version": [None, 2, "1", True],
    "search": [None, 3, "x\x1b[31m", "x" * 600],
    "objective": [None, [], "\u202e"],
    "samples": [None, -1, 1.5, "96"],
    "passes": [None, "4", float("inf")],
    "work": [3, ["x"], "\x00"],
    "greater_is_better": [None, 1, "yes"],
    "complete": [None, 0, "no"],
    "plan": [None, [], {}, {**DATA["plan"], "samples": "x"}, FRONTIER.choose(num_blocks=3).to_dict()],
    "points": [None, [], {}, DATA["points"][1:], [*DATA["points"], DATA["points"][0]], [DATA["points"][0]] * 5000],
}
WRONG_POINT = {
    "removed": [None, [], {"nothing": [1]}, {"layers": 3}, {"layers": [9]}, {"layers": [3, 3]}],
    "num_blocks": [None, 4, 5.0, "5", -1],
    "parameters": [None, -1, 1e3, "900"],
    "value": [None, "0.1", float("nan"), True],
    "interval": [3, [0.1], [0.1, "x"], [0.2, 0.1], {"low": 0}],
    "metric": ["x", [0.9], float("inf")],
    "speedup": ["x", 0, -1, float("nan")],
    "measured": ["x", 0, -0.5],
    "measured_interval": [1, [1, 2, 3], [2, 1]],
}


def test_every_field_is_broken_in_turn():
    assert WRONG.keys() == DATA.keys() and WRONG_POINT.keys() == DATA["points"][1].keys()


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        *[(None, name, value) for name, values in WRONG.items() for value in values],
        *[(1, name, value) for name, values in WRONG_POINT.items() for value in values],
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_a_hostile_file_is_a_plan_error(place, name, value):
    data = copy.deepcopy(DATA)
    (data if place is None else data["points"][place])[name] = value
    with pytest.raises(PlanError) as caught:
        Frontier.from_json(json.dumps(data))
    message = str(caught.value)
    assert len(message) < 700 and message.isprintable()
    assert name.split("_")[0] in message or "frontier has format" in message or "not a pruning plan" in message


@pytest.mark.parametrize("name", [*WRONG, "points[1]"])
def test_what_is_missing_is_a_plan_error(name):
    data = copy.deepcopy(DATA)
    if name == "points[1]":
        data["points"][1] = None
    else:
        del data[name]
    if name == "work":  # nothing was timed
        assert Frontier.from_dict(data).work is None
        return
    with pytest.raises(PlanError):
        Frontier.from_dict(data)


def test_a_pinned_block_is_not_removed_by_a_file():
    data = copy.deepcopy(DATA)
    data["plan"]["stacks"]["layers"]["pinned"] = {"3": "owns a bias"}
    with pytest.raises(PlanError, match=r"removed\.layers must be blocks that may go"):
        Frontier.from_dict(data)


@pytest.mark.parametrize("text", ["", "words", '{"a": 1', "[" * 10_000, "[]", "null"])
def test_what_is_no_frontier_is_refused(text, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(PlanError, match=r"not the frontier of a search: .* Make one with search_blocks"):
        Frontier.from_json(tmp_path / "f.json")


# ---- as text and as a picture ----


def test_the_table_tells_of_each_model():
    lines = str(FRONTIER).splitlines()
    assert lines[0].split("  ")[0] == "blocks" and "divergence (95 % interval)" in lines[0]
    assert lines[2].split() == ["6", "-", "1,000", "0", "(0", "..", "0)", "0.9000", "1.00", "-"]
    assert lines[5].split()[:3] == ["3", "1,3-4", "700"] and lines[5].endswith("  1.83 (1.67 .. 2.17)")
    assert lines[-1] == (
        "greedy search by divergence, models healed, judged on 96 samples, 4.5 forward passes over the calibration "
        "data. Timed: a forward pass for 32 samples."
    )
    bare = str(dataclasses.replace(made_up(False, False, ("a", "b")), complete=False))
    assert "metric" not in bare and "speed-up" not in bare and "a:1,3-4" in bare and "broken off" in bare


def test_a_notebook_shows_a_table():
    from tests.test_notebook_views import page_of

    page = page_of(FRONTIER)
    assert page.rows[0][0] == "blocks" and [row[0] for row in page.rows[1:]] == ["6", "5", "4", "3", "2"]
    evil = dataclasses.replace(FRONTIER, search="<script>", objective="<b>")
    assert "&lt;script&gt;" in evil._repr_html_() and "<b>" not in evil._repr_html_()


@pytest.mark.parametrize(
    ("x", "places"),
    [
        ("speedup", [1.0, 5.5 / 5, 5.5 / 4, 5.5 / 3, 5.5 / 2]),
        ("parameters", [1000, 900, 800, 700, 600]),
        ("num_blocks", [6, 5, 4, 3, 2]),
    ],
)
def test_the_picture_shows_values_intervals_and_the_metric(x, places):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ax = FRONTIER.plot(x)
    line, _, bars = ax.containers[0]
    assert list(line.get_xdata()) == pytest.approx(places) and list(line.get_ydata()) == pytest.approx(
        [0, 0.1, 0.2, 0.3, 0.4]
    )
    vertical = bars[-1].get_segments()
    assert [segment[:, 1].tolist() for segment in vertical][2] == pytest.approx([0.18, 0.24])
    assert len(bars) == (2 if x == "speedup" else 1)
    if x == "speedup":
        assert bars[0].get_segments()[2][:, 0].tolist() == pytest.approx([5 / 4, 6.5 / 4])
    assert [text.get_text() for text in ax.texts] == ["6", "5", "4", "3", "2"]
    assert "divergence" in ax.get_ylabel() and ax.get_xlabel()
    left, right = ax.get_xlim()
    assert (left < right) == (x == "speedup")  # the whole model is always on the left
    (beside,) = [other for other in ax.figure.axes if other is not ax]
    assert beside.get_ylabel() == "metric" and list(beside.lines[0].get_ydata()) == pytest.approx(
        [0.9, 0.88, 0.86, 0.84, 0.82]
    )
    ax.figure.canvas.draw()
    pyplot.close(ax.figure)


def test_pictures_go_into_axes_of_the_users_and_do_without_a_metric():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    assert made_up(False, False).plot("parameters", ax) is ax and ax.figure.axes == [ax]


def test_pictures_that_cannot_be_drawn_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"x must be one of speedup, parameters, num_blocks, found 'time'"):
        FRONTIER.plot("time")
    with pytest.raises(ConfigError, match="Take x='parameters'"):
        made_up(times=False).plot("speedup")
    assert made_up(times=False).plot().get_xlabel() == "parameters"
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        FRONTIER.plot()
