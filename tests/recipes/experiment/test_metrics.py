"""Whether evaluate computes the metrics, or the libraries beneath: where its scripts are found, what is told, and that
both give the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import is_offline_mode

evaluate = pytest.importorskip("evaluate")
pytest.importorskip("nltk")
pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from deeparc_hf.errors import ConfigError  # noqa: E402
from experiment.generation import TextScores  # noqa: E402
from experiment.metrics import BENEATH, Accuracy, Metrics  # noqa: E402

from ..metric_scripts import VALUES, script  # noqa: E402
from .test_generation import random_pairs, tiny_nltk_data  # noqa: E402

ROOT = Path(__file__).parents[3]


def predictions_of(right: int, of: int) -> SimpleNamespace:
    """What a Trainer gives compute_metrics, for three classes."""
    wanted = np.arange(of) % 3
    found = np.where(np.arange(of) < right, wanted, (wanted + 1) % 3)
    return SimpleNamespace(predictions=np.eye(3)[found], label_ids=wanted)


def test_scripts_of_a_folder_compute_all_of_them(evaluate_cache, tmp_path):
    folder = tmp_path / "scripts"
    for name in BENEATH:
        script(folder, name)
    metrics = Metrics(BENEATH, str(folder))
    assert Accuracy(metrics)(predictions_of(2, 4)) == {"accuracy": 4.25}
    scores = TextScores(["a b", "e"], ["a b", "d"], metrics).values()
    expected = {"bleu": 0.5, "brevity_penalty": 0.75, "length_ratio": 2.0}
    expected |= {"precision_1": 0.1, "precision_2": 0.2, "precision_3": 0.3, "precision_4": 0.4}
    expected |= dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 0.25)
    assert {name: scores[name] for name in expected} == expected
    for told in metrics.told.values():
        assert re.fullmatch(rf"evaluate {evaluate.__version__}, its script from a folder, sha256 \w{{12}}", told)
    assert str(tmp_path) not in str(metrics)


def test_without_scripts_the_libraries_beneath_compute(evaluate_cache):
    metrics = Metrics(BENEATH)
    assert not any(name in metrics for name in BENEATH)
    assert metrics.told["bleu"].startswith("sacrebleu (evaluate's script is not in its cache; evaluate_scripts=hub")
    assert Accuracy(metrics)(predictions_of(3, 4)) == {"accuracy": 0.75}
    texts = (["a b c d e", "c"], ["a b c d e", "d"])
    assert TextScores(*texts, metrics).values() == TextScores(*texts).values()
    assert not evaluate_cache.exists()


def test_the_newest_script_in_its_cache_counts_and_nothing_is_fetched(evaluate_cache):
    kept = evaluate_cache / "evaluate-metric--accuracy"
    for stamp, folder in enumerate(("b" * 64, "a" * 64)):
        script(kept / folder, "accuracy")
        (kept / folder / "accuracy" / "accuracy.py").rename(kept / folder / "accuracy.py")
        os.utime(kept / folder / "accuracy.py", (stamp, stamp))
    newest = kept / ("a" * 64) / "accuracy.py"
    newest.write_text(newest.read_text().replace(".25", ".75"))
    os.utime(newest, (5, 5))
    metrics = Metrics(["accuracy"])
    assert Accuracy(metrics)(predictions_of(2, 4)) == {"accuracy": 4.75}
    assert "its script from its cache, sha256 " in metrics.told["accuracy"]


def test_meteors_script_in_the_cache_is_not_used_for_it_would_download(evaluate_cache):
    script(evaluate_cache / "evaluate-metric--meteor", "meteor")
    metrics = Metrics(["meteor"])
    assert "meteor" not in metrics and "would download" in metrics.told["meteor"]


def test_offline_the_hub_is_its_cache(evaluate_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    script(evaluate_cache / "evaluate-metric--accuracy", "accuracy")
    (evaluate_cache / "evaluate-metric--accuracy" / "accuracy").rename(
        evaluate_cache / "evaluate-metric--accuracy" / ("a" * 64)
    )
    assert "its script from its cache" in Metrics(["accuracy"], "hub").told["accuracy"]


def test_offline_without_a_script_it_says_so(evaluate_cache, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = Metrics(["accuracy"], "hub").told["accuracy"]
    assert told.endswith("(evaluate's script is not in its cache; this machine is offline)")
    assert "this machine is offline" in caplog.text


@pytest.mark.parametrize("value", ["{'acc': 1.0}", "{'accuracy': 0.25}", "1 / 0"])
def test_a_script_that_gives_something_else_is_not_used(evaluate_cache, tmp_path, value, caplog):
    folder = script(tmp_path / "scripts", "accuracy")
    file = folder / "accuracy" / "accuracy.py"
    file.write_text(file.read_text().replace(VALUES["accuracy"], value))
    metrics = Metrics(["accuracy"], str(folder))
    assert "accuracy" not in metrics and ("trial" in caplog.text or "could not load and try" in caplog.text)
    assert Accuracy(metrics)(predictions_of(1, 4)) == {"accuracy": 0.25}


def test_scripts_are_told_apart(evaluate_cache, tmp_path):
    """A resume with another script would mix two figures in one table: what is told is part of what was asked for."""
    folder = script(tmp_path / "scripts", "accuracy")
    first = Metrics(["accuracy"], str(folder)).told["accuracy"]
    file = folder / "accuracy" / "accuracy.py"
    file.write_text(file.read_text().replace("+ .25", "+ .5"))
    assert Metrics(["accuracy"], str(folder)).told["accuracy"] != first


def test_what_nobody_computes_is_told_so():
    metrics = Metrics(["meteor"], "off")
    metrics.leave_out("meteor", "there is no data.")
    assert str(metrics) == "Computed by: meteor: left out, there is no data."


@pytest.mark.parametrize(
    ("scripts", "imports", "told"),
    [
        ("off", "", "evaluate_scripts is off"),
        ("absent", "", "the folder evaluate_scripts has no accuracy/accuracy.py"),
        ("broken", "import not_a_module_of_anybody", "cannot be loaded and tried, ImportError"),
        ("wrong", "raise RuntimeError('in /some/place')", "cannot be loaded and tried, RuntimeError"),
    ],
)
def test_why_evaluate_does_not_compute_is_told_without_places(evaluate_cache, tmp_path, scripts, imports, told):
    folder = tmp_path / scripts
    folder.mkdir()
    if imports:
        script(folder, "accuracy", imports)
    metrics = Metrics(["accuracy"], "off" if scripts == "off" else str(folder))
    assert told in metrics.told["accuracy"] and metrics.told["accuracy"].startswith("the share of right answers (")
    assert "/some/place" not in str(metrics) and str(tmp_path) not in str(metrics)
    assert Accuracy(metrics)(predictions_of(1, 4)) == {"accuracy": 0.25}


def test_evaluate_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "evaluate", None)
    assert "evaluate is not installed" in Metrics(["accuracy"]).told["accuracy"]


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match=r"must be cache, hub, off, or a folder .*, found 'hob'"):
        Metrics(["accuracy"], "hob")


_PROCESS = """
import json, sys
import torch.distributed as dist
dist.init_process_group("gloo")
from experiment.metrics import Metrics
metrics = Metrics(["accuracy"], sys.argv[1 + dist.get_rank()])
found = {"here": "accuracy" in metrics, "told": metrics.told["accuracy"]}
open(f"{sys.argv[3]}/{dist.get_rank()}.json", "w").write(json.dumps(found))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_choose_alike(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "choose.py").write_text(_PROCESS)
    folders = [str(script(tmp_path / "scripts", "accuracy")), str(tmp_path / "empty")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "choose.py"), *folders, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] and not found[0]["here"]
    assert "has no accuracy/accuracy.py" in found[0]["told"]


