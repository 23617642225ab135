"""MPruneConfig: what is asked for is checked, with messages that say what to write instead."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from deeparc_hf import MPruneConfig
from deeparc_hf.errors import ConfigError, DeepArcWarning
from deeparc_hf.similarity import metrics

TARGETS = ("threshold", "num_blocks", "keep_ratio")
DEFAULTS = {
    "threshold": 0.98,
    "k": 1,
    "freeze": "none",
    "similarity": "cka",
    "linkage": "leader",
    "keep": "leader",
    "calibration_samples": 512,
    "protect": (),
    "min_blocks": 1,
    "num_blocks": None,
    "keep_ratio": None,
}
FULL = MPruneConfig(
    num_blocks={"encoder": 4, "decoder": 2},
    k=2,
    freeze="partial",
    similarity="cosine",
    rows="first",
    linkage="adjacent",
    keep="last",
    calibration_samples=64,
    protect=("encoder.0", "decoder.*"),
    min_blocks=2,
    seed=7,
)


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_defaults(name, value):
    assert getattr(MPruneConfig(), name) == value


@pytest.mark.parametrize("spec", dataclasses.fields(MPruneConfig), ids=lambda spec: spec.name)
def test_every_setting_has_help(spec):
    text = spec.metadata["help"]
    assert len(text) > 10
    assert text.endswith(".")


def test_config_cannot_be_changed_past_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MPruneConfig().threshold = 98


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 1},
        {"threshold": 1.0},
        {"threshold": 1e-6},
        {"k": 9},
        {"keep_ratio": 1},
        {"keep_ratio": 0.01},
        {"num_blocks": 1},
        {"num_blocks": {"encoder": 1}},
        {"rows": "tokens"},
        {"similarity": "cka_biased"},
        {"min_blocks": 3},
        {"protect": ["a.*", "b.1"]},
    ],
    ids=str,
)
def test_good_values_are_taken(settings):
    config = MPruneConfig(**settings)
    for name, value in settings.items():
        assert getattr(config, name) == (tuple(value) if name == "protect" else value)


def test_protect_may_be_one_pattern():
    assert MPruneConfig(protect="encoder.layer.11").protect == ("encoder.layer.11",)


# --- bad values -------------------------------------------------------------------------------------------------------

BAD_VALUES = [
    ("threshold", 98, ["threshold", "(0, 1]", "98", "Did you mean 0.98?"]),
    ("threshold", 99.5, ["99.5", "Did you mean 0.995?"]),
    ("threshold", 0, ["threshold", "(0, 1]", "found 0"]),
    ("threshold", -0.5, ["threshold", "(0, 1]", "-0.5"]),
    ("threshold", 1.0001, ["threshold", "(0, 1]"]),
    ("threshold", 1000, ["threshold", "(0, 1]", "1000"]),
    ("threshold", math.nan, ["threshold", "nan"]),
    ("threshold", math.inf, ["threshold", "inf"]),
    ("max_drop", 10**400, ["max_drop must be a finite number", "a huge number"]),
    ("threshold", "0.9", ["threshold", "float", "'0.9'", "str"]),
    ("threshold", True, ["threshold", "float", "True", "bool"]),
    ("threshold", [0.9], ["threshold", "float", "list"]),
    ("k", 0, ["k must be at least 1", "0"]),
    ("k", -1, ["k must be at least 1", "-1"]),
    ("k", 1.0, ["k must be int", "1.0", "float"]),
    ("k", True, ["k must be int", "True", "bool"]),
    ("k", "1", ["k must be int", "'1'", "str"]),
    ("k", None, ["k must be int", "None"]),
    ("freeze", "part", ["freeze", "'none', 'partial'", "'part'", "Did you mean 'partial'?"]),
    ("freeze", None, ["freeze must be str", "None"]),
    ("freeze", True, ["freeze must be str", "True"]),
    ("similarity", "cka_bias", ["similarity", "'cka_bias'", "Did you mean 'cka_biased'?", "cosine"]),
    ("similarity", "", ["similarity", "cka"]),
    ("similarity", 3, ["similarity must be str", "3"]),
    ("similarity", None, ["similarity must be str", "None"]),
    ("rows", "token", ["rows", "'tokens', 'mean', 'first'", "Did you mean 'tokens'?"]),
    ("rows", 1, ["rows must be", "str", "1"]),
    ("linkage", "adjacen", ["linkage", "'leader', 'adjacent'", "Did you mean 'adjacent'?"]),
    ("linkage", None, ["linkage must be str"]),
    ("keep", "first", ["keep", "'leader', 'last'", "'first'"]),
    ("calibration_samples", 0, ["calibration_samples must be at least 1", "0"]),
    ("calibration_samples", 512.0, ["calibration_samples must be int", "512.0"]),
    ("calibration_samples", True, ["calibration_samples must be int", "True"]),
    ("protect", 5, ["protect", "a list of str", "5"]),
    ("protect", (5,), ["protect", "a list of str", "5"]),
    ("protect", ["a", None], ["protect", "a list of str", "None"]),
    ("protect", None, ["protect", "None"]),
    ("min_blocks", 0, ["min_blocks must be at least 1", "0"]),
    ("min_blocks", -3, ["min_blocks must be at least 1", "-3"]),
    ("min_blocks", 2.0, ["min_blocks must be int", "2.0"]),
    ("num_blocks", 0, ["num_blocks", "at least 1", "0"]),
    ("num_blocks", -4, ["num_blocks", "at least 1", "-4"]),
    ("num_blocks", 4.0, ["num_blocks must be", "int", "4.0"]),
    ("num_blocks", True, ["num_blocks must be", "int", "True"]),
    ("num_blocks", "4", ["num_blocks must be", "int", "'4'"]),
    ("num_blocks", {}, ["num_blocks", "at least 1"]),
    ("num_blocks", {"encoder": 0}, ["num_blocks", "at least 1", "encoder"]),
    ("num_blocks", {"encoder": True}, ["num_blocks must be", "True"]),
    ("num_blocks", {"encoder": 1.5}, ["num_blocks must be", "1.5"]),
    ("num_blocks", {0: 4}, ["num_blocks must be", "0: 4"]),
    ("keep_ratio", 0, ["keep_ratio", "(0, 1]", "0"]),
    ("keep_ratio", 0.0, ["keep_ratio", "(0, 1]"]),
    ("keep_ratio", 75, ["keep_ratio", "(0, 1]", "75", "Did you mean 0.75?"]),
    ("keep_ratio", -0.1, ["keep_ratio", "(0, 1]", "-0.1"]),
    ("keep_ratio", math.nan, ["keep_ratio", "nan"]),
    ("keep_ratio", "half", ["keep_ratio must be", "float", "'half'"]),
    ("keep_ratio", True, ["keep_ratio must be", "True"]),
    ("seed", 1.5, ["seed must be int", "1.5"]),
    ("seed", None, ["seed must be int", "None"]),
]


@pytest.mark.parametrize(
    ("name", "value", "parts"), BAD_VALUES, ids=[f"{name}={value!r}" for name, value, _ in BAD_VALUES]
)
def test_bad_value_is_refused_with_its_name_and_the_good_ones(name, value, parts):
    with pytest.raises(ConfigError) as caught:
        MPruneConfig(**{name: value})
    message = str(caught.value)
    for part in parts:
        assert part in message


def test_no_hint_where_a_percentage_was_not_meant():
    for value in (0, -1, 1000):
        with pytest.raises(ConfigError) as caught:
            MPruneConfig(threshold=value)
        assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [{"threshold": 0.9, "num_blocks": 4}, {"threshold": 0.98, "keep_ratio": 0.5}, {"num_blocks": 4, "keep_ratio": 0.5}],
    ids=lambda settings: "+".join(settings),
)
def test_two_targets_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match="Exactly one of threshold, num_blocks, keep_ratio, speedup") as caught:
        MPruneConfig(**settings)
    assert f"found {' and '.join(settings)}" in str(caught.value)


def test_target_that_counts():
    assert MPruneConfig().target == "threshold"
    assert MPruneConfig(threshold=0.5).target == "threshold"
    assert MPruneConfig(num_blocks=3).target == "num_blocks"
    assert MPruneConfig(keep_ratio=0.5).target == "keep_ratio"
    assert MPruneConfig(num_blocks=3).threshold is None


def test_effective_rows_are_the_metrics_own_unless_given():
    assert MPruneConfig(similarity="cka_biased").effective_rows == "tokens"
    assert MPruneConfig(similarity="cka").effective_rows == metrics.get("cka").rows
    assert MPruneConfig(similarity="cka", rows="first").effective_rows == "first"
    assert MPruneConfig(similarity="effect").effective_rows == "outputs"


def test_rows_of_blocks_are_refused_where_outputs_of_the_model_are_compared():
    with pytest.raises(
        ConfigError,
        match=r"similarity='effect' compares the outputs of the whole model, found rows='mean'.*Leave rows out",
    ):
        MPruneConfig(similarity="effect", rows="mean")
    with pytest.raises(ConfigError, match="Leave rows out"):
        MPruneConfig(rows="mean").replace(similarity="effect")


# --- in and out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [MPruneConfig(), FULL, MPruneConfig(keep_ratio=0.5), MPruneConfig(threshold=0.9)], ids=str
)
def test_round_trip(config, tmp_path):
    assert MPruneConfig.from_dict(config.to_dict()) == config
    assert MPruneConfig.from_json(config.to_json()) == config
    path = tmp_path / "config.json"
    path.write_text(config.to_json(), "utf-8")
    assert MPruneConfig.from_json(path) == config
    assert MPruneConfig.from_json(str(path)) == config


def test_to_dict_holds_json_types_only_and_every_setting():
    data = FULL.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert set(data) == {spec.name for spec in dataclasses.fields(MPruneConfig)}


def test_to_dict_is_a_copy():
    data = FULL.to_dict()
    data["num_blocks"]["encoder"] = 99
    data["protect"].append("more")
    assert FULL.num_blocks == {"encoder": 4, "decoder": 2}
    assert FULL.protect == ("encoder.0", "decoder.*")


def test_unknown_keys_of_a_newer_file_warn_and_are_left_out():
    with pytest.warns(DeepArcWarning, match="ignored: colour, zeal.*pip install -U deeparc_hf"):
        config = MPruneConfig.from_dict({"k": 2, "zeal": 1, "colour": "red"})
    assert config == MPruneConfig(k=2)


def test_values_from_a_file_are_checked_too():
    with pytest.raises(ConfigError, match=r"Did you mean 0\.98"):
        MPruneConfig.from_json('{"threshold": 98}')


@pytest.mark.parametrize("text", ["[1, 2]", "null", '"text"', '{"k": 1', "{not json}"])
def test_file_that_is_no_config_is_a_config_error(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError):
        MPruneConfig.from_json(path)


@pytest.mark.parametrize(
    ("start", "settings"),
    [
        ({}, {"num_blocks": 6}),
        ({}, {"keep_ratio": 0.5}),
        ({"num_blocks": 6}, {"threshold": 0.9}),
        ({"num_blocks": 6}, {"keep_ratio": 0.5}),
        ({"keep_ratio": 0.5}, {"threshold": 0.9}),
        ({"keep_ratio": 0.5}, {"num_blocks": {"encoder": 2}}),
    ],
    ids=str,
)
def test_replace_switches_the_target_and_keeps_the_rest(start, settings):
    before = MPruneConfig(k=2, freeze="partial", **start)
    after = before.replace(**settings)
    (target,) = settings
    assert after.target == target
    assert {name: getattr(after, name) for name in TARGETS} == {**dict.fromkeys(TARGETS), **settings}
    assert (after.k, after.freeze) == (2, "partial")
    assert before == MPruneConfig(k=2, freeze="partial", **start)


def test_replace_of_another_setting_keeps_the_target():
    assert MPruneConfig(num_blocks=6).replace(k=3) == MPruneConfig(num_blocks=6, k=3)


def test_replace_checks_its_values():
    with pytest.raises(ConfigError, match=r"Did you mean 0\.97"):
        MPruneConfig().replace(threshold=97)
    with pytest.raises(ConfigError, match="found threshold and num_blocks"):
        MPruneConfig().replace(threshold=0.9, num_blocks=3)


@pytest.mark.parametrize(
    "use", [MPruneConfig().replace, lambda **s: MPruneConfig.from_settings(None, s)], ids=["replace", "from_settings"]
)
def test_unknown_setting_says_what_was_probably_meant(use):
    with pytest.raises(
        ConfigError,
        match=r"'treshold' is not a setting of MPruneConfig\. Did you mean 'threshold'\? Settings: threshold, k",
    ):
        use(treshold=0.9)
    with pytest.raises(ConfigError) as caught:
        use(zzzzzz=0.9)
    assert "Did you mean" not in str(caught.value)


def test_from_settings_takes_a_config_keywords_or_both():
    config = MPruneConfig(threshold=0.9, k=2)
    assert MPruneConfig.from_settings(config, {}) is config
    assert MPruneConfig.from_settings(None, {"threshold": 0.9, "k": 2}) == config
    assert MPruneConfig.from_settings(config, {"num_blocks": 4}) == MPruneConfig(num_blocks=4, k=2)
    assert MPruneConfig.from_settings(None, {}) == MPruneConfig()


@pytest.mark.parametrize("config", [{"threshold": 0.9}, 0.9, "cka"], ids=repr)
def test_from_settings_refuses_what_is_no_config(config):
    with pytest.raises(ConfigError, match=f"must be an MPruneConfig, found {type(config).__name__}"):
        MPruneConfig.from_settings(config, {})
