"""The report of a run and its figures in the logs, from planted attempts: every cell is known beforehand."""

from __future__ import annotations

import json
import re
from importlib import metadata

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from deeparc_hf import MPruneConfig, remove_blocks
from deeparc_hf.architectures import describe
from deeparc_hf.reports.attempts import FINISHED, Attempt, Evaluation
from deeparc_hf.reports.run_report import RUN_REPORT, run_table, structure_of, write_run_report
from deeparc_hf.trainer.machine import Phase, Progress
from deeparc_hf.trainer.session import Session
from tests.zoo import ZOO


def evaluation(step, epoch, **metrics):
    figures = {f"eval_{name}": value for name, value in metrics.items()}
    return {"step": step, "epoch": epoch, "sparse": False, "metrics": figures, "data": {}, "weights": None}


BEFORE = {
    "name": "before pruning",
    "blocks": {"encoder": 6, "decoder": 5},
    "parameters": 1234567,
    "step": 0,
    "epoch": 0.0,
    "frozen": {},
    "training_seconds": 1234.5,
    "evaluations": [
        evaluation(8, 1.0, loss=0.7, accuracy=0.5, runtime=9.0),
        evaluation(16, 2.0, loss=0.61234, accuracy=0.75, runtime=2000.129),
    ],
}
FIRST = {
    **BEFORE,
    "name": "pruning 1",
    "iteration": 1,
    "k": 2,
    "thresholds": {"encoder": 0.98, "decoder": 0.98},
    "removed": {"encoder": [1, 3], "decoder": [4]},
    "plan_removed": {"encoder": [1, 3], "decoder": [4]},
    "healing": [],
    "stages": {},
    "blocks": {"encoder": 4, "decoder": 4},
    "parameters": 999,
    "step": 16,
    "frozen": {"encoder": [0, 2], "decoder": [1]},
    "training_seconds": 0.0,
    "evaluations": [evaluation(20, 2.5, loss=0.9)],
    "decision": "rolled back",
    "reason": "accuracy went from 0.75 to 0.5: worse by 0.25, more than max_drop 0.1",
}
SECOND = {
    **{key: value for key, value in FIRST.items() if key not in ("decision", "reason")},
    "k": 3,
    "thresholds": {"encoder": 0.91, "decoder": 0.875},
    "removed": {"encoder": [1]},
    "blocks": {"encoder": 5, "decoder": 5},
    "step": 24,
    "frozen": {},
    "evaluations": [],
}


def read(*entries):
    return [Attempt.from_dict(entry) for entry in entries]


HEADER = ["model", "k", "threshold", "blocks", "parameters", "freeze"]


