"""A retraining's learning rates are those of a training of its own, on the Trainer's scheduler object; a resumed one
goes on with them.

The reference is always transformers' own `get_scheduler` on an optimizer that never saw another schedule.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import transformers
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR
from transformers import TrainingArguments, get_scheduler

from deeparc_hf.errors import DeepArcWarning
from deeparc_hf.trainer.learning_rate import is_trainers_own, resume_rewound, rewind, warmup_steps

RATE = 1e-3
RATES = (RATE, 3e-4, 0.02)  # of the parameter groups
WHOLE, STEPS = 40, 12

SCHEDULES = {
    "linear": ("linear", {"warmup_steps": 3}, {}),
    "linear, a share of the steps": ("linear", {"warmup_steps": 0.25}, {}),
    "linear, no warm-up": ("linear", {}, {}),
    "cosine": ("cosine", {"warmup_steps": 2}, {}),
    "cosine_with_restarts": ("cosine_with_restarts", {"warmup_steps": 1}, {"num_cycles": 3}),
    "polynomial": ("polynomial", {"warmup_steps": 2}, {"power": 2.0}),
    "polynomial to an end": ("polynomial", {"warmup_steps": 2}, {"lr_end": 5e-4}),
    "constant": ("constant", {}, {}),
    "constant_with_warmup": ("constant_with_warmup", {"warmup_steps": 4}, {}),
    "inverse_sqrt": ("inverse_sqrt", {"warmup_steps": 2}, {}),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"warmup_steps": 2}, {"min_lr": 1e-4}),
    "cosine_with_min_lr, a share": ("cosine_with_min_lr", {"warmup_steps": 2}, {"min_lr_rate": 0.1}),
    "cosine_warmup_with_min_lr": ("cosine_warmup_with_min_lr", {"warmup_steps": 2}, {"min_lr": 1e-4}),
    "warmup_stable_decay": ("warmup_stable_decay", {"warmup_steps": 2}, {"num_decay_steps": 4, "min_lr_ratio": 0.1}),
}


def arguments(folder, name="linear"):
    kind, warmup, extra = SCHEDULES[name]
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        learning_rate=RATE,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=extra,
        report_to="none",
        **warmup,
    )


def optimizer():
    """Three groups with rates of their own; the default rate is the Trainer's, as the Trainer makes it."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in RATES]
    return torch.optim.AdamW(groups, lr=RATE)


def scheduled(args, name, steps):
    kind, warmup, extra = SCHEDULES[name]
    count = warmup.get("warmup_steps", 0)
    count = math.ceil(count * steps) if count < 1 else count
    made = optimizer()
    return made, get_scheduler(
        kind, made, num_warmup_steps=count, num_training_steps=steps, scheduler_specific_kwargs=extra
    )


