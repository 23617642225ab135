"""Warnings of the package name the line that called it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainerCallback

import deeparc_hf
from deeparc_hf import analyze, apply_plan, prune_model
from deeparc_hf.core.caller import warn_caller
from deeparc_hf.errors import CalibrationWarning, DeepArcWarning
from tests import trainers
from tests.trainers import pruning, train
from tests.zoo import ZOO


def test_a_warning_from_outside_names_its_own_line():
    with pytest.warns(DeepArcWarning, match="^odd$") as told:
        warn_caller("odd")
    assert told[0].filename == __file__ and told[0].category is DeepArcWarning


def test_a_warning_names_the_line_that_called_the_package_at_any_depth():
    specimen = ZOO["llama"]
    settings = {"threshold": 0.01, "progress": False}
    with pytest.warns(CalibrationWarning, match="takes") as shallow:
        plan = analyze(specimen.model(), specimen.batches(8), **settings)
    with pytest.warns(CalibrationWarning, match="takes") as deep:
        prune_model(specimen.model(), specimen.batches(8), **settings)
    with pytest.warns(CalibrationWarning, match="takes") as again:
        plan.replan(k=1)
    for told in (shallow, deep, again):
        assert {w.filename for w in told if "takes" in str(w.message)} == {__file__}


def test_a_warning_of_a_removal_names_the_line_that_asked_for_it():
    specimen = ZOO["llama"]
    model = specimen.model()
    plan = analyze(model, specimen.batches(8), num_blocks=3, progress=False)
    model.generation_config.odd_layers = [1, 2]
    with pytest.warns(DeepArcWarning, match="odd_layers") as told:
        apply_plan(model, plan)
    assert {w.filename for w in told if "odd_layers" in str(w.message)} == {__file__}


def test_a_warning_in_a_training_names_the_line_that_trains(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    with pytest.warns(DeepArcWarning, match="ended before its first pruning") as told:
        train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3, start_epoch=1), Stop())
    assert {w.filename for w in told if "first pruning" in str(w.message)} == {trainers.__file__}


def test_no_warning_of_the_package_counts_frames_by_hand():
    for path in Path(deeparc_hf.__file__).parent.rglob("*.py"):
        assert path.name == "caller.py" or "warnings.warn(" not in path.read_text("utf-8"), path
