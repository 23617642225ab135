"""Settings of a training with prunings in it: the schedule, the gate, freezing by name; and plans that keep them in
mind.
"""

from __future__ import annotations

import itertools
import json
import math

import pytest

from deeparc_hf import MPruneConfig, PruningPlan
from deeparc_hf.cli import main
from deeparc_hf.errors import ConfigError, PlanError
from deeparc_hf.pruning.plan import ComparedStack, make_plan

DEFAULTS = {
    "k_max": 3,
    "iterations": 1,
    "start_epoch": 0,
    "retrain_epochs": 3,
    "metric": None,
    "greater_is_better": None,
    "max_drop": None,
    "baseline": None,
    "rewind_lr": True,
}
FULL = {
    "k_max": 5,
    "iterations": 3,
    "start_epoch": 2,
    "retrain_epochs": 4,
    "metric": "eval_f1",
    "greater_is_better": False,
    "max_drop": 0.01,
    "baseline": 0.9,
    "rewind_lr": False,
    "freeze": ("enc.0", "enc.[23]"),
    "num_blocks": (6, {"enc": 3, "dec": 2}, 4),
}


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_defaults(name, value):
    found = getattr(MPruneConfig(), name)
    assert (found, type(found)) == (value, type(value))


def test_lists_are_taken_as_lists_and_held_as_tuples():
    config = MPruneConfig(freeze=["a.*", "b.1"], num_blocks=[4, {"a": 2}])
    assert config.freeze == ("a.*", "b.1")
    assert config.num_blocks == (4, {"a": 2})
    assert (config.target, config.threshold) == ("num_blocks", None)


@pytest.mark.parametrize("value", ["none", "partial", "record", ["enc.1"], ("enc.1",), []], ids=str)
def test_freeze_takes_a_word_or_patterns(value):
    assert MPruneConfig(freeze=value).freeze == (value if isinstance(value, str) else tuple(value))


@pytest.mark.parametrize("max_drop", [None, 0, 0.5])
def test_gate_is_on_where_max_drop_is_set_even_to_zero(max_drop):
    assert MPruneConfig(max_drop=max_drop).gated is (max_drop is not None)


