"""`deeparc remove`, and `deeparc prune` with a plan that needs no data: from file to file."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as tf

from deeparc_hf import PruningPlan, apply_plan, remove_blocks
from deeparc_hf.cli.remove import given_blocks
from deeparc_hf.cli.sources import find_source, load_model
from deeparc_hf.errors import ConfigError

from .cli_tools import checkpoints, data, error_of, own_cache, run

__all__ = ["checkpoints", "data", "own_cache"]

STACK = "bert.encoder.layer"


def same_weights(folder, model):
    found = load_model(find_source(str(folder))).state_dict()
    return found.keys() == model.state_dict().keys() and all(
        torch.equal(v, found[k]) for k, v in model.state_dict().items()
    )


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        (["a.b=3"], {"a.b": [3]}),
        (["a.b=3,7, 20-23"], {"a.b": [3, 7, 20, 21, 22, 23]}),
        (["a=0-0", "b=1"], {"a": [0], "b": [1]}),
        (["a=1", "a=2"], {"a": [1, 2]}),
    ],
)
def test_blocks_are_named_one_by_one_and_as_ranges(given, blocks):
    assert given_blocks(given) == blocks


@pytest.mark.parametrize("given", ["3", "a=", "=3", "a=x", "a=3-", "a=-3", "a=5-3", "a=1-99999", "a=3,,4", "a=1.5"])
def test_what_names_no_blocks_is_refused(given):
    with pytest.raises(ConfigError, match="--blocks"):
        given_blocks([given])


def test_a_checkpoint_without_blocks_is_written_with_its_tokenizer(capsys, checkpoints, tmp_path):
    out = tmp_path / "out"
    code, text, err = run(capsys, "remove", checkpoints / "bert", "--blocks", f"{STACK}=1-2", "-o", out)
    assert code == 0 and "parameters: " in text and "model.safetensors" in text
    assert "--no-verify leaves it out" in err
    model = tf.AutoModelForSequenceClassification.from_pretrained(checkpoints / "bert")
    remove_blocks(model, {STACK: [1, 2]})
    assert same_weights(out, model)
    assert len(tf.AutoTokenizer.from_pretrained(out)) == len(tf.AutoTokenizer.from_pretrained(checkpoints / "bert"))
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0 and "2 of 4 blocks are left: 0 3" in text


def test_as_json(capsys, checkpoints, tmp_path):
    arguments = ("remove", checkpoints / "t5", "--blocks", "decoder.block=1", "--freeze", "partial", "--json")
    code, text, _ = run(capsys, *arguments, "--no-verify", "-o", tmp_path / "out")
    found = json.loads(text)
    assert code == 0 and found["record"]["stacks"]["decoder.block"]["kept"] == [0, 2]
    assert found["record"]["iterations"][0]["frozen"]
    assert found["parameters"]["after"] < found["parameters"]["before"]
    assert {"config.json", "model.safetensors"} <= set(found["files"])


def test_a_model_of_timm_is_served_too(capsys, checkpoints, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, "remove", checkpoints / "timm", "--blocks", "blocks=1", "-o", out)[0] == 0
    model = load_model(find_source(str(checkpoints / "timm")))
    remove_blocks(model, {"blocks": [1]})
    assert same_weights(out, model)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (f"{STACK}=7", "there is no block 7"),
        ("encoder=1", "There is no stack 'encoder'"),
        (f"{STACK}=0-3", "At least one must stay"),
        ("1", "--blocks takes STACK=NUMBERS"),
    ],
)
def test_wrong_blocks(blocks, message, capsys, checkpoints, tmp_path):
    assert message in error_of(capsys, "remove", checkpoints / "bert", "--blocks", blocks, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(capsys, checkpoints, tmp_path):
    (tmp_path / "mine").touch()
    arguments = ("remove", checkpoints / "bert", "--blocks", f"{STACK}=1", "-o", tmp_path)
    assert "not an empty folder" in error_of(capsys, *arguments)


# ---- plans ----


@pytest.fixture(scope="module")
def plan_file(checkpoints, data, tmp_path_factory):
    """What a dry run leaves."""
    from deeparc_hf.cli import main

    out = tmp_path_factory.mktemp("plan")
    arguments = ["prune", checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text", "--num-blocks", "3"]
    assert main([*map(str, arguments), "--freeze", "partial", "--dry-run", "-o", str(out / "dry")]) == 0
    return out / "dry" / "pruning_plan.json"


def test_a_plan_is_carried_out_without_data(capsys, checkpoints, plan_file, tmp_path):
    out = tmp_path / "out"
    code, text, _ = run(capsys, "prune", checkpoints / "bert", "--plan", plan_file, "-o", out)
    assert code == 0 and "written to" in text
    model, plan = (
        tf.AutoModelForSequenceClassification.from_pretrained(checkpoints / "bert"),
        PruningPlan.from_json(plan_file),
    )
    apply_plan(model, plan)
    assert same_weights(out, model)
    assert {"pruning_plan.json", "report.md", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    assert "--overwrite" in error_of(capsys, "prune", checkpoints / "bert", "--plan", plan_file, "-o", out)
    assert run(capsys, "prune", checkpoints / "bert", "--plan", plan_file, "-o", out, "--overwrite", "--json")[0] == 0


def test_a_dry_run_of_a_plan_writes_no_checkpoint(capsys, checkpoints, plan_file, tmp_path):
    code, text, _ = run(capsys, "prune", checkpoints / "bert", "--plan", plan_file, "--dry-run")
    assert code == 0 and "dry run: nothing was written" in text and "parameters: " in text
    run(capsys, "prune", checkpoints / "bert", "--plan", plan_file, "--dry-run", "-o", tmp_path / "out")
    assert "model.safetensors" not in {path.name for path in (tmp_path / "out").iterdir()}


def test_a_plan_that_repairs_takes_data(capsys, checkpoints, data, plan_file, tmp_path):
    content = json.loads(plan_file.read_text("utf-8"))
    content["config"]["heal"] = "lstsq"
    healing = tmp_path / "plan.json"
    healing.write_text(json.dumps(content), "utf-8")
    common = ("prune", checkpoints / "bert", "--plan", healing, "-o", tmp_path / "out")
    assert "for which data are needed: give --data" in error_of(capsys, *common)
    code, text, _ = run(capsys, *common, "--data", data / "d.csv", "--text-column", "text")
    assert code == 0 and "Healing: " in text


def test_what_does_not_go_with_a_plan(capsys, checkpoints, data, plan_file, tmp_path):
    common, out = ("prune", checkpoints / "bert"), ("-o", tmp_path / "out")
    assert "Leave it out" in error_of(capsys, *common, "--plan", plan_file, "--num-blocks", "2", *out)
    assert "--frontier" in error_of(capsys, *common, "--plan", plan_file, "--frontier", "f.json", *out)
    assert "There is no file" in error_of(capsys, *common, "--plan", tmp_path / "none.json", *out)
    assert "Give the calibration data with --data" in error_of(capsys, *common, "--num-blocks", "3", *out)
    assert "no such stack" in error_of(capsys, "prune", checkpoints / "gpt2", "--plan", plan_file, *out)
    assert list(tmp_path.iterdir()) == []
