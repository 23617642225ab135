"""The schedule and the gate: how long a training must be, and which prunings stay. Metrics and verdicts are planted."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from deeparc_hf import MPruneConfig
from deeparc_hf.errors import ConfigError, RecordError
from deeparc_hf.reports.phases import BEFORE, FINISHED, RETRAINING
from deeparc_hf.trainer.schedule import Progress, check_epochs, find_metric, judge, needed_epochs, refuse_changes

GATE = {"max_drop": 0.1}
PER_EPOCH = 8


def message(config, max_steps, per_epoch=PER_EPOCH, by_steps=False):
    with pytest.raises(ConfigError) as caught:
        check_epochs(config, max_steps, per_epoch, by_steps)
    return str(caught.value)


# --- length -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "epochs"),
    [
        ({}, 3),
        ({"retrain_epochs": 1}, 1),
        ({"start_epoch": 2}, 5),
        ({"start_epoch": 2, "iterations": 4, "retrain_epochs": 5}, 22),
        ({"start_epoch": 1, "num_blocks": [6, 4, 2], "retrain_epochs": 2}, 7),
        (
            {"iterations": 2, "k_max": 9, **GATE},
            6,
        ),  # prunings that are taken back need more, but nobody can know how many
    ],
    ids=str,
)
def test_needed_epochs_are_those_of_a_run_that_accepts_everything(settings, epochs):
    assert needed_epochs(MPruneConfig(**settings)) == epochs


@pytest.mark.parametrize("gate", [{}, GATE], ids=["free", "gated"])
@pytest.mark.parametrize("per_epoch", [1, 3, 100])
@pytest.mark.parametrize("start", [0, 2])
def test_by_epochs_the_whole_schedule_must_fit(gate, per_epoch, start):
    config = MPruneConfig(start_epoch=start, iterations=2, retrain_epochs=3, **gate)
    whole = (start + 6) * per_epoch
    check_epochs(config, whole, per_epoch, by_steps=False)
    check_epochs(config, whole + 1, per_epoch, by_steps=False)
    text = message(config, whole - 1, per_epoch)
    assert f"needs {start + 6} epochs (" in text
    assert f"num_train_epochs={start + 6} in TrainingArguments" in text


def test_message_says_what_is_needed_and_given_and_what_to_lower():
    text = message(MPruneConfig(start_epoch=1, iterations=2, retrain_epochs=4), 28)
    for part in (
        "needs 9 epochs",
        "start_epoch 1",
        "2 x retrain_epochs 4",
        "has 3.5 (of 8 steps each)",
        "lower start_epoch, iterations",
    ):
        assert part in text
    assert "max_steps" not in text


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        # free: the last retraining lasts to the end, so one step of it is enough
        ({"start_epoch": 2, "iterations": 2, "retrain_epochs": 3}, 5 * PER_EPOCH + 1),
        ({"start_epoch": 2}, 2 * PER_EPOCH + 1),
        ({}, 1),
        # gated: the last retraining is judged at its end
        ({"start_epoch": 2, "iterations": 2, "retrain_epochs": 3, **GATE}, 8 * PER_EPOCH),
        (GATE, 3 * PER_EPOCH),
    ],
    ids=str,
)
def test_by_steps_the_last_retraining_may_be_shorter_unless_it_is_judged(settings, least):
    config = MPruneConfig(**settings)
    check_epochs(config, least, PER_EPOCH, by_steps=True)
    if least > 1:
        text = message(config, least - 1, by_steps=True)
        assert f"max_steps={least} in TrainingArguments" in text
        assert f"needs {least // PER_EPOCH} epochs" in text
        assert ("and a step more" in text) == ("the last of which may be shorter" in text) == (not config.gated)
        assert "num_train_epochs" not in text


@pytest.mark.parametrize("gate", [{}, GATE], ids=["free", "gated"])
@pytest.mark.parametrize("by_steps", [False, True])
@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("iterations", [1, 3])
def test_what_the_message_advises_is_just_enough(gate, by_steps, start, iterations):
    config = MPruneConfig(start_epoch=start, iterations=iterations, retrain_epochs=2, **gate)
    text = message(config, 1, by_steps=by_steps)
    advised = int(re.search(r"(?:max_steps|num_train_epochs)=(\d+)", text)[1])
    steps = advised if by_steps else advised * PER_EPOCH
    check_epochs(config, steps, PER_EPOCH, by_steps)
    message(config, steps - 1, by_steps=by_steps)


def test_data_without_length_allows_one_pruning_at_the_start():
    check_epochs(MPruneConfig(), 5, None, by_steps=True)
    check_epochs(MPruneConfig(retrain_epochs=50), 5, None, by_steps=True)


@pytest.mark.parametrize("settings", [{"start_epoch": 1}, {"iterations": 2}, {"num_blocks": [3, 2]}, GATE], ids=str)
def test_data_without_length_allows_nothing_else(settings):
    text = message(MPruneConfig(**settings), 10**6, None, by_steps=True)
    for part in ("no length", "start_epoch=0, iterations=1, no max_drop"):
        assert part in text


# --- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["accuracy", "eval_accuracy"])
def test_metric_is_found_with_and_without_the_trainers_prefix(name):
    assert find_metric({"eval_loss": 2.0, "eval_accuracy": 0.75, "accuracy": 0.1}, name) == 0.75


def test_metric_that_is_not_there_is_none_and_zero_is_a_value():
    assert find_metric({"eval_loss": 2.0, "accuracy": 0.5}, "accuracy") is None
    assert find_metric({}, "loss") is None
    found = find_metric({"eval_loss": 0}, "loss")
    assert (found, type(found)) == (0.0, float)


@pytest.mark.parametrize(
    ("baseline", "value", "greater", "accepted", "drop"),
    [
        (0.75, 0.875, True, True, -0.125),
        (0.75, 0.75, True, True, 0.0),
        (0.75, 0.625, True, True, 0.125),
        (0.75, 0.5, True, True, 0.25),  # exactly max_drop
        (0.75, 0.4999, True, False, 0.2501),
        (2.0, 1.0, False, True, -1.0),
        (2.0, 2.25, False, True, 0.25),
        (2.0, 2.2501, False, False, 0.2501),
        (-1.0, -1.25, True, True, 0.25),
        (-1.0, -0.5, False, False, 0.5),
    ],
)
def test_verdicts_in_both_directions(baseline, value, greater, accepted, drop):
    verdict = judge(MPruneConfig(max_drop=0.25), "score", baseline, value, greater)
    assert verdict.accepted is accepted
    assert verdict.drop == pytest.approx(drop)


@pytest.mark.parametrize(("baseline", "value"), [(0.9, 0.8), (0.8, 0.7), (0.95, 0.85), (0.6, 0.5)])
@pytest.mark.parametrize("greater", [True, False])
def test_a_drop_of_max_drop_in_decimal_figures_is_accepted(baseline, value, greater):
    # 0.8 - 0.7 is a little more than 0.1 in binary: the reason would say "worse by 0.1 (only a drop of up to 0.1 is
    # allowed)"
    pair = (baseline, value) if greater else (value, baseline)
    assert judge(MPruneConfig(max_drop=0.1), "score", *pair, greater).accepted


def test_max_drop_of_zero_allows_no_loss_at_all():
    config = MPruneConfig(max_drop=0)
    assert judge(config, "loss", 1.0, 1.0, False).accepted
    assert not judge(config, "loss", 1.0, 1.001, False).accepted


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("greater", [True, False])
def test_a_metric_that_is_not_finite_is_rejected(value, greater):
    assert not judge(MPruneConfig(max_drop=1e9), "loss", 1.0, value, greater).accepted


@pytest.mark.parametrize("greater", [True, False])
def test_a_baseline_that_is_nan_accepts_nothing(greater):
    assert not judge(MPruneConfig(max_drop=1e9), "loss", math.nan, 1.0, greater).accepted


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_reason_does_not_call_a_metric_better_that_is_not_finite(value):
    assert "better" not in judge(MPruneConfig(max_drop=0.1), "accuracy", 0.9, value, True).reason


def test_reason_tells_the_figures_and_the_bound():
    worse = judge(MPruneConfig(max_drop=0.05), "accuracy", 0.9, 0.6, True).reason
    for part in ("accuracy", "from 0.9 to 0.6", "worse by 0.3", "only a drop of up to 0.05 is allowed"):
        assert part in worse
    better = judge(MPruneConfig(max_drop=0.05), "loss", 0.9, 0.6, False).reason
    for part in ("loss", "better by 0.3", "(a drop of up to 0.05 is allowed)"):
        assert part in better


# --- progress ---------------------------------------------------------------------------------------------------------

# no field at its default, so that one which is lost on the way shows
FULL = Progress(
    k=2,
    phase=RETRAINING,
    accepted=1,
    boundary=48,
    pruned_at=24,
    baseline=0.1 + 0.2,
    measured_at=40,
    value=1e-17,
    decision="reject",
    reason="loss went from 1 to 2 \u2014 \u201cworse\u201d",
    stopped=True,
    rewound=[24, 24],
    steps_per_epoch=8,
    start={"stacks": {}},
    base={"stacks": {"enc": {"length": 4, "kept": [0, 1, 3]}}},
    record={"stacks": {"enc": {"length": 4, "kept": [0, 3]}}},
    frozen={"enc": [0]},
    base_frozen={"enc": [1, 2]},
    snapshot="step-24",
    teacher="step-16",
    attempts=[{"name": "before pruning", "evaluations": [{"step": 8, "epoch": 1.0, "metrics": {"eval_loss": 0.5}}]}],
)


def test_the_planted_progress_leaves_no_field_at_its_default():
    fresh = Progress(k=1)
    assert all(getattr(FULL, spec.name) != getattr(fresh, spec.name) for spec in dataclasses.fields(Progress))


@pytest.mark.parametrize(
    "progress", [FULL, Progress(k=1), Progress(k=3, phase=FINISHED)], ids=["full", "fresh", "finished"]
)
def test_round_trip_through_json_text(progress):
    text = json.dumps(progress.to_dict())
    again = Progress.from_dict(json.loads(text))
    assert again == progress
    assert json.dumps(again.to_dict()) == text


def test_a_fresh_progress_waits_for_its_first_pruning():
    progress = Progress(k=1)
    assert (progress.phase, progress.accepted, progress.boundary, progress.stopped) == (BEFORE, 0, 0, False)
    assert len({BEFORE, RETRAINING, FINISHED}) == 3


def test_to_dict_is_a_copy():
    data = FULL.to_dict()
    data["frozen"]["enc"].append(7)
    data["attempts"][0]["evaluations"].clear()
    assert FULL.frozen == {"enc": [0]}
    assert len(FULL.attempts[0]["evaluations"]) == 1


def changed(**entries):
    return {**FULL.to_dict(), **entries}


FOREIGN = {
    "nothing": None,
    "a list": [FULL.to_dict()],
    "a text": json.dumps(FULL.to_dict()),
    "empty": {},
    "another callback's": {"args": {"early_stopping_patience": 3}, "attributes": {}},
    "no version": {key: value for key, value in FULL.to_dict().items() if key != "format_version"},
    "a later version": changed(format_version=2),
    "version as text": changed(format_version="1"),
    "an entry more": changed(colour="red"),
    **{
        f"no {name}": {key: value for key, value in FULL.to_dict().items() if key != name}
        for name in ("k", "phase", "attempts", "snapshot")
    },
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_progress_is_refused_with_advice(data):
    with pytest.raises(
        RecordError, match=r"trainer_state\.json.*another version of deeparc_hf.*Resume with the version that wrote it"
    ):
        Progress.from_dict(data)


@pytest.mark.parametrize(
    ("settings", "steps", "message"),
    [
        ({"k": 2}, 8, "k 1 -> 2"),
        ({"start_epoch": 3}, 8, "start_epoch 0 -> 3"),
        ({"max_drop": 0.1}, 8, "max_drop None -> 0.1"),
        ({"metric": "f1"}, 8, "metric None -> f1"),
        ({}, 4, "optimizer steps of an epoch 8 -> 4"),
    ],
)
def test_what_would_have_led_elsewhere_cannot_change_on_a_resume(settings, steps, message):
    with pytest.raises(ConfigError, match=message):
        refuse_changes(MPruneConfig().to_dict(), MPruneConfig(**settings), FULL, steps)


def test_other_changes_are_told():
    began, now = MPruneConfig(max_drop=0.1, num_blocks=3), MPruneConfig(max_drop=0.2, num_blocks=2)
    assert refuse_changes(began.to_dict(), now, FULL, 8) == {"max_drop": "0.1 -> 0.2", "num_blocks": "3 -> 2"}
    assert refuse_changes(now.to_dict(), now, FULL, 8) == {}