@pytest.mark.parametrize(
    "settings", [{"baseline": 0.0}, {"baseline": -3}, {"greater_is_better": False}, {"metric": "f1"}], ids=str
)
def test_what_the_gate_needs_is_taken_with_the_gate(settings):
    config = MPruneConfig(max_drop=0.1, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


BAD = [
    ({"k_max": 0}, ["k_max must be at least 1", "found 0"]),
    ({"k_max": 2.0}, ["k_max must be int", "2.0"]),
    ({"k_max": None}, ["k_max must be int", "None"]),
    ({"iterations": 0}, ["iterations must be at least 1", "found 0"]),
    ({"iterations": -2}, ["iterations must be at least 1", "-2"]),
    ({"iterations": True}, ["iterations must be int", "True"]),
    ({"iterations": "2"}, ["iterations must be int", "'2'"]),
    ({"start_epoch": -1}, ["start_epoch at least 0", "-1"]),
    ({"start_epoch": 0.5}, ["start_epoch must be int", "0.5"]),
    ({"retrain_epochs": 0}, ["retrain_epochs must be at least 1", "found 0"]),
    ({"retrain_epochs": 1.5}, ["retrain_epochs must be int", "1.5"]),
    ({"metric": 3}, ["metric must be", "str", "3"]),
    ({"greater_is_better": 1, "max_drop": 0.1}, ["greater_is_better must be", "bool", "found 1"]),
    ({"max_drop": -0.1}, ["max_drop must be 0 or more", "-0.1"]),
    ({"max_drop": "1%"}, ["max_drop must be", "float", "'1%'"]),
    ({"max_drop": True}, ["max_drop must be", "float", "True"]),
    ({"max_drop": math.nan}, ["max_drop must be", "nan"]),
    ({"max_drop": math.inf}, ["max_drop must be", "inf"]),
    ({"baseline": math.nan, "max_drop": 0.1}, ["baseline must be", "nan"]),
    ({"baseline": 0.9}, ["baseline is of use only with max_drop", "leave baseline out"]),
    ({"greater_is_better": True}, ["greater_is_better is of use only with max_drop"]),
    ({"rewind_lr": 1}, ["rewind_lr must be bool", "found 1"]),
    ({"rewind_lr": None}, ["rewind_lr must be bool", "None"]),
    ({"freeze": "records"}, ["freeze must be one of 'none', 'partial', 'record'", "Did you mean 'record'?"]),
    ({"freeze": 3}, ["freeze must be", "a list of str", "3"]),
    ({"freeze": ["enc.0", 3]}, ["freeze must be", "a list of str", "3"]),
    ({"num_blocks": []}, ["num_blocks", "at least 1"]),
    ({"num_blocks": [4, 0]}, ["num_blocks", "at least 1", "0"]),
    ({"num_blocks": [4, {}]}, ["num_blocks", "at least 1"]),
    ({"num_blocks": [4, {"enc": 0}]}, ["num_blocks", "at least 1", "enc"]),
    ({"num_blocks": [4, "3"]}, ["num_blocks must be", "'3'"]),
    ({"num_blocks": [4, 2.5]}, ["num_blocks must be", "2.5"]),
    ({"num_blocks": [4, True]}, ["num_blocks must be", "True"]),
    ({"num_blocks": [4, [3]]}, ["num_blocks must be", "[3]"]),
    ({"num_blocks": [4, 3], "iterations": 3}, ["num_blocks lists 2 targets for 3 iterations", "one for each"]),
    ({"num_blocks": [4, 3], "threshold": 0.9}, ["Exactly one of", "threshold and num_blocks"]),
]


@pytest.mark.parametrize(("settings", "parts"), BAD, ids=[str(settings) for settings, _ in BAD])
def test_bad_values_are_refused_with_their_names(settings, parts):
    with pytest.raises(ConfigError) as caught:
        MPruneConfig(**settings)
    for part in parts:
        assert part in str(caught.value)


# --- iterations -------------------------------------------------------------------------------------------------------


def test_a_list_of_targets_sets_the_number_of_iterations():
    assert MPruneConfig(num_blocks=[6]).iterations == 1
    assert MPruneConfig(num_blocks=[6, 4, 2]).iterations == 3
    assert MPruneConfig(num_blocks=[6, 4, 2], iterations=3).iterations == 3


def test_each_iteration_has_its_own_target_and_all_else_in_common():
    config = MPruneConfig(**FULL)
    for iteration, target in enumerate(FULL["num_blocks"]):
        one = config.for_iteration(iteration)
        assert one.num_blocks == target
        assert one.replace(num_blocks=FULL["num_blocks"], iterations=3) == config


@pytest.mark.parametrize(
    "settings", [{"iterations": 4}, {"num_blocks": 3, "iterations": 2}, {"keep_ratio": 0.5}], ids=str
)
def test_without_a_list_every_iteration_has_the_same_settings(settings):
    config = MPruneConfig(**settings)
    assert all(config.for_iteration(iteration) == config for iteration in range(3))


def test_replace_keeps_lists_and_checks_them():
    config = MPruneConfig(num_blocks=[6, 4], freeze=["enc.0"])
    assert config.replace(k=2) == MPruneConfig(num_blocks=[6, 4], freeze=["enc.0"], k=2)
    # the list brought its iterations along
    assert config.replace(threshold=0.9) == MPruneConfig(threshold=0.9, freeze=["enc.0"])
    assert config.replace(freeze=["enc.1"]).freeze == ("enc.1",)
    with pytest.raises(ConfigError, match="2 targets for 5 iterations"):
        config.replace(iterations=5)
    with pytest.raises(ConfigError, match="baseline is of use only with max_drop"):
        MPruneConfig(max_drop=0.1, baseline=0.5).replace(max_drop=None)


@pytest.mark.parametrize(
    "settings", [FULL, {"freeze": "record"}, {"freeze": []}, {"max_drop": 0}, {"num_blocks": [3]}], ids=str
)
def test_round_trip_as_dict_and_as_text(settings, tmp_path):
    config = MPruneConfig(**settings)
    data = config.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert MPruneConfig.from_dict(data) == config
    assert MPruneConfig.from_json(config.to_json()) == config
    (tmp_path / "config.json").write_text(config.to_json(), "utf-8")
    assert MPruneConfig.from_json(tmp_path / "config.json") == config


def test_to_dict_is_a_copy_of_the_lists_too():
    config = MPruneConfig(**FULL)
    data = config.to_dict()
    data["num_blocks"][1]["enc"] = 99
    data["freeze"].append("more")
    assert config == MPruneConfig(**FULL)
    assert config.num_blocks[1] == {"enc": 3, "dec": 2}


# --- plans ------------------------------------------------------------------------------------------------------------


def alike(length, **extra):
    """Blocks that are all 0.99 alike."""
    return ComparedStack(tuple(tuple(1.0 if i == j else 0.99 for j in range(length)) for i in range(length)), **extra)


def unlike(length, **extra):
    return ComparedStack(tuple(tuple(1.0 if i == j else 0.1 for j in range(length)) for i in range(length)), **extra)


def frozen(plan):
    return {name: stack.frozen for name, stack in plan.stacks.items()}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["enc.0"], {"enc": (0,), "dec": ()}),
        (["enc.*"], {"enc": (0, 2, 4), "dec": ()}),  # 1, 3 and 5 go
        (["enc.1", "enc.2"], {"enc": (2,), "dec": ()}),
        (["*.0", "dec.[12]"], {"enc": (0,), "dec": (0, 1, 2)}),
        (["enc.0", "enc.?"], {"enc": (0, 2, 4), "dec": ()}),
        ([], {"enc": (), "dec": ()}),
    ],
    ids=str,
)
def test_patterns_freeze_the_blocks_they_name_that_stay(patterns, expected):
    plan = make_plan({"enc": alike(6), "dec": unlike(3)}, MPruneConfig(freeze=patterns, k=2))
    assert plan.removed == {"enc": (1, 3, 5)}
    assert frozen(plan) == expected
    assert plan.num_frozen == sum(map(len, expected.values()))


