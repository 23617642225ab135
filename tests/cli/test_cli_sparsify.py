"""`deeparc sparsify`, with real tiny checkpoints, a real tokenizer and real files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import transformers as tf

from deeparc_hf import PrunedConfig, WandaConfig
from deeparc_hf.checkpoint import loading as loading_module
from deeparc_hf.cli import main

from . import cli_tools
from .cli_tools import error_of, run

checkpoints, data, own_cache = cli_tools.checkpoints, cli_tools.data, cli_tools.own_cache

MAPS = 24  # six in each of the four blocks of the BERT
ENCODER = "bert.encoder.layer."


@pytest.fixture
def bert(checkpoints, data):
    """What a run on the BERT begins with."""
    return ("sparsify", checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text")


def linear_maps(model):
    return {
        name: m.weight.detach()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name.startswith(ENCODER)
    }


def load(folder):
    model, info = tf.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def assert_sparse(folder, original, zeros=0.5):
    """That share of each row is zero, and every other number of the checkpoint is what it was."""
    before, after = load(original).state_dict(), load(folder)
    maps = linear_maps(after)
    assert len(maps) == MAPS
    for name, value in after.state_dict().items():
        matrix = name.removesuffix(".weight")
        if matrix in maps:
            assert bool(((value == 0).sum(dim=1) == int(value.shape[1] * zeros)).all())
        assert torch.equal(torch.where(value == 0, 0, before[name]) if matrix in maps else before[name], value)


def zeroed(folder):
    return {name: weight == 0 for name, weight in linear_maps(load(folder)).items()}


def same(first, second):
    return all(torch.equal(mask, second[name]) for name, mask in first.items())


def test_help_renders(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sparsify", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())  # where lines end depends on the terminal
    offered = {word.strip(",[]") for word in text.split() if word.strip(",[]").startswith("--")}
    assert {
        "--sparsity",
        "--pattern",
        "--sequential",
        "--no-sequential",
        "--targets",
        "--data",
        "--overwrite",
    } <= offered
    assert not offered & {"--start-epoch", "--keep-zeros", "--dry-run"}
    assert "{magnitude,wanda}" in text and "Default: --sequential." in text and "Default: 0.5." in text


@pytest.mark.parametrize("command", ["", "card", "env", "inspect", "push"])
def test_help_loads_no_heavy_library(command):
    code = (
        f"import sys; from deeparc_hf.cli import main\ntry: main({command.split()} + ['--help'])\n"
        "finally: print(*{n.partition('.')[0] for n in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    *text, loaded = done.stdout.splitlines()
    assert any((command or "sparsify") in line for line in text)
    assert "deeparc_hf" in loaded.split()
    assert not {"torch", "transformers", "numpy", "timm", "datasets"} & set(loaded.split())


@pytest.mark.parametrize("option", ["--start-epoch=1", "--keep-zeros", "--dry-run"])
def test_what_is_of_no_use_is_refused(capsys, option):
    with pytest.raises(SystemExit) as stop:
        main(["sparsify", "model", "--data", "d.csv", "-o", "out", option])
    assert stop.value.code == 2
    assert option.partition("=")[0] in capsys.readouterr().err


def test_out_is_required(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sparsify", "model", "--data", "d.csv"])
    assert stop.value.code == 2
    assert "-o/--out" in capsys.readouterr().err


def test_stock_transformers_loads_the_zeros(capsys, checkpoints, bert, tmp_path):
    out = tmp_path / "made" / "out"
    code, stdout, _ = run(capsys, *bert, "-o", out)
    assert code == 0
    assert_sparse(out, checkpoints / "bert")
    *_, shares, written = stdout.strip().splitlines()
    assert shares == f"sparsity: 50.00 % asked, 50.00 % measured in {MAPS} matrices"
    assert "| bert.encoder.layer | attention.self.query | 4 | 4,096 | 50.00 | 50.00 |" in stdout
    assert written.startswith(f"written to {out}: ")
    assert sorted(written.partition(": ")[2].split(", ")) == sorted(path.name for path in out.iterdir())
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    words = tf.AutoTokenizer.from_pretrained(out)("w1 w2", return_tensors="pt", return_token_type_ids=False)
    assert load(out)(**words).logits.isfinite().all()


def test_reports_and_record_say_what_was_done(capsys, bert, tmp_path):
    out = tmp_path / "out"
    assert run(capsys, *bert, "--sparsity", "0.3", "--calibration-samples", "40", "-o", out)[0] == 0
    report = json.loads((out / "sparsity_report.json").read_text("utf-8"))
    assert report["extra"] == {"model": "bert", "data": "d.csv"}
    assert report["samples"] == 40
    assert report["config"] == WandaConfig(sparsity=0.3, calibration_samples=40).to_dict()
    assert report["asked"] == pytest.approx(
        sum(m["asked"] for m in report["matrices"].values()) / (4 * (4 * 32 * 32 + 2 * 32 * 48))
    )
    assert {"torch", "transformers"} <= report["versions"].keys()
    assert report["hardware"]["device"]
    text = (out / "sparsity_report.md").read_text("utf-8")
    assert text.startswith("# Sparsity report") and "- model: bert\n" in text and "- data: d.csv\n" in text
    assert not any(str(tmp_path.parent) in path.read_text("utf-8") for path in out.glob("*report*"))
    record = PrunedConfig.from_pretrained(out)
    assert record.sparsity["settings"] == report["config"]
    assert {name: m["zeros"] for name, m in record.sparsity["matrices"].items()} == {
        n: m["zeros"] for n, m in report["matrices"].items()
    }


def test_json_is_all_there_is_on_stdout(capsys, bert, tmp_path):
    code, stdout, _ = run(capsys, *bert, "--pattern", "2:4", "--no-sequential", "--json", "-o", tmp_path / "out")
    result = json.loads(stdout)
    assert code == 0
    assert (result["out"], result["model"], result["data"]) == (str(tmp_path / "out"), str(bert[1]), str(bert[3]))
    assert sorted(result["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert result["sparsity"]["config"]["sequential"] is False
    assert result["sparsity"]["measured"] == 0.5
    assert all(bool((mask.view(-1, 4).sum(dim=1) == 2).all()) for mask in zeroed(tmp_path / "out").values())


def test_targets_may_be_repeated(capsys, bert, tmp_path):
    targets = ("--targets", "*.query", "--targets", "encoder.layer.0.output.dense")
    assert run(capsys, *bert, *targets, "-o", tmp_path / "out")[0] == 0
    sparse = {name for name, mask in zeroed(tmp_path / "out").items() if mask.any()}
    assert sparse == {*(f"{ENCODER}{i}.attention.self.query" for i in range(4)), f"{ENCODER}0.output.dense"}


def test_magnitude_needs_no_data(capsys, checkpoints, bert, tmp_path):
    out = tmp_path / "out"
    code, stdout, err = run(capsys, *bert[:2], "--method", "magnitude", "--json", "-o", out)
    assert code == 0 and err == ""
    result = json.loads(stdout)
    assert (result["data"], result["sparsity"]["samples"]) == (None, 0)
    assert_sparse(out, checkpoints / "bert")
    before = linear_maps(load(checkpoints / "bert"))
    for name, mask in zeroed(out).items():
        lowest = before[name].abs().sort(dim=1).indices[:, : mask.shape[1] // 2]
        assert torch.equal(mask, torch.zeros_like(mask).scatter(1, lowest, True))
    assert (out / "tokenizer.json").read_text("utf-8") == (checkpoints / "bert" / "tokenizer.json").read_text("utf-8")
    assert json.loads((out / "sparsity_report.json").read_text("utf-8"))["extra"] == {"model": "bert"}
    # by its inputs Wanda chooses others
    assert run(capsys, *bert, "-o", tmp_path / "wanda")[0] == 0
    assert not same(zeroed(out), zeroed(tmp_path / "wanda"))


def test_data_that_is_not_needed_is_not_read(capsys, bert, tmp_path):
    arguments = (*bert[:2], "--data", tmp_path / "missing.csv", "--method", "magnitude", "-o", tmp_path / "out")
    code, _, err = run(capsys, *arguments)
    assert code == 0
    assert "info: the method 'magnitude' needs no data, so --data is not read." in err


def test_a_checkpoint_without_a_tokenizer_gets_none(capsys, checkpoints, tmp_path):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoints / "bert" / name, tmp_path / "bare")
    arguments = ("sparsify", tmp_path / "bare", "--method", "magnitude", "-o", tmp_path / "out")
    code, _, err = run(capsys, *arguments)
    assert code == 0
    assert "has no files of a tokenizer or processor, so none are saved" in err
    names = {"config.json", "model.safetensors", "sparsity_report.json", "sparsity_report.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    (tmp_path / "bare" / "tokenizer_config.json").write_text("{")
    code, _, err = run(capsys, *arguments, "--overwrite")
    assert code == 0
    assert "info: Cannot load the tokenizer or processor of" in err and "saved without it" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("name", ["vit", "timm"])
def test_image_models(capsys, checkpoints, data, tmp_path, name, method):
    given = ("--data", data / "images") if method == "wanda" else ()
    out = tmp_path / "out"
    assert run(capsys, "sparsify", checkpoints / name, "--method", method, *given, "-o", out)[0] == 0
    if name == "vit":
        model = tf.AutoModelForImageClassification.from_pretrained(out)
        tf.AutoImageProcessor.from_pretrained(out)
    else:
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
    found = json.loads((out / "sparsity_report.json").read_text("utf-8"))["matrices"]
    assert found
    for path, entry in found.items():
        assert int((model.get_submodule(path).weight == 0).sum()) == entry["zeros"] == entry["size"] // 2


def test_encoder_decoder_needs_a_target(capsys, checkpoints, data, tmp_path):
    common = ("sparsify", checkpoints / "t5", "--data", data / "d.csv", "--text-column", "text", "-o", tmp_path / "out")
    assert "--target-column" in error_of(capsys, *common)
    assert run(capsys, *common, "--target-column", "answer")[0] == 0
    stacks = {
        m["stack"]
        for m in json.loads((tmp_path / "out" / "sparsity_report.json").read_text("utf-8"))["matrices"].values()
    }
    assert stacks == {"encoder.block", "decoder.block"}


def test_samples_are_chosen_by_the_seed(capsys, bert, tmp_path):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(capsys, *bert, "--calibration-samples", "4", "--seed", seed, "-o", tmp_path / out)[0] == 0
    masks = {out: zeroed(tmp_path / out) for out in "abc"}
    assert same(masks["a"], masks["b"]) and not same(masks["a"], masks["c"])


def test_a_pruned_model_can_be_sparsified_and_a_sparse_one_pruned(capsys, bert, tmp_path):
    options = bert[2:]
    assert run(capsys, "prune", bert[1], *options, "--num-blocks", "3", "-o", tmp_path / "pruned")[0] == 0
    assert run(capsys, "sparsify", tmp_path / "pruned", *options, "-o", tmp_path / "both")[0] == 0
    record = PrunedConfig.from_pretrained(tmp_path / "both")
    assert record.kept == PrunedConfig.from_pretrained(tmp_path / "pruned").kept
    assert len(record.sparsity["matrices"]) == MAPS * 3 // 4
    assert run(capsys, "prune", tmp_path / "both", *options, "--num-blocks", "2", "-o", tmp_path / "again")[0] == 0
    matrices = PrunedConfig.from_pretrained(tmp_path / "again").sparsity["matrices"]
    assert len(matrices) == MAPS // 2
    assert {name: int(mask.sum()) for name, mask in zeroed(tmp_path / "again").items()} == {
        n: m["zeros"] for n, m in matrices.items()
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "50"], "Did you mean 0.5?"),
        (["--sparsity", "1"], "sparsity must be in [0, 1)"),
        (["--pattern", "2:5"], "pattern must be one of '2:4', '4:8'"),
        (["--pattern", "2:4", "--sparsity", "0.3"], "Give one of them"),
        (["--method", "wandaa"], "Did you mean 'wanda'?"),
        (["--targets", "*.qeury"], "matches no linear map"),
        (["--text-column", "txt"], "the data has no column 'txt'"),
        (["--device", "gpu"], "--device: cannot use 'gpu'"),
        (["--data", "missing.csv"], "There is no file or folder missing.csv."),
        (["--calibration-samples", "0"], "calibration_samples must be at least 1"),
    ],
)
def test_errors_are_one_line_with_the_way_out(capsys, bert, tmp_path, arguments, message):
    assert message in error_of(capsys, *bert, "-o", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_an_error_that_names_both_ways_out(capsys, bert, tmp_path):
    message = error_of(capsys, *bert[:2], "-o", tmp_path / "out")
    assert "'wanda' needs calibration data" in message
    assert "--data" in message and "--method magnitude" in message


def test_malformed_record_is_refused_before_the_work(capsys, checkpoints, tmp_path):
    shutil.copytree(checkpoints / "bert", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text("utf-8"))
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "pruning_config": []}))
    (tmp_path / "bert" / "model.safetensors").unlink()  # not looked at
    arguments = ("sparsify", tmp_path / "bert", "--method", "magnitude", "-o", tmp_path / "out")
    assert "pruning record is malformed" in error_of(capsys, *arguments)


def test_each_command_overwrites_what_the_other_wrote(capsys, bert, tmp_path):
    out = tmp_path / "out"
    prune = ("prune", *bert[1:], "--num-blocks", "3", "-o", out)
    sparsify = (*bert[:2], "--method", "magnitude", "-o", out)
    assert run(capsys, *sparsify)[0] == 0
    for command, mark in (
        (sparsify, "sparsity_report.json"),
        (prune, "pruning_plan.json"),
        (sparsify, "sparsity_report.json"),
    ):
        assert "not empty" in error_of(capsys, *command)
        assert run(capsys, *command, "--overwrite")[0] == 0
        assert [path.name for path in out.iterdir() if path.name in ("sparsity_report.json", "pruning_plan.json")] == [
            mark
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["prune", "sparsify"])
def test_what_no_run_wrote_is_not_overwritten(capsys, bert, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("mine")
    arguments = (command, *bert[1:], "-o", out, "--overwrite")
    # the last one is of the form that a training with WandaCallback writes
    for text in (None, "{", "[" * 100_000, "[]", '{"config": {}, "report": {"matrices": {}}}'):
        if text is not None:
            (out / "sparsity_report.json").write_text(text)
        assert "no earlier run wrote it" in error_of(capsys, *arguments)
    (out / "notes.txt").write_text("mine")
    assert "holds 'notes.txt', which this command did not write" in error_of(capsys, *arguments)
    assert "is a file" in error_of(capsys, *arguments[:-2], out / "notes.txt")
    assert (out / "model.safetensors").read_text() == "mine"


def test_failed_save_leaves_nothing_behind(capsys, bert, tmp_path, monkeypatch):
    def half(model, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(loading_module, "save_pruned", half)
    assert "No space left" in error_of(capsys, *bert, "-o", tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == []
