"""The schedule: how long a training must be, and what may change where it is resumed."""

from __future__ import annotations

import re

import pytest

from deeparc_hf import MPruneConfig
from deeparc_hf.errors import ConfigError
from deeparc_hf.trainer.machine import Phase, Progress
from deeparc_hf.trainer.schedule import check_epochs, needed_epochs, refuse_changes

GATE = {"max_drop": 0.1, "threshold": 0.98}
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


# --- resuming ---------------------------------------------------------------------------------------------------------

BEGAN = Progress(k=2, phase=Phase.RETRAINING, accepted=1, steps_per_epoch=8)


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
        refuse_changes(MPruneConfig().to_dict(), MPruneConfig(**settings), BEGAN, steps)


def test_other_changes_are_told():
    began, now = MPruneConfig(max_drop=0.1, num_blocks=3), MPruneConfig(max_drop=0.2, num_blocks=2)
    assert refuse_changes(began.to_dict(), now, BEGAN, 8) == {"max_drop": "0.1 -> 0.2", "num_blocks": "3 -> 2"}
    assert refuse_changes(now.to_dict(), now, BEGAN, 8) == {}
