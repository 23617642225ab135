"""`deeparc search`, and `deeparc prune --frontier`."""

from __future__ import annotations

import json

import pytest
import transformers as tf

from deeparc_hf import Frontier, PrunedConfig, PruningPlan
from deeparc_hf.search import found as found_module

from . import cli_tools
from .cli_tools import error_of, run

checkpoints, data, own_cache = cli_tools.checkpoints, cli_tools.data, cli_tools.own_cache
STACK = "bert.encoder.layer"


@pytest.fixture(scope="module")
def common(checkpoints, data):
    return (checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text")


@pytest.fixture(scope="module")
def found(common, tmp_path_factory):
    """The file of a search, with times."""
    from deeparc_hf.cli import main

    file = tmp_path_factory.mktemp("search") / "frontier.json"
    assert main([str(a) for a in ("search", *common, "--num-blocks", 1, "-o", file)]) == 0
    return file


def test_search_prints_the_frontier_and_saves_it(capsys, common, tmp_path):
    out = tmp_path / "made" / "frontier.json"
    code, said, _ = run(capsys, "search", *common, "--no-times", "-o", out)
    frontier = Frontier.from_json(out)
    assert code == 0 and said == f"{frontier}\nwritten to {out}\n"
    assert [point.num_blocks for point in frontier.points] == [4, 3, 2]
    assert (frontier.search, frontier.objective, frontier.plan.samples) == ("greedy", "divergence", 64)
    assert frontier.work is None and frontier.plan.config.heal == "lstsq"
    assert [path.name for path in out.parent.iterdir()] == ["frontier.json"]


def test_search_takes_its_settings(capsys, common, tmp_path):
    out, journal = tmp_path / "f.json", tmp_path / "journal"
    settings = ("--heal", "none", "--objective", "hidden", "--num-blocks", 1, "--samples", 40)
    more = ("--protect", f"{STACK}.3", "--min-blocks", 3, "--no-times", "--journal", journal, "--json")
    code, said, _ = run(capsys, "search", *common, *settings, *more, "-o", out)
    told = json.loads(said)
    frontier = Frontier.from_json(out)
    assert code == 0 and told["out"] == str(out) and Frontier.from_dict(told["frontier"]) == frontier
    assert frontier.plan.config.heal is None and frontier.objective == "hidden" and frontier.samples == 40
    assert [point.num_blocks for point in frontier.points] == [4, 3]  # three have to stay
    assert 3 not in frontier.points[1].removed[STACK] and journal.is_file()
    assert run(capsys, "search", *common, "--max-value", -1, "--no-times", "-o", tmp_path / "g.json")[0] == 0
    assert len(Frontier.from_json(tmp_path / "g.json").points) == 1


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [(("--num-blocks", 2), 2), (("--parameters", "44e3"), 3), (("--max-value", "1e9"), 1), (("--speedup", 1.01), None)],
)
def test_prune_carries_out_what_a_budget_chooses(capsys, common, found, tmp_path, budget, blocks):
    out, frontier = tmp_path / "out", Frontier.from_json(found)
    code, said, _ = run(capsys, "prune", *common, "--frontier", found, *budget, "-o", out)
    name = budget[0].removeprefix("--").replace("-", "_")
    plan = frontier.choose(**{name: int(budget[1]) if name == "num_blocks" else float(budget[1])})
    assert code == 0 and PruningPlan.from_json(out / "pruning_plan.json") == plan
    model, info = tf.AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    assert model.config.num_hidden_layers == plan.num_kept == (blocks or plan.num_kept) < 4
    record = PrunedConfig.from_pretrained(out)
    assert record.kept == {STACK: plan.stacks[STACK].kept}
    assert len(record.iterations[-1]["healing"]) == said.count("Healing: ") >= 1
    report = (out / "report.md").read_text("utf-8")
    assert f"By {plan.choice}." in report and "cka" not in report.partition("By ")[2].partition("\n")[0]


def test_a_dry_run_and_freezing_go_by_a_frontier_too(capsys, common, found):
    more = ("--num-blocks", 3, "--freeze", "partial", "--dry-run", "--json")
    code, said, _ = run(capsys, "prune", *common, "--frontier", found, *more)
    told = json.loads(said)
    plan = PruningPlan.from_dict(told["plan"])
    assert code == 0 and plan.num_kept == 3 and plan.num_frozen > 0 and told["files"] == []
    assert told["parameters"]["after"] == Frontier.from_json(found).points[1].parameters


