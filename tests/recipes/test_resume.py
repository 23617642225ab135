"""A recipe that is killed goes on where it stood, and its table is that of one that was left alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import ModelCard

from deeparc_hf.errors import ConfigError
from experiment.results import read_rows

from .running import recipe, without_times, words
from .test_text_classification import data  # noqa: F401 (a fixture)
from .tiny import RECIPES, ROOT

SETTINGS = {
    "finetune_epochs": 4,
    "iterations": 2,
    "num_blocks": [3, 2],
    "retrain_epochs": 4,
    "freeze": "partial",
    "metric": "accuracy",
    "test_each_epoch": True,
    "sparsity": [0.25, 0.5],
    "sparsity_retrain": [0.5],
    "save_strategy": "epoch",
    "save_total_limit": 1,
}


def start(place, folder, *more):
    command = [
        sys.executable,
        str(RECIPES / "text_classification.py"),
        *words(**place, output_dir=str(folder), **SETTINGS),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *more], env=environment, start_new_session=True, **pipes)


def noted(folder):
    path = folder / "experiment.json"
    return [row["name"] for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def figures(folder):
    """The rows of a table without times."""
    rows = [row.to_dict() for row in read_rows(folder)]
    for row in rows:
        row["training_seconds"] = row["training_seconds"] is not None
        row["measured"]["seconds"] = None
    return rows


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    running = start(data, folder)
    said = running.communicate(timeout=400)[0]
    assert running.returncode == 0, said
    return folder


KILLS = {
    "in the fine-tuning": ("original/checkpoint-*/clock.json", []),
    "in a retraining": ("iteration-2/checkpoint-*/clock.json", ["original", "iteration 1"]),
    "in the Wanda grid": (None, ["original", "iteration 1", "iteration 2", "original, 25 % zeros"]),
    "in the retraining of zeros": ("iteration-1-50-percent-zeros-retrained/checkpoint-*/clock.json", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", KILLS)
def test_killed_and_started_again(where, data, undisturbed, tmp_path):  # noqa: F811
    pattern, done = KILLS[where]
    folder = tmp_path / "out"
    running = start(data, folder)
    end = time.monotonic() + 200
    while not (list(folder.glob(pattern)) if pattern else len(noted(folder)) >= len(done)):
        assert running.poll() is None and time.monotonic() < end, running.communicate()[0]
        time.sleep(0.005)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert done is None or noted(folder) == done
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*/config.json")}
    again = start(data, folder, "--resume_from_checkpoint", "true")
    said = again.communicate(timeout=400)[0]
    assert again.returncode == 0, said
    assert figures(folder) == figures(undisturbed)
    # in the middle of the training, not from its beginning
    trained = None if pattern is None else pattern.partition("/")[0]
    assert re.findall(r"^(\S+): goes on from checkpoint-\d+$", said, re.MULTILINE) == ([trained] if trained else [])
    assert all(path.stat().st_mtime_ns == when for path, when in made.items() if path.parent.name == "original")
    assert not list(folder.glob("*/checkpoint-*"))  # what is done needs none


def test_what_is_done_is_not_done_again(data, undisturbed, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    given = words(**data, output_dir=str(folder), **SETTINGS)
    rows = recipe("text_classification").main([*given, "--resume_from_checkpoint", "true"])
    assert [row.name for row in rows] == [row.name for row in read_rows(undisturbed)]
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before.get(path)} <= {folder / "experiment.json"}
    assert "Results:" in capsys.readouterr().out


def test_what_only_the_card_tells_may_be_said_later(data, undisturbed, tmp_path):  # noqa: F811
    folder = shutil.copytree(undisturbed, tmp_path / "out")
    given = words(**data, output_dir=str(folder), **SETTINGS)
    rows = recipe("text_classification").main([*given, "--resume_from_checkpoint", "true", "--license", "mit"])
    card = ModelCard.load(folder / "iteration-2" / "README.md")
    assert card.data.license == "mit" and without_times(rows) == without_times(read_rows(undisturbed))


def test_what_lies_there_is_left_alone_unless_it_is_said(data, undisturbed, tmp_path):  # noqa: F811
    given = words(**data, output_dir=str(undisturbed), **SETTINGS)
    with pytest.raises(ConfigError, match="To go on with it, say --resume_from_checkpoint true"):
        recipe("text_classification").main(given)
    with pytest.raises(ConfigError, match=r"other settings \(pruning\.k\)"):
        recipe("text_classification").main([*given, "--resume_from_checkpoint", "true", "--k", "2"])
    with pytest.raises(ConfigError, match="is not the experiment's folder"):
        recipe("text_classification").main([*given, "--resume_from_checkpoint", str(tmp_path / "none")])


def test_another_model_and_an_experiment_of_which_nothing_is_noted_are_refused(data, undisturbed, tmp_path):  # noqa: F811
    """Both would give a table of two experiments; by their published names all folders are alike."""
    other = shutil.copytree(data["model"], tmp_path / "other" / "bert")
    given = words(**{**data, "model": str(other)}, output_dir=str(undisturbed), **SETTINGS)
    with pytest.raises(ConfigError, match=r"other settings \(model\.model\)"):
        recipe("text_classification").main([*given, "--resume_from_checkpoint", "true"])
    folder = tmp_path / "out"
    (folder / "original" / "checkpoint-3").mkdir(parents=True)
    (folder / "original" / "config.json").write_text("{}")
    given = words(**data, output_dir=str(folder), **SETTINGS)
    with pytest.raises(ConfigError, match=r"There is no experiment\.json, so where it stood is not known"):
        recipe("text_classification").main([*given, "--resume_from_checkpoint", "true"])
    given = words(**data, output_dir=str(undisturbed), **{**SETTINGS, "lr_scheduler_type": "constant"})
    with pytest.raises(ConfigError, match=r"other settings \(trainer\.lr_scheduler_type\)"):
        recipe("text_classification").main([*given, "--resume_from_checkpoint", "true"])


def test_a_journal_that_cannot_be_read_is_refused(data, tmp_path):  # noqa: F811
    given = words(**data, output_dir=str(tmp_path), **SETTINGS)
    for text in ("{", "{}", '{"asked": {"pruning": 3}}', '{"asked": 3, "rows": []}'):
        (tmp_path / "experiment.json").write_text(text)
        with pytest.raises(ConfigError, match=r"experiment\.json cannot be read"):
            recipe("text_classification").main([*given, "--resume_from_checkpoint", "true"])