def test_pattern_that_matches_nothing_is_an_error_that_names_the_setting():
    with pytest.raises(PlanError, match=r"freeze: 'enc\.9' matches no block.*enc\.0"):
        make_plan({"enc": alike(6)}, MPruneConfig(freeze=["enc.0", "enc.9"]))


def test_record_freezes_what_the_record_froze_and_stays():
    compared = {"enc": alike(6, frozen=(0, 1, 4)), "dec": unlike(3, frozen=(2,))}
    assert frozen(make_plan(compared, MPruneConfig(freeze="record", k=2))) == {"enc": (0, 4), "dec": (2,)}
    assert frozen(make_plan(compared, MPruneConfig(k=2))) == {"enc": (), "dec": ()}
    assert frozen(make_plan(compared, MPruneConfig(freeze=["dec.0"], k=2))) == {"enc": (), "dec": (0,)}


@pytest.mark.parametrize("freeze", ["record", ["enc.*"]], ids=str)
def test_nothing_is_frozen_where_nothing_is_removed(freeze):
    assert frozen(make_plan({"enc": unlike(4, frozen=(0, 1))}, MPruneConfig(freeze=freeze))) == {"enc": ()}


def test_patterns_name_blocks_as_they_were_called_when_the_training_began():
    # blocks 1, 2 and 5 of seven are gone
    compared = {"enc": alike(4, labels=(0, 3, 4, 6))}
    plan = make_plan(compared, MPruneConfig(protect=["enc.4"], freeze=["enc.0", "enc.4"]))
    stack = plan.stacks["enc"]
    assert (stack.protected, stack.removed, stack.frozen) == ((2,), (1, 3), (0, 2))
    # named as now, 3 would be the last one
    assert make_plan(compared, MPruneConfig(protect=["enc.3"])).stacks["enc"].kept == (0, 1)