def test_a_budget_that_the_whole_model_meets_is_told(capsys, common, found):
    code, _, err = run(capsys, "prune", *common, "--frontier", found, "--parameters", "1e9", "--dry-run")
    assert code == 0 and "nothing to remove" in err and "ask for more" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--search", "greddy"], "Did you mean 'greedy'?"),
        (["--objective", "divergense"], "Did you mean 'divergence'?"),
        (["--objective", "loss"], "Give batches with labels, or take objective='divergence'"),
        (["--objective", "metric"], "is what a function of yours measures: search_blocks("),
        (["--heal", "lsq"], "Did you mean 'lstsq'?"),
        (["--protect", "nothing.3"], "matches no block"),
        (["--num-blocks", "4"], "has 4 blocks, found 4. Give a smaller number"),
        (["--max-value", "nan"], "max_value must be a finite number"),
        (["--samples", "1"], "only 1 calibration sample"),
        (["--text-column", "txt"], "the data has no column 'txt'"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_and_writes_nothing(capsys, common, tmp_path, given, message):
    assert message in error_of(capsys, "search", *common, *given, "--no-times", "-o", tmp_path / "f.json")
    assert list(tmp_path.iterdir()) == []


def test_only_a_frontier_is_overwritten(capsys, common, found, tmp_path):
    out = tmp_path / "f.json"
    out.write_text("mine")
    arguments = ("search", *common, "--no-times", "-o")
    assert "f.json exists" in error_of(capsys, *arguments, out)
    assert "is not the frontier of a search" in error_of(capsys, *arguments, out, "--overwrite")
    assert "is a folder" in error_of(capsys, *arguments, tmp_path)
    assert f"{out} is a file" in error_of(capsys, *arguments, out / "f.json")
    assert out.read_text() == "mine"
    out.write_text(found.read_text("utf-8"), "utf-8")
    assert run(capsys, *arguments, out, "--overwrite")[0] == 0
    assert Frontier.from_json(out).work is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--parameters", "1e6"], "--parameters chooses from what a search found. Give its file with --frontier"),
        (["--frontier", "{found}"], "exactly one of --speedup, --parameters, --max-value, --num-blocks"),
        (["--frontier", "{found}", "--speedup", "1.5", "--num-blocks", "3"], "found --speedup, --num-blocks"),
        (["--frontier", "{found}", "--num-blocks", "3", "--similarity", "cka"], "has settled --similarity"),
        (["--frontier", "{found}", "--num-blocks", f"{STACK}=3"], "counts the blocks of all stacks"),
        (["--frontier", "{found}", "--num-blocks", "7"], "No model with 7 blocks was found, only with 4, 3, 2, 1"),
        (
            ["--frontier", "{found}", "--parameters", "1"],
            "No model that was found meets parameters=1: the smallest has",
        ),
        (["--frontier", "{found}", "--speedup", "nan"], "speedup must be a finite number"),
        (["--frontier", "nowhere.json", "--num-blocks", "3"], "There is no file nowhere.json"),
        (["--frontier", "{data}", "--num-blocks", "3"], "not the frontier of a search: it is not JSON"),
    ],
)
def test_what_a_frontier_cannot_give_is_refused(capsys, common, found, data, tmp_path, given, message):
    names = {"found": found, "data": data / "d.csv"}
    given = [argument.format(**names) for argument in given]
    assert message in error_of(capsys, "prune", *common, *given, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_frontier_of_another_model_is_refused_before_data_is_read(capsys, checkpoints, found, tmp_path):
    arguments = ("prune", checkpoints / "gpt2", "--data", "missing.csv", "--frontier", found, "--num-blocks", 3)
    assert f"for a model with 4 blocks in {STACK}" in error_of(capsys, *arguments, "-o", tmp_path / "out")


def test_without_times_a_speedup_cannot_be_asked_for(capsys, common, tmp_path):
    run(capsys, "search", *common, "--no-times", "-o", tmp_path / "f.json")
    arguments = ("--frontier", tmp_path / "f.json", "--speedup", "1.1", "--dry-run")
    assert "speedup needs times, and this search measured none" in error_of(capsys, "prune", *common, *arguments)


@pytest.mark.filterwarnings("always::deeparc_hf.errors.CalibrationWarning")
def test_after_ctrl_c_what_was_found_is_saved(capsys, common, tmp_path, monkeypatch):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0, (0.9, 1.1)

    monkeypatch.setattr(found_module, "compare_times", interrupted)
    code, said, err = run(capsys, "search", *common, "-o", tmp_path / "f.json")
    assert "warning: The search was broken off after 1 of 2" in err
    frontier = Frontier.from_json(tmp_path / "f.json")
    assert code == 130 and "broken off" in said and not frontier.complete
    assert [point.num_blocks for point in frontier.points] == [4, 3]


def test_ctrl_c_before_anything_was_found_writes_nothing(capsys, common, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(found_module, "time_blocks", interrupted)
    code, _, err = run(capsys, "search", *common, "-o", tmp_path / "f.json")
    assert code == 130 and "interrupted: nothing was written" in err and list(tmp_path.iterdir()) == []


def test_prune_searches_by_itself_for_a_speed_up(capsys, common, tmp_path):
    code, said, _ = run(capsys, "prune", *common, "--speedup", "1.02", "-o", tmp_path / "out")
    assert code == 0 and "greedy search: divergence" in said
    record = PrunedConfig.from_pretrained(tmp_path / "out")
    assert record.iterations[-1]["settings"]["search"] == "greedy" and record.iterations[-1]["healing"]
    assert tf.AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers < 4
