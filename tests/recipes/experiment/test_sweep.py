"""Sweeps: what runs, what is kept, what is run again, what is said, with a recipe that trains nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from deeparc_hf.errors import ConfigError
from experiment.arguments import PruningArguments
from experiment.command import run
from experiment.sweep import Sweep, SweepFile, slug

from ..markdown import line, tables

ROOT = Path(__file__).parents[3]
GRID = {"num_blocks": {"three": 3, "two": 2}, "width": {"": 1, "wide": 9}}
CELLS = ["original", "three", "three-wide", "two", "two-wide"]


@pytest.fixture
def place(tmp_path):
    """A folder with a recipe, its config, and a sweep file."""
    shutil.copy(Path(__file__).with_name("stub_recipe.py"), tmp_path / "stub_recipe.py")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": "somebody/some-model", "learning_rate": 0.001}))
    write(tmp_path)
    return tmp_path


def write(place, grid=GRID, **more):
    data = {"recipe": "stub_recipe.py", "config": "config.yaml", "grid": grid, **more}
    (place / "sweep.yaml").write_text(yaml.safe_dump(data, sort_keys=False))


def sweep(place, *extra):
    """Run the sweep; the exit code and what was said."""
    said = []
    code = Sweep(SweepFile.read(place / "sweep.yaml"), place / "out", extra, say=said.append).run()
    return code, "\n".join(said)


def calls(place):
    """The arguments of every run of the recipe so far."""
    path = place / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ran(place, since=0):
    return [Path(call["output_dir"]).name for call in calls(place)[since:]]


def table(place):
    return (place / "out" / "sweep.md").read_text()


def process(place, *words):
    command = [
        sys.executable,
        str(ROOT / "recipes" / "sweep.py"),
        str(place / "sweep.yaml"),
        "--output",
        str(place / "out"),
        *words,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # a shell's background job ignores Ctrl-C, and its children too
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **streams, env=environment, start_new_session=True, **heard)


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def at_work(place, cell):
    return lambda: (place / "began").exists() and (place / "began").read_text() == cell


def test_every_cell_runs_once_and_takes_the_original(place):
    code, said = sweep(place, "--seed", "3")
    assert code == 0
    assert ran(place) == CELLS
    original, *others = calls(place)
    assert original["iterations"] == "0" and "model" not in original
    for call in others:
        assert call["model"] == str(place / "out" / "cells" / "original" / "original")
        assert call["finetune_epochs"] == "0" and call["sparsity_original"] == "false" and "iterations" not in call
    assert [(call["num_blocks"], call["width"]) for call in others] == [("3", "1"), ("3", "9"), ("2", "1"), ("2", "9")]
    assert all(call["seed"] == "3" for call in calls(place))
    assert "two wide: done in" in said


def test_a_model_that_is_not_fine_tuned_is_taken_from_where_it_is(place):
    recipe = place / "stub_recipe.py"
    recipe.write_text(
        recipe.read_text().replace('"original" if name == "original" else', 'None if name == "original" else')
    )
    assert sweep(place, "--finetune_epochs", "0")[0] == 0
    assert all("model" not in call for call in calls(place))
    assert sweep(place, "--finetune_epochs", "0")[1].count("done before") == 5


def test_what_is_done_is_not_done_again(place):
    sweep(place)
    before = table(place)
    shutil.move(place / "out", place / "moved")  # where the cells lie makes no difference
    shutil.move(place / "moved", place / "out")
    code, said = sweep(place)
    assert code == 0 and len(calls(place)) == 5 and said.count("done before") == 5
    assert table(place) == before


def test_changed_arguments_run_again_and_it_is_said(place):
    sweep(place)
    write(place, {"num_blocks": {"three": 3, "two": 1}, "width": {"": 1, "wide": 9}})
    code, said = sweep(place)
    assert code == 0 and ran(place, 5) == ["two", "two-wide"]
    assert "two: the grid (num_blocks) changed, so it is run again" in said
    assert (place / "out" / "set_aside" / "two.1" / "results.json").exists()
    (place / "config.yaml").write_text(yaml.safe_dump({"model": "somebody/some-model", "learning_rate": 0.002}))
    assert "original: the config file (learning_rate) changed" in sweep(place)[1]
    assert len(calls(place)) == 12
    assert "the arguments changed" in sweep(place, "--seed", "1")[1]
    assert (place / "out" / "set_aside" / "two.3").exists()


def test_a_new_original_makes_all_others_anew(place):
    sweep(place)
    shutil.rmtree(place / "out" / "cells" / "original")
    said = sweep(place)[1]
    assert ran(place, 5) == CELLS and "three: the original changed" in said


def test_a_failed_cell_does_not_stop_the_others(place):
    (place / "fail-three-wide").touch()
    code, said = sweep(place)
    assert code == 1 and ran(place) == CELLS
    assert "three wide: failed with exit code 3" in said and "this recipe was told to fail" in said
    assert (
        said.endswith("is not done again.") and "Failed: three wide." in said and "Failed: three wide." in table(place)
    )
    (place / "fail-three-wide").unlink()
    code, said = sweep(place)
    assert code == 0 and ran(place, 5) == ["three-wide"]
    assert "three wide: was not finished" in said and "Failed" not in table(place)


def test_without_an_original_nothing_else_runs(place):
    (place / "fail-original").touch()
    code, said = sweep(place)
    assert code == 1 and ran(place) == ["original"] and "no cell could be run" in said


def test_killed_in_the_middle_of_the_second_cell(place):
    sweep(place)
    undisturbed = table(place)
    shutil.rmtree(place / "out")
    (place / "began").unlink()
    (place / "wait-three").touch()
    running = process(place)
    wait_for(at_work(place, "three"))
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    (place / "wait-three").unlink()
    assert not (place / "out" / "cells" / "three" / "results.json").exists()
    code, said = sweep(place)
    assert code == 0 and "original: done before" in said and "three: was not finished, so it goes on" in said
    assert table(place) == undisturbed
    assert [call.get("resume_from_checkpoint") for call in calls(place)] == ["true"] * len(calls(place))
    assert not (place / "out" / "set_aside").exists()


@pytest.mark.slow
def test_a_recipe_that_outlives_its_sweep_is_waited_for(place):
    (place / "wait-three").touch()
    first = process(place)
    wait_for(at_work(place, "three"))
    first.kill()
    first.wait()
    second = process(place)
    assert "waiting for its end" in second.stdout.readline()
    (place / "wait-three").unlink()
    said = second.communicate(timeout=90)[0]
    assert second.returncode == 0 and "three: done before" in said
    assert ran(place) == CELLS  # nothing ran twice


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopping_stops_the_recipe_too(place, number):
    (place / "wait-three").touch()
    running = process(place)
    wait_for(at_work(place, "three"))
    running.send_signal(number)
    said = running.communicate(timeout=90)[0]
    assert running.returncode == 130 and "Stopped. The same command goes on" in said and "Traceback" not in said
    (place / "wait-three").unlink()
    time.sleep(0.1)
    assert not (place / "out" / "cells" / "three" / "results.json").exists()  # the recipe is gone
    assert sweep(place)[0] == 0 and ran(place, 2) == CELLS[1:]


def test_the_table_shows_both_sides(place):
    seed = {
        "original": {
            "original": {
                "blocks": 4,
                "metrics": {"accuracy": 50.0},
                "seconds": 10.0,
                "training_seconds": 7.0,
                "tested": [None, 50.0],
            }
        },
        "three": {
            "iteration 1": {
                "blocks": [2, 1],
                "parameters": 3100,
                "metrics": {"accuracy": 49.0},
                "seconds": 8.0,
                "freeze": 2,
                "tested": [49.5, 49.0],
            }
        },
        "two": {"iteration 2": {"blocks": 1, "slip": "no such block", "note": "a note"}},
    }
    write(place, scale={"accuracy": 100}, seed=seed, title="A title")
    sweep(place)
    assert table(place).startswith("# A title\n")
    found = tables(table(place))
    assert list(found) == ["", "After each epoch", "Times", "About the seed's figures"]
    models, epochs, times = found[""], found["After each epoch"], found["Times"]
    assert line(models, "original", "original") == {
        "blocks": "4",
        "seed: blocks": "4",
        "parameters": "4,000",
        "seed: parameters": "-",
        "accuracy": "54.000",
        "seed: accuracy": "50.000",
        "change": "-",
        "seed: change": "-",
        "freeze": "0",
        "seed: freeze": "-",
    }
    assert [*line(models, "three", "iteration 1").values()] == (
        ["3", "2 + 1", "3,000", "3,100", "53.100", "49.000", "-0.900", "-1.000", "0", "2"]
    )
    assert [*line(models, "two", "iteration 1").values()] == (
        ["2", "-", "2,000", "-", "52.100", "-", "-1.900", "-", "0", "-"]
    )
    assert [*line(models, "two", "iteration 2").values()] == ["-", "1 *", *["-"] * 8]
    assert not [row for row in models if row["cell"] == "three" and row["model"] == "original"]  # it stands there once
    assert line(epochs, "three", "iteration 1") == {
        "epoch 1": "53.300",
        "epoch 1 (held out)": "61.000",
        "seed: epoch 1": "49.500",
        "epoch 2": "53.100",
        "epoch 2 (held out)": "62.000",
        "seed: epoch 2": "49.000",
        "change (best epoch)": "-0.700",  # 53.3 - 54
        "seed: change (best epoch)": "-0.500",
    }
    assert line(epochs, "original", "original")["seed: epoch 1"] == "-"
    assert line(times, "three", "iteration 1") == {
        "evaluation time (s)": "0.30",
        "seed: evaluation time (s)": "8.00",
        "time / original": "0.750",
        "seed: time / original": "0.800",
        "training time (s)": "5.00",
        "seed: training time (s)": "-",
    }
    assert line(times, "original", "original")["seed: training time (s)"] == "7.00"
    assert "two, iteration 2: \\* known slip: no such block" in table(place)
    assert "two, iteration 2: a note" in table(place)


def test_where_nothing_was_removed_it_says_so(place):
    (place / "ends-two").write_text("nothing could be removed")
    sweep(place)
    models = tables(table(place))[""]
    assert line(models, "two", "iteration 1")["blocks"] == "none: nothing could be removed"
    assert line(models, "two", "iteration 1")["accuracy"] == "-"
    assert line(models, "three", "iteration 1")["blocks"] == "3"


def test_many_metrics_are_lines_of_a_table_of_their_own(place):
    names = ["accuracy", "b", "c", "d", "e"]
    seed = {"three": {"iteration 1": {"metrics": {"d": 0.25}}}}
    write(place, metrics=names, seed=seed)
    sweep(place)
    found = tables(table(place))
    assert [name for name in found[""][0] if name in names] == names[:3]
    assert found["Other figures"] == [
        {"cell": "three", "model": "iteration 1", "figure": "d", "here": "-", "seed": "0.2500"}
    ]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("recipe_sweep", ROOT / "recipes" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_without_earlier_figures_there_are_no_columns_for_them(place):
    sweep(place)
    found = tables(table(place))
    assert [*found[""][0]] == ["cell", "model", "blocks", "parameters", "accuracy", "change", "freeze"]
    assert [*line(found[""], "two", "iteration 1").values()] == ["2", "2,000", "0.5210", "-0.0190", "0"]
    assert line(found["Times"], "two", "iteration 1")["time / original"] == "0.500"
    assert "seed" not in table(place)


def test_a_list_of_targets_does_not_disturb_the_original():
    assert PruningArguments(num_blocks=["5", "4"], iterations=0).iterations == 0
    with pytest.raises(ConfigError, match="2 targets for 3 iterations"):
        PruningArguments(num_blocks=["5", "4"], iterations=3)


def test_dry_run_prints_the_commands(place, main, capsys):
    assert main([str(place / "sweep.yaml"), "--output", str(place / "out"), "--dry-run", "--", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert not (place / "out").exists() and not calls(place)
    assert re.findall(r"^# (.*)$", said, re.MULTILINE) == ["original", "three", "three wide", "two", "two wide"]
    original = str(place / "out" / "cells" / "original" / "original")
    command = (
        f"--seed 3 --num_blocks 2 --width 9 --sparsity_original false --model {original} --finetune_epochs 0 "
        "--output_dir"
    )
    assert command in said


def test_a_bad_file_ends_with_2(place, main, capsys):
    write(place, gird={})
    with pytest.raises(SystemExit) as end:
        run(lambda: main([str(place / "sweep.yaml"), "--output", str(place / "out")]))
    assert end.value.code == 2
    assert capsys.readouterr().err.strip().endswith("there is no 'gird'. Did you mean 'grid'?")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"meterics": ["f1"]}, "Did you mean 'metrics'?"),
        ({"grid": {"treshold": [0.9]}}, "grid: there is no 'treshold'. Did you mean 'threshold'?"),
        ({"grid": {"widht": [2]}}, "Did you mean 'width'?"),
        ({"grid": {"threshold": [98, 99]}}, "threshold=98: threshold must be in"),
        ({"grid": {"num_blocks": [3], "threshold": [0.9]}}, "Exactly one of"),
        ({"grid": {"model": ["a", "b"]}}, "model is set by the sweep itself"),
        ({"grid": {"seed": [1, 2]}}, "must be the same in all cells"),
        ({"grid": {"num_blocks": []}}, "num_blocks has no values"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": [1]}, "must hold names and values"),
        ({"grid": {"width": {"": 1}, "num_blocks": {"a": 3, "b": 2}}, "seed": {"c": {}}}, "there is no 'c'"),
        ({"grid": {"num_blocks": {"original": 3}}}, "same name"),
        ({"seed": {"thre": {}}}, "Did you mean 'three'?"),
        ({"seed": {"three": {"iteration 1": {"block": 3}}}}, "Did you mean 'blocks'?"),
        ({"seed": {"three": {"first": {}}}}, "rows are named as in results.md"),
        ({"recipe": "none.py"}, "there is no recipe"),
        ({"config": "none.yaml"}, "there is no file"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_runs(place, change, message):
    write(place, **{"grid": GRID, **change})
    with pytest.raises(ConfigError) as caught:
        sweep(place)
    assert message in str(caught.value)
    assert not (place / "out").exists()


def test_what_a_sweep_decides_itself_is_refused(place):
    for word in ("--output_dir", "--config=x", "--repo_id"):
        with pytest.raises(ConfigError, match="is not for all cells"):
            sweep(place, word, "x")
    (place / "config.yaml").write_text("repo_id: me/model\n")
    with pytest.raises(ConfigError, match="publish every cell"):
        sweep(place)


def test_names_as_folders():
    assert slug("T99 K1 (Part)") == "T99-K1-Part"
    assert slug("num_blocks=5,4") == "num_blocks=5-4"
    assert slug("../..") == "cell"


def test_names_that_read_the_same_have_folders_of_their_own(place):
    write(place, {"num_blocks": {"A+": 3, "A-": 2}})
    assert sweep(place)[0] == 0
    assert [call["num_blocks"] for call in calls(place)[1:]] == ["3", "2"] and len(set(ran(place))) == 3
    assert sweep(place)[1].count("done before") == 3


def test_a_cell_whose_end_is_missing_is_not_done(place):
    sweep(place)
    path = place / "out" / "cells" / "three" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "complete": False}))
    code, said = sweep(place)
    assert code == 0 and ran(place, 5) == ["three"] and "three: was not finished" in said


def test_a_null_leaves_a_setting_out(place):
    write(place, {"num_blocks": {"three": 3}, "heal": {"plain": None, "healed": "lstsq"}})
    assert sweep(place)[0] == 0
    assert ["heal" in call for call in calls(place)] == [False, False, True]
