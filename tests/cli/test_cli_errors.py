"""What the command line says and leaves behind when something is wrong."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from deeparc_hf import PruningPlan
from deeparc_hf.checkpoint import loading as loading_module
from deeparc_hf.cli import main
from deeparc_hf.cli.data import Columns, load_rows, make_batches
from deeparc_hf.cli.sources import find_source, skeleton
from deeparc_hf.core.files import whole_folder
from deeparc_hf.errors import CalibrationWarning

from . import cli_tools
from .cli_tools import error_of, run

checkpoints, data, own_cache = cli_tools.checkpoints, cli_tools.data, cli_tools.own_cache


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "98"], "Did you mean 0.98?"),
        (["--similarity", "ckaa"], "Did you mean 'cka'?"),
        (["--freeze", "partail"], "Did you mean 'partial'?"),
        (["--num-blocks", "x"], "--num-blocks takes a whole number, or STACK=N"),
        (["--num-blocks", "a=1", "--num-blocks", "a=2"], "twice"),
        (["--num-blocks", "encoder=1"], "not a stack of this model. Stacks: bert.encoder.layer"),
        (["--threshold", "0.9", "--keep-ratio", "0.5"], "Exactly one of"),
        (["--text-column", "txt"], "the data has no column 'txt'. Columns: text, label, answer"),
        (["--text-column", "label"], "not text. Columns of text: text, answer"),
        (["--split", "test"], "has no split 'test'. Its splits: train"),
        (["--device", "gpu"], "--device: cannot use 'gpu'"),
        (["--data", "missing.csv"], "There is no file or folder missing.csv."),
        (["--auto-class", "AutoModelForSequenceClasification"], "Did you mean 'AutoModelForSequenceClassification'?"),
    ],
)
def test_errors_are_one_line_with_the_way_out(capsys, checkpoints, data, arguments, message):
    common = ["prune", checkpoints / "bert", "--data", data / "d.csv", "--dry-run"]
    assert message in error_of(capsys, *common, *arguments)


def test_settings_are_held_against_the_model_before_data_and_weights_are_read(capsys, checkpoints, tmp_path):
    for path in (checkpoints / "bert").iterdir():
        if not path.name.startswith("model"):  # no weights
            shutil.copy(path, tmp_path)
    for setting, message in {
        "--num-blocks=9": "has only",
        "--protect=nothing.3": "matches no block",
        "--keep-ratio=0.01": "at most",
    }.items():
        assert message in error_of(capsys, "prune", tmp_path, "--data", tmp_path / "missing.csv", "--dry-run", setting)


def test_column_that_cannot_be_guessed_is_asked_for(capsys, checkpoints, tmp_path):
    (tmp_path / "d.csv").write_text("premise,context\n" + "w1,w2\n" * 40)
    message = error_of(capsys, "prune", checkpoints / "bert", "--data", tmp_path / "d.csv", "--dry-run")
    assert "--text-column" in message
    assert "Columns: premise, context" in message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", "\n\n\n", "None of the rows has a text in the column 'text'"),
        (
            "d.csv",
            'text,label\n"unclosed,1\n',
            "Cannot read the data {file}: Error tokenizing data. C error: EOF inside string",
        ),
        ("d.json", "{", "Cannot read the data {file}: JSON parse error"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_what_is_wrong_in_it(
    capsys, checkpoints, tmp_path, name, content, message
):
    file = tmp_path / name
    file.write_text(content)
    assert message.format(file=file) in error_of(capsys, "prune", checkpoints / "bert", "--data", file, "--dry-run")


def test_rows_without_a_text_are_left_out_and_told(checkpoints, tmp_path):
    file = tmp_path / "d.csv"
    file.write_text("text,label\n" + "w1 w2 w3,1\n,0\n" * 20)
    source = find_source(str(checkpoints / "bert"))
    with pytest.warns(CalibrationWarning, match="20 of the 40 chosen rows have no text in the column 'text'"):
        batches, _ = make_batches(source, skeleton(source), load_rows(str(file)), Columns("text"), samples=512, seed=0)
    assert len(batches.dataset) == 20


@pytest.mark.parametrize(
    ("model", "option", "takes"),
    [
        ("bert", "image", "takes texts"),
        ("bert", "target", "writes none"),
        ("vit", "text", "takes images"),
        ("vit", "target", "takes images"),
    ],
)
def test_a_column_that_the_model_does_not_take_is_told(checkpoints, data, model, option, takes):
    source = find_source(str(checkpoints / model))
    rows = load_rows(str(data / ("images" if model == "vit" else "d.csv")))
    columns = Columns(**({} if model == "vit" else {"text": "text"}), **{option: "answer"})
    with pytest.warns(CalibrationWarning, match=f"--{option}-column 'answer' is not used: .* {takes}"):
        make_batches(source, skeleton(source), rows, columns, samples=8, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", ""], "The name of the model is empty."),
        (["prune", "{model}", "--data", " ", "--dry-run"], "The name of the data is empty."),
        (
            ["prune", "{model}", "--data", "{file}", "--subset", "plain", "--dry-run"],
            "{file} is a file. Leave --subset out.",
        ),
        (
            ["prune", "{model}", "--data", "no-such-data", "--dry-run"],
            "(no such file or folder; looked for it on the Hub)",
        ),
        (
            ["prune", "{model}", "--data", "{file}", "--threshold", "nan", "--dry-run"],
            "threshold must be a finite number, found nan.",
        ),
        (
            ["prune", "nowhere", "--data", "{file}", "-o", "{file}/out"],
            "{file} is a file. Give another folder with -o.",
        ),
    ],
)
def test_slips_are_told_before_any_work(capsys, checkpoints, data, arguments, message):
    names = {"model": checkpoints / "bert", "file": data / "d.csv"}
    assert message.format(**names) in error_of(capsys, *(argument.format(**names) for argument in arguments))


@pytest.mark.parametrize("content", ["", "text\n"])
def test_empty_data_is_an_error(capsys, checkpoints, tmp_path, content):
    (tmp_path / "d.csv").write_text(content)
    error_of(capsys, "prune", checkpoints / "bert", "--data", tmp_path / "d.csv", "--dry-run")


def test_one_row_is_an_error(capsys, checkpoints, tmp_path):
    (tmp_path / "d.csv").write_text("text\nw1 w2\n")
    assert "only 1 calibration sample" in error_of(
        capsys, "prune", checkpoints / "bert", "--data", tmp_path / "d.csv", "--dry-run"
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "There is no folder ./nowhere."),
        ("no-such-model", "no such folder; looked for it on the Hub"),
        ("timm:resnet500", "Did you mean timm:resnet50?"),
        ("local-dir:nowhere-at-all", "nowhere-at-all"),
    ],
)
def test_model_that_does_not_exist(capsys, model, message):
    assert message in error_of(capsys, "inspect", model)


def test_folder_that_is_no_checkpoint(capsys, tmp_path):
    assert "has no config.json" in error_of(capsys, "inspect", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not valid" in error_of(capsys, "inspect", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "merge_and_unload" in error_of(capsys, "inspect", tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        "text",
        5,
        {"format_version": 1, "stacks": {"encoder.layer": {"length": 10**6, "kept": [0]}}},
        {"format_version": 1, "stacks": []},
    ],
)
@pytest.mark.parametrize("name", ["bert", "timm"])
def test_malformed_record_is_an_error(capsys, checkpoints, tmp_path, name, record):
    config = json.loads((checkpoints / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pruning_config": record}))
    assert "pruning record is malformed" in error_of(capsys, "inspect", tmp_path)


def test_config_that_promises_more_blocks_than_there_are(capsys, checkpoints, data, tmp_path):
    for path in (checkpoints / "bert").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    message = error_of(capsys, "prune", tmp_path, "--data", data / "d.csv", "--text-column", "text", "--dry-run")
    assert "no weights for bert.encoder.layer.4" in message


def test_out_is_required_and_not_overwritten_by_chance(capsys, checkpoints, data, tmp_path):
    common = ("prune", checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text", "--num-blocks", "3")
    assert "-o OUT" in error_of(capsys, *common)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "not empty" in error_of(capsys, *common, "-o", out)
    assert "this command did not write" in error_of(capsys, *common, "-o", out, "--overwrite")
    assert "is a file" in error_of(capsys, *common, "-o", out / "precious.txt")
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    (out / "precious.txt").unlink()
    assert run(capsys, *common, "-o", out)[0] == 0
    assert run(capsys, *common[:-1], "2", "-o", out, "--overwrite")[0] == 0
    assert PruningPlan.from_json(out / "pruning_plan.json").num_kept == 2
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_interrupt_leaves_nothing_behind(capsys, checkpoints, data, tmp_path, monkeypatch):
    def half(model, folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(loading_module, "save_pruned", half)
    arguments = ("prune", checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text", "--num-blocks", "3")
    code, _, err = run(capsys, *arguments, "-o", tmp_path / "new" / "out")
    assert code == 130
    assert "interrupted" in err
    assert list((tmp_path / "new").iterdir()) == []


def test_failed_run_keeps_the_old_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(KeyboardInterrupt), whole_folder(out, replace=True) as folder:
        (folder / "new").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["old"]


def test_without_matplotlib_the_heatmap_is_left_out(capsys, checkpoints, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ("prune", checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text", "--num-blocks", "3")
    code, _, err = run(capsys, *arguments, "-o", tmp_path / "out")
    assert code == 0
    assert 'info: no heatmap. A heatmap needs matplotlib: pip install "deeparc_hf[plots]"' in err
    assert not (tmp_path / "out" / "heatmap.png").exists()


def test_without_pillow_images_are_refused_with_what_to_install(capsys, checkpoints, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = error_of(capsys, "prune", checkpoints / "vit", "--data", data / "d.csv", "--dry-run")
    assert 'pip install "deeparc_hf[images]"' in message


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (["--num-blocks", "4"], "4"),
        (["--num-blocks", "bert.encoder.layer=4"], "bert.encoder.layer=4"),
        (["--keep-ratio", "1"], "1"),
    ],
)
def test_who_gave_a_target_that_keeps_all_is_not_told_to_give_one(capsys, checkpoints, data, target, found):
    common = ("prune", checkpoints / "bert", "--data", data / "d.csv", "--text-column", "text", "--dry-run")
    code, _, err = run(capsys, *common, *target)
    assert code == 0 and f"{target[0]} {found} keeps all of its 4 blocks: give a smaller number." in err
    assert "or give --" not in err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["prune", "--threshold", "1.5"], None),
        (["prune", "--threshold", "1.98"], None),
        (["prune", "--threshold", "2"], "0.02"),
        (["prune", "--keep-ratio", "1.5"], None),
        (["prune", "--keep-ratio", "50"], "0.5"),
        (["sparsify", "--sparsity", "1.5"], None),
        (["sparsify", "--sparsity", "30"], "0.3"),
    ],
)
def test_a_percentage_is_suspected_only_where_it_may_be_one(capsys, data, tmp_path, arguments, hint):
    command, *given = arguments
    message = error_of(capsys, command, "nowhere", "--data", data / "d.csv", "-o", tmp_path / "out", *given)
    assert (f"Did you mean {hint}?" in message) if hint else ("Did you mean" not in message)


def test_debug_raises(capsys, tmp_path):
    with pytest.raises(OSError, match=r"has no config\.json"):
        main(["inspect", str(tmp_path), "--debug"])


def test_overwrite_leaves_the_folder_of_a_training_alone(capsys, checkpoints, data, tmp_path):
    """The callback writes a plan too; its folder holds checkpoints that nobody wants to lose."""
    out = tmp_path / "runs"
    (out / "checkpoint-8").mkdir(parents=True)
    (out / "pruning_plan.json").write_text("{}")
    (out / "training_args.bin").write_text("x")
    arguments = (
        "prune",
        checkpoints / "bert",
        "--data",
        data / "d.csv",
        "--text-column",
        "text",
        "-o",
        out,
        "--overwrite",
    )
    assert "holds 'checkpoint-8', which this command did not write" in error_of(capsys, *arguments)
    (out / "checkpoint-8").rmdir()
    assert "holds 'training_args.bin'" in error_of(capsys, *arguments)
    assert (out / "training_args.bin").exists()


def test_a_tokenizer_that_knows_no_word_is_refused(capsys, checkpoints, data, tmp_path):
    """As one that transformers makes up for a folder without tokenizer files."""
    (tmp_path / "d.csv").write_text("text\n" + "strange unheard words\n" * 64)
    message = error_of(capsys, "prune", checkpoints / "bert", "--data", tmp_path / "d.csv", "--dry-run")
    assert "knows less than half" in message and "tokenizer.save_pretrained" in message


def test_a_malformed_record_is_refused_before_the_work_also_in_a_dry_run(capsys, checkpoints, data, tmp_path):
    shutil.copytree(checkpoints / "bert", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "pruning_config": []}))
    arguments = (
        "prune",
        tmp_path / "bert",
        "--data",
        data / "d.csv",
        "--text-column",
        "text",
        "--num-blocks",
        "3",
        "--dry-run",
    )
    assert "pruning record is malformed" in error_of(capsys, *arguments)


def test_a_config_that_has_fewer_blocks_than_the_checkpoint_is_refused(capsys, checkpoints, data, tmp_path):
    shutil.copytree(checkpoints / "bert", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    arguments = (
        "prune",
        tmp_path / "bert",
        "--data",
        data / "d.csv",
        "--text-column",
        "text",
        "--num-blocks",
        "2",
        "--dry-run",
    )
    assert "for which its config.json has no place" in error_of(capsys, *arguments)


def test_a_downloaded_record_cannot_steer_the_terminal(capsys, checkpoints, tmp_path):
    shutil.copytree(checkpoints / "bert", tmp_path / "bert")
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    record = {"format_version": 1, "base_model": "\x1b[31mevil\nname", "stacks": {}}
    (tmp_path / "bert" / "config.json").write_text(json.dumps({**config, "pruning_config": record}))
    error = error_of(capsys, "inspect", tmp_path / "bert")
    assert "\x1b" not in error and "base_model must be a text of at most 512 visible characters" in error