def go(made, scheduler, steps):
    """The rates of so many optimizer steps, as they are when each is made."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in made.param_groups])
        made.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("done", [0, 7, 33])
def test_a_rewound_schedule_is_that_of_a_training_of_its_own(tmp_path, name, done):
    args = arguments(tmp_path, name)
    made, scheduler = scheduled(args, name, WHOLE)
    go(made, scheduler, done)
    assert rewind(scheduler, args, STEPS, own=True) is True
    assert scheduler.get_last_lr() == [group["lr"] for group in made.param_groups]  # what the Trainer logs
    expected = go(*scheduled(args, name, STEPS), STEPS)
    assert go(made, scheduler, STEPS) == expected


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_the_reference_tells_schedules_apart(tmp_path, name):
    # without this a schedule that was not rewound at all could pass the test above
    args = arguments(tmp_path, name)
    made, scheduler = scheduled(args, name, WHOLE)
    go(made, scheduler, 7)
    assert go(made, scheduler, STEPS) != go(*scheduled(args, name, STEPS), STEPS)


def test_rewinding_twice_starts_twice(tmp_path):
    args = arguments(tmp_path)
    made, scheduler = scheduled(args, "linear", WHOLE)
    for steps in (STEPS, 5):
        go(made, scheduler, 4)
        rewind(scheduler, args, steps, own=True)
    assert go(made, scheduler, 5) == go(*scheduled(args, "linear", 5), 5)


def test_rewinding_moves_no_parameter_and_keeps_state_and_groups(tmp_path):
    args = arguments(tmp_path)
    made, scheduler = scheduled(args, "linear", WHOLE)
    for group in made.param_groups:
        group["params"][0].grad = torch.ones(2)
    go(made, scheduler, 3)
    before = copy.deepcopy(made.state_dict()["state"])
    held = [(id(group), group["params"][0]) for group in made.param_groups]
    values = [parameter.detach().clone() for _, parameter in held]
    rewind(scheduler, args, STEPS, own=True)
    assert len(before) == 3
    torch.testing.assert_close(made.state_dict()["state"], before, rtol=0, atol=0)
    assert [(id(group), group["params"][0]) for group in made.param_groups] == held
    assert all(torch.equal(parameter, value) for (_, parameter), value in zip(held, values, strict=True))
    assert scheduler.optimizer is made


# --- lengths in steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "steps", "whole", "expected"),
    [
        (3, 12, 40, 3),
        (6, 12, 40, 6),
        (7, 12, 40, 2),  # its share of the whole training
        (10, 12, 40, 3),
        (39, 12, 40, 6),  # half at most
        (100, 12, 40, 6),
        (100, 1, 40, 0),
        (0.25, 12, 40, 3),
        (0.75, 12, 40, 9),  # a share is a share
        (100, 40, None, 100),
        (0, 12, 40, 0),
    ],
)
def test_a_warm_up_that_does_not_fit_is_shortened_in_proportion(tmp_path, given, steps, whole, expected):
    args = TrainingArguments(str(tmp_path), use_cpu=True, warmup_steps=given, report_to="none")
    assert warmup_steps(args, steps, whole) == expected


LONG = {"linear": {}, "cosine": {}, "warmup_stable_decay": {"num_decay_steps": 16}}


@pytest.mark.parametrize("kind", LONG)
def test_every_retraining_reaches_its_rate_and_decays(tmp_path, kind):
    given = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": LONG[kind], "warmup_steps": 16}
    args = TrainingArguments(str(tmp_path), use_cpu=True, learning_rate=RATE, report_to="none", **given)
    made = optimizer()
    scheduler = get_scheduler(
        kind, made, num_warmup_steps=16, num_training_steps=WHOLE, scheduler_specific_kwargs=LONG[kind]
    )
    assert is_trainers_own(scheduler, args, WHOLE)
    rewind(scheduler, args, STEPS, own=True, whole=WHOLE)
    rates = [group[0] for group in go(made, scheduler, STEPS)]
    assert max(rates) == RATE and rates[0] == 0 and rates[-1] < 0.5 * RATE
    again = get_scheduler(
        kind, optimizer(), num_warmup_steps=16, num_training_steps=WHOLE, scheduler_specific_kwargs=LONG[kind]
    )
    resume_rewound(again, args, STEPS, 5, own=True, whole=WHOLE)
    assert again.get_last_lr()[0] == rates[5]


# --- schedulers of the user -------------------------------------------------------------------------------------------


class Steps:
    """A factor by step, as an object."""

    def __call__(self, step):
        return 0.5**step


@pytest.mark.parametrize("factor", [lambda step: 1 / (1 + step), Steps()], ids=["function", "object"])
def test_a_users_lambda_starts_again_at_its_own_step_zero(tmp_path, factor):
    made = optimizer()
    scheduler = LambdaLR(made, factor)
    first = go(made, scheduler, 6)
    assert rewind(scheduler, arguments(tmp_path), STEPS, own=False) is True
    assert scheduler.get_last_lr() == first[0]
    assert go(made, scheduler, 6) == first
    assert first[5] == [rate * factor(5) for rate in RATES]


def test_a_users_lambdas_by_group_stay_with_their_groups(tmp_path):
    made = optimizer()
    scheduler = LambdaLR(made, [lambda step: 1 + step, lambda step: 1 / (1 + step), lambda step: 1.0])
    first = go(made, scheduler, 4)
    rewind(scheduler, arguments(tmp_path), STEPS, own=False)
    assert go(made, scheduler, 4) == first
    assert len({tuple(rates) for rates in first}) == 4


@pytest.mark.parametrize(
    "make",
    [
        lambda made: ReduceLROnPlateau(made, factor=0.5, patience=0),
        lambda made: CosineAnnealingLR(made, 20),
        lambda made: StepLR(made, 2),
    ],
    ids=["plateau", "cosine annealing", "steps"],
)
def test_another_scheduler_warns_by_its_name_and_goes_on_as_it_was(tmp_path, make):
    made, other = optimizer(), optimizer()
    scheduler, untouched = make(made), make(other)
    metric = (1.0,) if isinstance(scheduler, ReduceLROnPlateau) else ()

    def steps(target, its):
        found = []
        for _ in range(5):
            target.step()
            its.step(*metric)
            found.append([group["lr"] for group in target.param_groups])
        return found

    assert steps(made, scheduler) == steps(other, untouched)
    state = copy.deepcopy(scheduler.state_dict())
    with pytest.warns(DeepArcWarning, match=rf"for a {type(scheduler).__name__}: it goes on.*rewind_lr=False"):
        assert rewind(scheduler, arguments(tmp_path), STEPS, own=False) is False
    assert scheduler.state_dict() == state
    resume_rewound(scheduler, arguments(tmp_path), STEPS, 3, own=False)
    assert scheduler.state_dict() == state
    rates = steps(made, scheduler)
    assert rates == steps(other, untouched)
    assert rates[-1] != list(RATES)


def test_no_scheduler_is_no_matter(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rewind(None, arguments(tmp_path), STEPS, own=False) is False
        resume_rewound(None, arguments(tmp_path), STEPS, 3, own=False)


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("position", [0, 1, 5, STEPS - 1])
def test_a_saved_retraining_goes_on_with_the_same_rates(tmp_path, name, position):
    args = arguments(tmp_path, name)
    made, scheduler = scheduled(args, name, WHOLE)
    go(made, scheduler, 9)
    rewind(scheduler, args, STEPS, own=True)
    go(made, scheduler, position)
    files = tmp_path / "optimizer.pt", tmp_path / "scheduler.pt"
    for target, file in zip((made, scheduler), files, strict=True):
        torch.save(target.state_dict(), file)
    # as the Trainer resumes: a schedule of the whole training, whose state is then loaded
    again, fresh = scheduled(args, name, WHOLE)
    for target, file in zip((again, fresh), files, strict=True):
        target.load_state_dict(torch.load(file, weights_only=False))
    resume_rewound(fresh, args, STEPS, position, own=True)
    left = STEPS - position
    assert go(again, fresh, left) == go(made, scheduler, left) == go(*scheduled(args, name, STEPS), STEPS)[position:]


@pytest.mark.parametrize("name", ["linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("position", [0, 1, 5])
def test_position_counts_where_no_state_was_loaded(tmp_path, name, position):
    args = arguments(tmp_path, name)
    again, fresh = scheduled(args, name, WHOLE)
    resume_rewound(fresh, args, STEPS, position, own=True)
    expected = go(*scheduled(args, name, STEPS), STEPS)
    assert fresh.get_last_lr() == expected[position]
    assert go(again, fresh, STEPS - position) == expected[position:]


def test_position_does_not_count_beside_a_loaded_state(tmp_path):
    args = arguments(tmp_path)
    made, scheduler = scheduled(args, "linear", STEPS)
    go(made, scheduler, 4)
    again, fresh = scheduled(args, "linear", WHOLE)
    again.load_state_dict(made.state_dict())
    fresh.load_state_dict(scheduler.state_dict())
    resume_rewound(fresh, args, STEPS, 9, own=True)
    assert go(again, fresh, STEPS - 4) == go(*scheduled(args, "linear", STEPS), STEPS)[4:]


def test_a_users_lambda_goes_on_where_it_was(tmp_path):
    made = optimizer()
    scheduler = LambdaLR(made, lambda step: 1 / (1 + step))
    go(made, scheduler, 8)
    rewind(scheduler, arguments(tmp_path), STEPS, own=False)
    first = go(made, scheduler, 6)
    again = optimizer()
    fresh = LambdaLR(again, lambda step: 1 / (1 + step))
    resume_rewound(fresh, arguments(tmp_path), STEPS, 4, own=False)
    assert go(again, fresh, 2) == first[4:]


# --- whose it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_trainers_own_schedule_is_known(tmp_path, name):
    args = arguments(tmp_path, name)
    made, scheduler = scheduled(args, name, WHOLE)
    assert is_trainers_own(scheduler, args, WHOLE)
    go(made, scheduler, 3)
    assert is_trainers_own(scheduler, args, WHOLE)


def test_what_the_user_made_with_helpers_of_transformers_is_the_users(tmp_path):
    args = arguments(tmp_path)  # linear
    made = optimizer()
    assert not is_trainers_own(transformers.get_constant_schedule(made), args, WHOLE)
    assert not is_trainers_own(transformers.get_linear_schedule_with_warmup(made, 5, WHOLE), args, WHOLE)
    assert not is_trainers_own(LambdaLR(made, lambda step: 1.0), args, WHOLE)
    assert not is_trainers_own(torch.optim.lr_scheduler.StepLR(made, 1), args, WHOLE)
    assert not is_trainers_own(None, args, WHOLE)
