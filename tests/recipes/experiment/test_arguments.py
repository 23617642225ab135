"""Arguments of recipes: a YAML file, the command line, which wins, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from deeparc_hf.errors import ConfigError
from experiment.arguments import DataArguments, PruningArguments, begin, parse

TYPES = (DataArguments, PruningArguments)


@dataclass
class Extra:
    """Kinds of values."""

    flag: bool = field(default=False, metadata={"help": "a truth"})
    sure: bool = field(default=True, metadata={"help": "a truth that holds"})
    shares: list[float] = field(default_factory=lambda: [0.5], metadata={"help": "numbers"})
    maybe: int | None = field(default=7, metadata={"help": "a number or none"})


@pytest.fixture
def settings(tmp_path):
    """Write a config file, and give the words that name it."""

    def write(text, joined=False):
        path = tmp_path / "settings.yaml"
        path.write_text(text, "utf-8")
        return [f"--config={path}"] if joined else ["--config", str(path)]

    return write


def pruning(**given):
    return PruningArguments(**{"threshold": 0.9, **given})


def test_the_command_line_wins_over_the_file_wherever_it_stands(settings):
    file = settings("model: bert\nthreshold: 0.9\niterations: 2\nsparsity: [0.1, 0.2]\n")
    for argv in ([*file, "--threshold", "0.95"], ["--threshold", "0.95", *file]):
        data, given = parse(TYPES, argv)
        assert (data.model, given.threshold, given.iterations, given.sparsity) == ("bert", 0.95, 2, [0.1, 0.2])
    _, given = parse(
        TYPES, [*settings("model: bert\nsparsity: [0.1, 0.2]\n", joined=True), "--sparsity", "0.4", "--num_blocks", "3"]
    )
    assert given.sparsity == [0.4] and given.num_blocks == ["3"]


def test_the_command_line_takes_back_what_the_file_says(settings):
    file = settings("model: bert\nthreshold: 0.9\nsparsity: [0.1, 0.2]\nmetric: accuracy\n")
    _, given = parse(TYPES, [*file, "--threshold", "null", "--num_blocks", "3", "--sparsity=null", "--metric", "null"])
    assert given.threshold is None and given.num_blocks == ["3"] and given.sparsity == [] and given.metric is None
    data, given = parse(
        TYPES, [*settings("model: bert\nthreshold: 0.9\nrepo_id: a/b\n"), "--repo-id", "null", "--keep-ratio=null"]
    )
    assert data.repo_id is None and given.keep_ratio is None
    with pytest.raises(ConfigError, match="There is no argument '--treshold'"):
        parse(TYPES, [*file, "--treshold", "null"])


def test_values_of_every_kind(settings):
    (found,) = parse((Extra,), settings("flag: true\nsure: false\nshares: [0.25, 1]\nmaybe: null\n"))
    assert found == Extra(True, False, [0.25, 1.0], 7)  # null: the default
    assert parse((Extra,), []) == (Extra(),)
    (found,) = parse((Extra,), [*settings("flag: true\nmaybe: 3\n"), "--flag", "false"])
    assert found.flag is False and found.maybe == 3


def test_an_empty_list_and_texts_that_need_quotes(settings):
    data, given = parse(
        TYPES, settings("model: '-a b: c'\nprotect: []\nnum_blocks: ['encoder.block=3', 'decoder.block=2']\n")
    )
    assert data.model == "-a b: c" and given.protect == []
    assert given.pruning(0).num_blocks == {"encoder.block": 3, "decoder.block": 2}


def test_arguments_of_a_trainer_go_into_the_same_file(settings, tmp_path):
    words = settings(f"model: bert\noutput_dir: {tmp_path}\nlearning_rate: 2.0e-4\nuse_cpu: true\nbf16: false\n")
    *_, training = parse((*TYPES, TrainingArguments), words)
    assert training.learning_rate == 2e-4 and training.use_cpu and not training.bf16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold: 0.9\n", r"no setting 'treshold'\. Did you mean 'threshold'\?"),
        ("xyz: 1\n", r"no setting 'xyz'\.$"),
        ("7: 1\n", "no setting '7'"),
        ("model: {name: bert}\n", "model holds a mapping"),
        ("num_blocks: {encoder: 3}\n", "num_blocks holds a mapping"),
        ("- model\n", "must hold names and values, found a list"),
        ("bert\n", "must hold names and values, found a str"),
        ("", "must hold names and values, found a NoneType"),
        ("model: [unclosed\n", "is not YAML"),
        ("threshold: 98\nmodel: bert\n", "did you mean 0.98"),
        ("model: bert\nthreshold: 0.9\nkeep_ratio: 0.5\n", "Exactly one of threshold, num_blocks, keep_ratio, speedup"),
    ],
)
def test_a_wrong_file_is_refused(settings, text, message):
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        parse(TYPES, settings(text))


def test_a_file_that_is_not_there_is_refused(tmp_path):
    for argv in (["--config", str(tmp_path / "none.yaml")], ["--config"], [f"--config={tmp_path}"]):
        with pytest.raises(ConfigError, match="--config: there is no file"):
            parse(TYPES, argv)
    with pytest.raises(ConfigError, match=r"--config: there is no file \.") as told:
        parse(TYPES, ["--config", "--threshold", "0.9"])
    assert "--threshold" not in str(told.value)


def test_an_unknown_argument_and_an_abbreviation_are_refused():
    for words in (["--treshold", "0.9"], ["--treshol=0.9"]):
        with pytest.raises(ConfigError, match=r"no argument '--tresh\S*'\. Did you mean '--threshold'\?"):
            parse(TYPES, ["--model", "bert", *words])
    with pytest.raises(ConfigError, match=r"no argument '0\.9'\.$"):
        parse(TYPES, ["--model", "bert", "0.9"])


def test_targets_of_each_iteration():
    assert [pruning(threshold=None, iterations=3, num_blocks=["9"]).pruning(i).num_blocks for i in range(3)] == [
        9,
        9,
        9,
    ]
    assert [pruning(threshold=None, iterations=2, num_blocks=["9", " 7 "]).pruning(i).num_blocks for i in range(2)] == [
        9,
        7,
    ]
    by_stack = pruning(threshold=None, num_blocks=["a.b=3", "c=2"])
    assert by_stack.pruning(0).num_blocks == {"a.b": 3, "c": 2}
    each = pruning(threshold=None, iterations=2, num_blocks=["a.b=9,c=5", "a.b=8, c=3"])  # the seed's T5
    assert [each.pruning(i).num_blocks for i in (0, 1)] == [{"a.b": 9, "c": 5}, {"a.b": 8, "c": 3}]
    assert pruning(num_blocks=[]).pruning(0).threshold == 0.9


def test_targets_by_stack_for_each_iteration_in_a_file(settings):
    _, given = parse(TYPES, settings("model: t5\niterations: 2\nnum_blocks: [{a.b: 9, c: 5}, {a.b: 8, c: 3}]\n"))
    assert [given.pruning(i).num_blocks for i in (0, 1)] == [{"a.b": 9, "c": 5}, {"a.b": 8, "c": 3}]


def test_a_default_config_stands_in_where_nothing_is_named(tmp_path, capsys):
    path = tmp_path / "default.yaml"
    path.write_text("model: bert\nthreshold: 0.7\n")

    def taken(*words):
        return begin(Extra, list(words), None, default=path)

    data, _, given, _ = taken("--k", "2", "--use_cpu")
    assert (data.model, given.threshold, given.k) == ("bert", 0.7, 2)
    assert f"the settings are those of {path}" in capsys.readouterr().err
    data, _, given, _ = taken("--model", "mine", "--threshold", "0.8", "--use_cpu")
    assert (data.model, given.threshold) == ("mine", 0.8) and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_blocks": ["9", "7"], "iterations": 3}, "gives 2 targets for 3 iterations"),
        ({"num_blocks": ["a=x"]}, "found 'a=x'"),
        ({"num_blocks": ["9", "a=3"]}, "gives 2 targets for 1 iterations"),
        ({"num_blocks": ["a=4", "b=3"], "iterations": 2}, "names other stacks for one iteration than for another"),
        ({"num_blocks": ["a=4,b=3"], "iterations": 2}, "the first would go all the way"),
        ({"num_blocks": ["a=4,b=3", "a=3,b=3"], "iterations": 3}, "gives 2 targets for 3 iterations"),
        ({"num_blocks": ["a=4,b"], "iterations": 1}, "found 'a=4,b'"),
        ({"num_blocks": ["=3"]}, "found '=3'"),
        ({"num_blocks": ["-3"]}, "found '-3'"),
        ({"num_blocks": ["0"]}, "must be at least 1"),
    ],
)
def test_targets_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        pruning(threshold=None, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iterations": -1}, "must be 0 or more"),
        ({"finetune_epochs": -0.5}, "must be 0 or more"),
        ({"retrain_epochs": -1}, "must be 0 or more"),
        (
            {"retrain_epochs": 0, "max_drop": 0.1, "distill_alpha": 0.5},
            "max_drop and distill_alpha is about the retraining",
        ),
        ({"retrain_epochs": 0, "freeze": "partial"}, "freeze is about the retraining"),
        ({"sparsity": [0.3], "sparsity_retrain": [0.4]}, "sparsity_retrain names shares of the grid"),
        ({"sparsity": [30]}, "sparsity must be in"),
        ({"sparsity_pattern": "1:2"}, "2:4"),
        ({"similarity": "ckaa"}, "cka"),
        ({"distill_alpha": 2.0}, "alpha must be in"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_any_work(given, message):
    with pytest.raises(ConfigError, match=message):
        pruning(**given)


def test_settings_of_an_iteration_and_of_the_grid():
    given = pruning(
        k=2,
        freeze="partial",
        heal="lstsq",
        distill_alpha=0.3,
        metric="accuracy",
        max_drop=0.01,
        protect=["*.0"],
        sparsity=[0.1, 0.2],
    )
    config = given.pruning(0, baseline=0.8)
    assert (config.k, config.freeze, config.heal, config.max_drop, config.baseline) == (
        2,
        "partial",
        "lstsq",
        0.01,
        0.8,
    )
    assert (
        config.distill.alpha == 0.3
        and config.protect == ("*.0",)
        and config.iterations == 1
        and config.start_epoch == 0
    )
    assert [entry.sparsity for entry in given.grid()] == [0.1, 0.2]
    (entry,) = pruning(sparsity_pattern="2:4", sparsity_method="magnitude", sparsity_retrain=[0.5]).grid()
    assert entry.pattern == "2:4" and entry.method == "magnitude"
    assert pruning(retrain_epochs=0).pruning(0).retrain_epochs == 1