def cells(table):
    """The rows of a Markdown table, and its line below the header."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(line.startswith("| ") and line.endswith(" |") for line in table.splitlines())
    assert {len(row) for row in rows} == {len(rows[0])}
    return rows


def test_table_has_a_row_for_each_attempt_with_the_planted_cells():
    rows = cells(run_table(read(BEFORE, FIRST, SECOND), "accuracy"))
    assert rows[0][:6] == HEADER
    assert rows[0][6].startswith("accuracy ")
    assert set(rows[1]) == {"---", "---:"}
    assert rows[2] == [
        "before pruning",
        "-",
        "-",
        "6 + 5",
        "1,234,567",
        "0",
        "0.5000 (1), 0.7500 (2)",
        "2,000.13",
        "1,234.50",
        "-",
    ]
    # of the first attempt the accuracy was not measured, of the second nothing was
    assert rows[3] == ["pruning 1", "2", "0.9800", "4 + 4", "999", "3", "-", "-", "0.00", "rolled back"]
    assert rows[4] == ["pruning 1", "3", "0.8750 0.9100", "5 + 5", "999", "0", "-", "-", "0.00", "-"]
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("metric", "shown"), [(None, "loss"), ("loss", "loss"), ("eval_loss", "loss"), ("eval_accuracy", "accuracy")]
)
def test_metric_is_the_loss_unless_named_with_or_without_prefix(metric, shown):
    rows = cells(run_table(read(BEFORE), metric))
    assert rows[0][6].startswith(f"{shown} ")
    assert rows[2][6] == {"loss": "0.7000 (1), 0.6123 (2)", "accuracy": "0.5000 (1), 0.7500 (2)"}[shown]


def test_a_speed_may_be_the_metric():
    row = cells(
        run_table(read({**BEFORE, "evaluations": [evaluation(4, 0.5, samples_per_second=80.0)]}), "samples_per_second")
    )[2]
    assert row[6] == "80.0000 (0.5)"


def test_an_evaluation_that_tells_times_alone_is_one_of_the_evaluation_data():
    assert Evaluation.of({"eval_runtime": 1.0}, data={}).is_of_evaluation_data is True
    assert Evaluation.of({"test_runtime": 1.0}, data={}).is_of_evaluation_data is False


def test_fractional_epochs_and_zero_values_are_shown():
    attempt = {**BEFORE, "evaluations": [evaluation(4, 0.5, loss=0.0, runtime=0.0)]}
    row = cells(run_table(read(attempt)))[2]
    assert row[6:8] == ["0.0000 (0.5)", "0.00"]


def progress(attempts, **fields):
    return Progress(k=1, phase=Phase.DONE, attempts=read(*attempts), **fields).for_report()


def written(folder, *args):
    write_run_report(folder, *args)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{RUN_REPORT}.json",
        f"{RUN_REPORT}.md",
    ]  # no draft is left
    return json.loads((folder / f"{RUN_REPORT}.json").read_text("utf-8")), (folder / f"{RUN_REPORT}.md").read_text(
        "utf-8"
    )


def test_json_reads_back_with_settings_and_attempts(tmp_path):
    config = MPruneConfig(max_drop=0.1, num_blocks=[8, 6], freeze=["encoder.0"])
    run = progress([BEFORE, FIRST, SECOND], accepted=1, baseline=0.75, reason="the training ended")
    data, _ = written(tmp_path, config, run, "accuracy")
    assert data["attempts"] == [BEFORE, FIRST, SECOND]
    assert MPruneConfig.from_dict(data["config"]) == config
    expected = {
        "format_version": 1,
        "metric": "accuracy",
        "baseline": 0.75,
        "phase": FINISHED,
        "reason": "the training ended",
        "accepted": 1,
    }
    assert {key: data[key] for key in expected} == expected
    assert data["versions"]["torch"] == metadata.version("torch")
    assert data["hardware"]


def test_markdown_tells_the_table_the_gate_and_each_attempt(tmp_path):
    run = progress([BEFORE, FIRST, SECOND], accepted=1, baseline=0.75, reason="the training ended")
    _, text = written(tmp_path, MPruneConfig(max_drop=0.1), run, "accuracy")
    assert text.count("\n# ") == 0 and text.startswith("# ")
    assert run_table(read(BEFORE, FIRST, SECOND), "accuracy") in text
    for part in (
        "1 of 1 prunings accepted, 2 attempts",
        "(the training ended)",
        "accuracy against a baseline of 0.75, max_drop 0.1",
    ):
        assert part in text
    lines = [line for line in text.splitlines() if line.startswith("- pruning")]
    for part in ("pruning 1 (k=2, step 16) removed encoder: 1, 3; decoder: 4", f"rolled back: {FIRST['reason']}."):
        assert part in lines[0]
    assert "k=3, step 24) removed encoder: 1:" in lines[1]
    assert lines[1].endswith("no verdict yet.")
    assert len(lines) == 2


@pytest.mark.parametrize(("baseline", "shown"), [(None, "not known yet"), (0.0, "baseline of 0,")])
def test_baseline_that_is_not_known_is_said_and_zero_is_one(tmp_path, baseline, shown):
    _, text = written(tmp_path, MPruneConfig(max_drop=0), progress([BEFORE], baseline=baseline), "loss")
    assert shown in text
    assert "0 of 1 prunings accepted, 0 attempts" in text
    assert "max_drop 0." in text


def test_without_a_gate_no_gate_is_told(tmp_path):
    data, text = written(
        tmp_path, MPruneConfig(), progress([BEFORE, {**SECOND, "decision": "accepted"}], accepted=1), None
    )
    assert data["metric"] is None
    assert "Gate" not in text
    assert "max_drop" not in text
    assert "None" not in text


def test_a_report_is_replaced_whole_and_not_lost_in_a_crash(tmp_path):
    written(tmp_path, MPruneConfig(), progress([BEFORE, FIRST]), None)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    with pytest.raises(TypeError):  # a figure that JSON does not know
        write_run_report(tmp_path, MPruneConfig(), progress([{**BEFORE, "training_seconds": object()}]), None)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before
    data, text = written(tmp_path, MPruneConfig(), progress([BEFORE]), None)
    assert data["attempts"] == [BEFORE]
    assert "pruning 1" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_leave_the_report_strict_json(tmp_path, value):
    # a metric that is NaN is just what a pruning that failed gives; NaN is no JSON, and other readers than Python's
    # refuse it
    run = progress([{**BEFORE, "evaluations": [evaluation(8, 1.0, loss=value)]}])
    write_run_report(tmp_path, MPruneConfig(), run, None)

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    json.loads((tmp_path / f"{RUN_REPORT}.json").read_text("utf-8"), parse_constant=refuse)


def test_structure_count_the_model_as_it_is():
    model = ZOO["t5"].model()
    names = {"encoder.block": 4, "decoder.block": 3}
    assert structure_of(model) == {"blocks": names, "parameters": sum(p.numel() for p in model.parameters())}
    gone = sum(p.numel() for p in model.encoder.block[2].parameters())
    whole = structure_of(model)["parameters"]
    remove_blocks(model, {"encoder.block": [2]})
    assert structure_of(model) == {"blocks": {**names, "encoder.block": 3}, "parameters": whole - gone}


def test_structure_count_what_a_user_has_put_around_the_model():
    model = nn.Sequential(ZOO["t5"].model(), nn.Linear(7, 3))
    whole = sum(p.numel() for p in model.parameters())
    assert structure_of(model)["parameters"] == structure_of(model, describe(model))["parameters"] == whole


# --- logs -------------------------------------------------------------------------------------------------------------

FIGURES = {"pruning_k": 2, "pruning_blocks": 9, "pruning_drop": -0.125}


def session_of(args, state):
    return Session(args, state, TrainerControl(), {"model": torch.nn.Linear(1, 1)})


def events_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def test_figures_join_the_log_history_without_any_tracker(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    state = TrainerState(global_step=24, epoch=3.0)
    state.log_history = [{"loss": 1.0, "step": 20}]
    session_of(args, state).log(FIGURES)
    assert state.log_history == [{"loss": 1.0, "step": 20}, {**FIGURES, "epoch": 3.0, "step": 24}]
    assert list(tmp_path.rglob("events*")) == []


def test_figures_before_the_first_epoch_have_no_epoch(tmp_path):
    state = TrainerState(global_step=0, epoch=None)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    session_of(args, state).log(FIGURES)
    assert state.log_history == [{**FIGURES, "step": 0}]
    assert FIGURES == {"pruning_k": 2, "pruning_blocks": 9, "pruning_drop": -0.125}


@pytest.mark.parametrize("chosen", [True, False], ids=["folder chosen", "default folder"])
def test_tensorboard_gets_the_figures_where_the_training_writes_its_own(tmp_path, monkeypatch, chosen):
    pytest.importorskip("tensorboard")
    from transformers.integrations import TensorBoardCallback

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    elsewhere = tmp_path / "working directory"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    if chosen:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="tensorboard")
    state, control = TrainerState(global_step=24, epoch=3.0), TrainerControl()
    own = TensorBoardCallback()  # the Trainer's
    own.on_train_begin(args, state, control)
    own.on_log(args, state, control, logs={"loss": 0.5})
    session = session_of(args, state)
    session.log(FIGURES)
    state.global_step = 32
    session.log({"pruning_k": 3})
    own.on_train_end(args, state, control)
    folder = tmp_path / "board" if chosen else tmp_path / "out"
    found = events_in(folder)
    assert found["train/loss"] == [(24, 0.5)]
    figures = {re.sub("^train/", "", tag): values for tag, values in found.items() if "pruning" in tag}
    assert figures == {
        "pruning_k": [(24, 2.0), (32, 3.0)],
        "pruning_blocks": [(24, 9.0)],
        "pruning_drop": [(24, -0.125)],
    }
    assert list(elsewhere.iterdir()) == []