# ---- evaluate's own scripts, from the Hub or from its cache ----


@pytest.fixture(scope="module")
def theirs():
    found = Metrics(["accuracy", "bleu", "rouge"], "cache" if is_offline_mode() else "hub")
    absent = [name for name in ("accuracy", "bleu", "rouge") if name not in found]
    if absent:
        pytest.skip(f"evaluate's scripts are neither on a Hub nor in its cache: {found}")
    return found


@pytest.mark.parametrize(
    "texts", [random_pairs(200, 5), (["", "a-\n", "?!", ""], ["東京", "a", "?", ""]), (["", ""], ["a", ""])]
)
def test_evaluate_gives_the_same_scores(texts, theirs):
    assert TextScores(*texts, theirs).values() == TextScores(*texts).values()


@pytest.mark.parametrize(("right", "of"), [(0, 7), (7, 7), (5, 7), (1234, 4567)])
def test_evaluate_gives_the_same_accuracy(right, of, theirs):
    assert Accuracy(theirs)(predictions_of(right, of)) == Accuracy(Metrics())(predictions_of(right, of))
    assert Accuracy(theirs)(predictions_of(right, of)) == {"accuracy": right / of}


_METEOR = """
import json, sys, nltk
nltk.data.path[:] = [sys.argv[1]]
from experiment.generation import TextScores
from experiment.metrics import Metrics
texts = (["the auto stops here", "here the car", ""], ["the car stopped here", "the car stops here", "the car"])
metrics = Metrics(["meteor"], sys.argv[2])
scores = [TextScores(*texts, each).values()["meteor"] for each in (metrics, None)]
print(json.dumps({"here": "meteor" in metrics, "told": metrics.told["meteor"], "scores": scores}))
"""


def test_evaluate_gives_the_same_meteor(tmp_path):
    """Its script downloads nltk's data when it is loaded, and so it is asked for by word."""
    if is_offline_mode():
        pytest.skip("HF_HUB_OFFLINE is set; evaluate's METEOR lies on the Hub")
    command = [sys.executable, "-c", _METEOR, str(tiny_nltk_data(tmp_path / "nltk")), "hub"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes")])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if not found["here"]:
        pytest.skip(found["told"])
    assert found["scores"][0] == found["scores"][1]