def test_blocks_that_an_earlier_pruning_removed_may_be_named():
    compared = {"enc": alike(3, labels=(0, 3, 12))}
    plan = make_plan(compared, MPruneConfig(protect=["enc.1"], freeze=["enc.5", "enc.0"]))
    assert (plan.stacks["enc"].protected, plan.stacks["enc"].frozen) == ((), (0,))
    assert make_plan(compared, MPruneConfig(protect=["enc.1*"])).stacks["enc"].protected == (2,)


def test_freezing_beside_the_sites_does_not_follow_labels_or_records():
    compared = {"enc": ComparedStack(alike(4).similarity, labels=(0, 3, 4, 6), frozen=(3,))}
    bare = {"enc": alike(4)}
    settings = MPruneConfig(freeze="partial", num_blocks=3)
    assert frozen(make_plan(compared, settings)) == frozen(make_plan(bare, settings))


def test_a_list_of_targets_makes_no_plan():
    config = MPruneConfig(num_blocks=[5, 4])
    with pytest.raises(PlanError, match=r"num_blocks lists 2 targets.*MPruneCallback.*Give one target"):
        make_plan({"enc": alike(6)}, config)
    assert [make_plan({"enc": alike(6)}, config.for_iteration(i)).num_kept for i in range(2)] == [5, 4]


def planned(**settings):
    compared = {"enc": alike(4, labels=(0, 3, 4, 6), frozen=(0, 2), next_stack="dec"), "dec": alike(3)}
    return make_plan(compared, MPruneConfig(**settings), samples=9)


@pytest.mark.parametrize(
    "settings", [{"freeze": "record"}, {"freeze": ["enc.3", "dec.0"]}, {"freeze": ["enc.99"], "k": 2}], ids=str
)
def test_plans_with_labels_and_frozen_blocks_round_trip(settings, tmp_path):
    plan = planned(**settings)
    again = PruningPlan.from_json(plan.to_json(tmp_path / "plan.json"))
    assert again == plan == PruningPlan.from_json(tmp_path / "plan.json")
    assert (again.stacks["enc"].compared.labels, again.stacks["enc"].compared.frozen) == ((0, 3, 4, 6), (0, 2))
    # what is planned from the file is what would have been planned from the compared
    assert again.replan(protect=["enc.6"], freeze="record", k=2) == planned(protect=["enc.6"], freeze="record", k=2)


def test_a_plan_of_an_earlier_version_has_no_labels():
    data = planned().to_dict()
    for stack in data["stacks"].values():
        del stack["labels"], stack["frozen_before"]
    compared = PruningPlan.from_dict(data).stacks["enc"].compared
    assert (compared.labels, compared.frozen) == ((), ())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *itertools.product(
            ["labels"], [None, [0], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, -3], ["0", "1", "2", "3"], "0123", 5]
        ),
        *itertools.product(["frozen_before"], [None, [4], [-1], [0.0], [True], "01", 2]),
    ],
    ids=str,
)
def test_hostile_labels_and_frozen_blocks_are_refused(key, value):
    data = planned().to_dict()
    data["stacks"]["enc"][key] = value
    with pytest.raises(PlanError):
        PruningPlan.from_dict(json.loads(json.dumps(data)))


# --- command line -----------------------------------------------------------------------------------------------------


def test_the_command_line_does_not_offer_what_only_a_training_can_use(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    offered = {word.strip(",[]") for word in capsys.readouterr().out.split() if word.strip(",[]").startswith("--")}
    assert {"--k", "--freeze", "--threshold", "--num-blocks"} <= offered
    assert not offered & {f"--{name.replace('_', '-')}" for name in DEFAULTS}


@pytest.mark.parametrize("name", DEFAULTS)
def test_the_command_line_refuses_what_only_a_training_can_use(capsys, name):
    with pytest.raises(SystemExit) as stop:
        main(["prune", "model", "--data", "d.csv", "-o", "out", f"--{name.replace('_', '-')}=1"])
    assert stop.value.code == 2
    assert f"--{name.replace('_', '-')}=1" in capsys.readouterr().err


def test_a_list_of_targets_cannot_rise():
    with pytest.raises(ConfigError, match=r"cannot rise, found \[4, 5\]"):
        MPruneConfig(num_blocks=[4, 5])
    assert MPruneConfig(num_blocks=[4, 4]).iterations == 2
