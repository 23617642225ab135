"""The end of a training: what it tells, what the report keeps of it, and which snapshots are left."""

from __future__ import annotations

import json
import shutil

import pytest

from deeparc_hf.errors import SurgeryError
from tests.trainers import pruning, train
from tests.zoo import ZOO

from .test_gate import GATE, gated, trained
from .test_resume import blocks


def report(folder):
    return json.loads((folder / "pruning_report.json").read_text())["end"]


def test_an_accepted_pruning(tmp_path, capsys):
    model, callback, _, trainer = gated(tmp_path, {4: 0.9, 2: 0.86}, {"num_blocks": 2}, save_strategy="epoch")
    end, (first, last) = report(tmp_path), callback.attempts
    assert end["blocks"] == {"before": 4, "after": 2}
    assert end["parameters"] == {"before": first["parameters"], "after": sum(p.numel() for p in model.parameters())}
    losses = [attempt["evaluations"][-1]["metrics"]["eval_loss"] for attempt in (first, last)]
    assert end["metrics"] == {
        "accuracy": {"before": 0.9, "after": 0.86},
        "loss": dict(zip(("before", "after"), losses, strict=True)),
    }
    assert end["training_seconds"] == {"before": first["training_seconds"], "after": last["training_seconds"]}
    assert (end["judged"], end["accepted"], end["checkpoint"]) == (True, 1, f"checkpoint-{trainer.state.global_step}")
    told = capsys.readouterr().out.partition("Pruning is finished")[2]
    for line in (
        "  50.0% of the blocks and",
        "  accuracy: 0.9 before the first pruning, 0.86 now",
        f"and in {tmp_path / end['checkpoint']}.",
        "deeparc_hf.push_to_hub(trainer",
    ):
        assert line in told
    assert "Nothing judged" not in told


@pytest.mark.parametrize("evaluated", [True, False])
def test_nothing_judged_and_nothing_saved(tmp_path, capsys, evaluated):
    arguments = {"eval_strategy": "epoch"} if evaluated else {}
    train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3, start_epoch=1), **arguments)
    told, end = capsys.readouterr().out.partition("Pruning is finished")[2], report(tmp_path)
    assert (
        "Nothing judged the pruning: with max_drop=" in told
        and "in no checkpoint: trainer.save_model(folder) saves it" in told
    )
    assert list(end["metrics"]) == (["loss"] if evaluated else [])
    assert ("what it cost was not measured" in told) is not evaluated


def test_what_the_callback_measured_stands_where_the_trainer_made_no_evaluation(tmp_path, capsys):
    _, callback, _ = train_small(tmp_path)
    end, stages = report(tmp_path), callback.attempts[1]["stages"]
    assert end["loss"] == {
        "before": stages["before"]["loss"],
        "after": stages["retrained"]["loss"],
        "samples": stages["before"]["samples"],
        "data": "training data outside the calibration samples",
    }
    assert "training data outside the calibration samples)" in capsys.readouterr().out


def train_small(folder):
    model, callback = ZOO["bert"].model(), pruning(num_blocks=3, calibration_samples=32)
    return model, callback, train(model, folder, callback, num_train_epochs=1)


def test_the_figures_are_of_the_best_checkpoint_where_that_is_loaded(tmp_path):
    values = iter([0.9, 0.8, 0.7, 0.6])
    train(
        ZOO["bert"].model(),
        tmp_path,
        pruning(num_blocks=3, start_epoch=1),
        compute_metrics=lambda _: {"accuracy": next(values)},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        num_train_epochs=3,
    )
    end = report(tmp_path)
    assert end["metrics"]["accuracy"] == {"before": 0.9, "after": 0.8} and end["checkpoint"] == "checkpoint-16"


def test_a_pruning_that_is_taken_back_at_the_end_is_in_no_checkpoint(tmp_path, capsys):
    model, *_ = gated(tmp_path, {4: 0.9, 2: 0.1}, {"num_blocks": 2, "k_max": 1}, save_strategy="epoch")
    end, told = report(tmp_path), capsys.readouterr().out
    assert blocks(model) == 4 and (end["accepted"], end["checkpoint"]) == (0, None)
    assert "no pruning was accepted: the model is the one from before" in told


# --- snapshots --------------------------------------------------------------------------------------------------------

TAUGHT = {"num_blocks": 3, "start_epoch": 1, "distill": {"alpha": 0.5}}


def left(folder):
    return sorted(path.name for path in (folder / "_pruning_snapshots").glob("*"))


def test_snapshots_go_when_a_run_ends_well_and_an_older_checkpoint_says_so(tmp_path):
    arguments = {"save_strategy": "epoch", "num_train_epochs": 3}
    train(ZOO["bert"].model(), tmp_path, pruning(**TAUGHT), **arguments)
    assert not (tmp_path / "_pruning_snapshots").exists()
    model = ZOO["bert"].model()
    with pytest.raises(SurgeryError, match="A run that ends well deletes it, unless keep_snapshots=True"):
        train(model, tmp_path, pruning(**TAUGHT), resume=str(tmp_path / "checkpoint-16"), **arguments)
    # a finished run has nothing more to learn
    model = ZOO["bert"].model()
    train(model, tmp_path, pruning(**TAUGHT), resume=True, **arguments)
    assert blocks(model) == 3


def test_trials_of_a_search_keep_what_their_checkpoints_need_and_do_not_meet(tmp_path):
    """Each has a folder of its own for its checkpoints, and they prune at the same steps."""
    arguments = {"save_strategy": "epoch", "num_train_epochs": 3}
    for trial in range(2):
        train(ZOO["bert"].model(trial), tmp_path, pruning(**TAUGHT, keep_snapshots=True), **arguments)
        for point in tmp_path.glob("checkpoint-*"):
            (tmp_path / f"run-{trial}").mkdir(exist_ok=True)
            shutil.move(point, tmp_path / f"run-{trial}" / point.name)
    assert left(tmp_path) == ["teacher-step-8", "teacher-step-8-2"]
    files = [path.read_bytes() for path in sorted((tmp_path / "_pruning_snapshots").glob("*/weights.safetensors"))]
    assert files[0] != files[1]
    train(ZOO["bert"].model(), tmp_path, pruning(**TAUGHT), **arguments)  # ends well: its own snapshot goes
    assert left(tmp_path) == ["teacher-step-8", "teacher-step-8-2"]
    model = ZOO["bert"].model()
    train(model, tmp_path, pruning(**TAUGHT), resume=str(tmp_path / "run-0" / "checkpoint-16"), **arguments)
    assert blocks(model) == 3


def test_an_interrupted_run_keeps_them(tmp_path):
    from .test_resume_faults import Interrupt

    arguments = {**trained(None, {}), "compute_metrics": None, "save_strategy": "steps", "save_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        train(
            ZOO["bert"].model(),
            tmp_path,
            pruning(**{**GATE, "metric": "loss", "num_blocks": 3}),
            Interrupt(13),
            **arguments,
        )
    assert left(tmp_path) == ["step-8"]
