"""Plans as data: JSON in and out, hostile files, the printed table, replan, and purity of the module."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deeparc_hf
from deeparc_hf import MPruneConfig, PruningPlan
from deeparc_hf.errors import ConfigError, DeepArcWarning, PlanError
from deeparc_hf.pruning.plan import ComparedStack, make_plan


def compared(length: int, clusters: tuple[int, ...] = (0, 3), **extra: Any) -> ComparedStack:
    """Blocks are 0.99 alike within clusters that start at these indices, and 0.25 between them."""

    def cluster(index: int) -> int:
        return max(start for start in clusters if start <= index)

    rows = [
        [1.0 if i == j else 0.99 if cluster(i) == cluster(j) else 0.25 for j in range(length)] for i in range(length)
    ]
    return ComparedStack(tuple(map(tuple, rows)), **extra)


def example(**settings: Any) -> PruningPlan:
    stacks = {
        "enc.block": compared(
            6, pinned={0: "owns relative_attention_bias"}, parameters=(10, 9, 9, 9, 9, 9), next_stack="dec.block"
        ),
        "dec.block": compared(4, (0, 2)),
    }
    return make_plan(stacks, MPruneConfig(**settings), samples=321)


PLANS = {
    "default": example(),
    "partial": example(freeze="partial", k=2, protect=("dec.block.3",)),
    "by stack": example(num_blocks={"enc.block": 4}, linkage="adjacent", keep="last", rows="first"),
    "ratio": example(keep_ratio=0.5, similarity="cosine"),
    "nothing to remove": example(threshold=1.0),
}


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_round_trip_as_text_and_as_file(plan, tmp_path):
    text = plan.to_json()
    assert PruningPlan.from_json(text) == plan
    path = tmp_path / "plan.json"
    assert plan.to_json(path) == text
    for place in (path, str(path)):
        again = PruningPlan.from_json(place)
        assert again == plan
        assert list(again.stacks) == ["enc.block", "dec.block"]
        assert again.to_json() == text


def test_file_says_what_is_kept_and_removed():
    data = json.loads(example().to_json())
    assert data["samples"] == 321
    assert data["config"]["threshold"] == 0.98
    stack = data["stacks"]["enc.block"]
    assert (stack["kept"], stack["removed"], stack["clusters"]) == ([0, 3], [1, 2, 4, 5], [[0, 1, 2], [3, 4, 5]])
    assert stack["pinned"] == {"0": "owns relative_attention_bias"}


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    """An edit of a plan's data: set the entry at this path."""

    def edit(data: dict[str, Any]) -> Any:
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        return data

    return edit


def drop(*path: str) -> Callable[[dict[str, Any]], Any]:
    def edit(data: dict[str, Any]) -> Any:
        place = data
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        return data

    return edit


def enc(key: str, value: Any) -> tuple[str, Callable[[dict[str, Any]], Any]]:
    return f"{key}={str(value)[:30]}", put("stacks", "enc.block", key, value=value)


HOSTILE = dict(
    [
        ("a list", lambda data: [data]),
        ("null", lambda data: None),
        ("a text", lambda data: "plan"),
        ("a number", lambda data: 1),
        ("an empty object", lambda data: {}),
        *((f"no {key}", drop(key)) for key in ("format_version", "config", "samples", "stacks")),
        *(
            (f"no stacks.{key}", drop("stacks", "enc.block", key))
            for key in ("similarity", "removed", "kept", "threshold", "clusters")
        ),
        *((f"version {value!r}", put("format_version", value=value)) for value in (0, 2, -1, "1", None, True, [1])),
        *(
            (f"stacks {value!r}", put("stacks", value=value))
            for value in (None, [], 3, "enc", {"enc.block": None}, {"enc.block": [1]})
        ),
        *(
            (f"samples {value!r}", put("samples", value=value))
            for value in (None, [], "many", -1, float("inf"), float("nan"))
        ),
        *((f"config {value!r}", put("config", value=value)) for value in (None, [], 3, {"threshold": 98}, {"k": "1"})),
        *(
            enc("similarity", value)
            for value in (None, 3, [], [[1.0, 0.5]], [["x"] * 6] * 6, [[float("nan")] * 6] * 6, [[1.0] * 6] * 5)
        ),
        *(enc("removed", value) for value in (None, 1, [6], [-1], [1, 1], [float("inf")], [[1]], [10**30])),
        # the right blocks, [1, 2, 4, 5], in the wrong types
        *(
            enc("removed", value)
            for value in (
                "1245",
                ["1", "2", "4", "5"],
                [1.5, 2, 4, 5],
                [True, 2, 4, 5],
                {"1": 0, "2": 0, "4": 0, "5": 0},
            )
        ),
        *(enc("kept", value) for value in ([], [0], [0, 3, 3], [0, 1, 3], [0, 3, 99])),
        *(enc("frozen", value) for value in ([7], [-1], [3, 3], "3", [1])),  # 1 is removed, so it cannot be frozen
        *(enc("clusters", value) for value in (None, [1], [[0, 1]], [[0, 1, 2], [3, 4, 9]], [[0, 1, 2], [2, 3, 4, 5]])),
        *(enc("threshold", value) for value in (None, "high", "0.98", True, [], float("nan"), 98)),
        *(enc("pinned", value) for value in (None, [], {"x": "why"}, {"9": "why"}, {"-1": "why"})),
        *(enc("parameters", value) for value in (None, ["x"], [float("inf")] * 6)),
        *(enc("next_stack", value) for value in (3, [], {})),
    ]
)


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE)
def test_hostile_file_is_a_plan_error(edit, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(edit(example().to_dict())), "utf-8")
    with pytest.raises(PlanError) as caught:
        PruningPlan.from_json(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"not json",
        b'{"format_version": 1',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format_version": ' + b"1" * 5000 + b"}",
    ],
    ids=["empty", "words", "cut off", "not utf-8", "nested lists", "nested objects", "a huge number"],
)
def test_file_that_is_not_json_is_a_plan_error(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(text)
    with pytest.raises(PlanError, match=r"not a pruning plan"):
        PruningPlan.from_json(path)


def test_text_that_is_not_json_is_a_plan_error():
    with pytest.raises(PlanError, match=r"not a pruning plan"):
        PruningPlan.from_json("{not json}")


def test_file_of_a_newer_version_says_so():
    data = {**example().to_dict(), "format_version": 7}
    with pytest.raises(PlanError, match=r"format version 7; this version of deeparc_hf reads 1"):
        PruningPlan.from_dict(data)


def test_settings_of_a_newer_version_warn():
    data = put("config", "colour", value="red")(example().to_dict())
    with pytest.warns(DeepArcWarning, match="colour"):
        assert PruningPlan.from_dict(data) == example()


# --- replan -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The threshold .* takes")  # and so it should, where more than half goes
@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 0.2},
        {"k": 2},
        {"num_blocks": 7},
        {"keep_ratio": 0.7},
        {"freeze": "partial"},
        {"linkage": "adjacent"},
        {"protect": "*.1"},
    ],
    ids=str,
)
def test_replan_equals_a_new_plan(settings):
    plan = example()
    again = plan.replan(**settings)
    assert again == example(**settings)
    assert again != plan
    assert plan == example()


@pytest.mark.parametrize(
    "settings", [{"similarity": "cosine"}, {"rows": "first"}, {"calibration_samples": 64}, {"seed": 3}], ids=str
)
def test_replan_refuses_what_decides_the_similarities(settings):
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"'{name}'.*similarities depend on it\. Call analyze again"):
        example().replan(**settings, threshold=0.9)


def test_replan_checks_its_settings():
    with pytest.raises(ConfigError, match=r"Did you mean 0\.97"):
        example().replan(threshold=97)
    with pytest.raises(ConfigError, match=r"Did you mean 'threshold'"):
        example().replan(treshold=0.97)
    with pytest.raises(PlanError, match=r"at most 6 can go"):
        example().replan(num_blocks=1, threshold=None, k=1, min_blocks=2)


@pytest.mark.filterwarnings("ignore:The threshold .* takes")  # and so it should, where more than half goes
@pytest.mark.timeout(60)
def test_replan_of_a_deep_model_comes_to_an_end():
    plan = make_plan({"layers": compared(126, tuple(range(0, 126, 4)))}, MPruneConfig())
    assert plan.replan(threshold=0.97).num_kept == 32
    assert plan.replan(num_blocks=63).num_kept == 63


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_tells_of_each_stack():
    lines = str(example(freeze="partial", k=2)).splitlines()
    header = lines[0].split()
    assert header == ["stack", "blocks", "kept", "threshold", "clusters", "removed", "frozen"]
    assert lines[2].split() == ["enc.block", "6", "4", "0.9800", "0-2", "3-5", "1,4", "-"]
    assert lines[3].split() == ["dec.block", "4", "2", "0.9800", "0-1", "2-3", "1,3", "-"]
    assert "enc.block.0 is pinned: owns relative_attention_bias" in lines
    assert lines[-1] == "remove 4 of 10 blocks (cka, rows=tokens, 321 samples)"


def test_table_shows_what_is_frozen_and_the_threshold_that_was_found():
    lines = str(example(num_blocks=9, freeze="partial")).splitlines()
    # all candidates are equally similar: of equals the later block goes, here the fifth of the encoder
    assert lines[2].split()[-4:] == ["0-2", "3-5", "5", "0,1,2,3"]
    assert "0.9900" in lines[2]


def test_table_says_when_nothing_goes():
    text = str(example(threshold=1.0))
    assert text.splitlines()[-1].startswith("nothing to remove: 0 of 10 blocks")


def test_columns_line_up():
    lines = str(example()).splitlines()
    starts = [
        [i for i in range(len(line)) if line[i] != " " and (i == 0 or line[i - 2 : i] == "  ")] for line in lines[:4]
    ]
    assert starts[0] == starts[1] == starts[2] == starts[3]


def test_totals():
    plan = example(freeze="partial", num_blocks=9)
    assert (plan.num_blocks, plan.num_kept, plan.num_frozen) == (10, 9, 7)
    assert plan.removed == {"enc.block": (5,)}


# --- purity -----------------------------------------------------------------------------------------------------------


PURE = [
    "pruning/choice.py",
    "pruning/plan.py",
    "pruning/clusters.py",
    "pruning/heatmap.py",
    "pruning/may_go.py",
    "core/caller.py",
    "core/checks.py",
    "core/tables.py",
]
MODELS = {"torch", "transformers", "timm", "numpy", "deeparc_hf"}


@pytest.mark.parametrize("path", PURE)
def test_plans_import_no_model_code(path):
    nodes = list(ast.walk(ast.parse((Path(deeparc_hf.__file__).parent / path).read_text("utf-8"))))
    ours = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level}
    others = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    others |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    assert ours <= {
        "choice",
        "clusters",
        "config",
        "heatmap",
        "may_go",
        "core.caller",
        "core.checks",
        "errors",
        "core.plain_text",
        "core.tables",
        "plain_text",
    }
    assert not {name.split(".")[0] for name in others} & MODELS
