"""recipes/text_classification.py, end to end on a tiny BERT."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

from deeparc_hf import PrunedConfig
from deeparc_hf.errors import ConfigError
from tests.publishing import tiny_tokenizer
from tests.zoo import ZOO

from .metric_scripts import script
from .running import check_files, parameters, recipe, watched, without_times, words, zeros

main = recipe("text_classification").main
MARKS = {"train": "w100", "validation": "w101", "test": "w102"}
NAMES = ["happy", "sad"]
STACK = "bert.encoder.layer"


def write(file, split, count, names=NAMES):
    """Texts that begin with a mark of their split; one word among them tells the label."""
    draw = random.Random(split)
    with file.open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["text", "label"])
        for number in range(count):
            label = number % len(names)
            others = [f"w{draw.randrange(20, 90)}" for _ in range(draw.randrange(3, 8))]
            table.writerow([" ".join([MARKS[split], f"w{label}", *others]), names[label]])
    return str(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of the three splits, and a tiny model."""
    folder = tmp_path_factory.mktemp("text")
    ZOO["bert"].model().save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    files = {f"{split}_file": write(folder / f"{split}.csv", split, 96 if split == "train" else 24) for split in MARKS}
    return {"model": str(folder / "bert"), "max_length": 16, **files}


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The whole sequence: two iterations with a gate, healing and teaching, and a Wanda grid of which one entry is
    retrained.
    """
    folder = tmp_path_factory.mktemp("run")
    pruning = {
        "finetune_epochs": 2,
        "iterations": 2,
        "num_blocks": [3, 2],
        "retrain_epochs": 1,
        "heal": "lstsq",
        "distill_alpha": 0.5,
        "metric": "accuracy",
        "max_drop": 0.45,
        "k_max": 2,
        "sparsity": [0.25],
        "sparsity_pattern": "2:4",
        "sparsity_retrain": [0.25],
    }
    with watched(tf.BertForSequenceClassification) as seen, redirect_stdout(io.StringIO()) as said:
        rows = main(words(**data, output_dir=str(folder), **pruning))
    return SimpleNamespace(
        rows={row.name: row for row in rows}, folder=folder, seen=seen, data=data, said=said.getvalue()
    )


def test_the_end_tells_where_the_results_lie(run):
    end = run.said.rstrip().splitlines()[-4:]
    assert [line.partition(":")[0] for line in end] == ["Results", "Models", "Card", "To publish it"]
    places = [Path(word) for line in end for word in re.findall(rf"{re.escape(str(run.folder))}[^\s,]*", line)]
    assert all(place.exists() for place in places)
    folders = {run.folder / row.folder for row in run.rows.values() if row.folder is not None}
    assert {*folders, run.folder / "results.md", run.folder / "iteration-2" / "README.md"} <= set(places)
    assert f"deeparc push {run.folder / 'iteration-2'} " in end[-1]


def test_every_model_has_a_row_and_its_files(run):
    models = ["original", "iteration 1", "iteration 2"]
    entries = ["25 % zeros", "25 % zeros, retrained", "2:4 zeros"]
    grid = [f"{model}, {entry}" for model in models for entry in entries]
    assert list(run.rows) == [*models, *grid]
    check_files(run.folder, list(run.rows.values()))


def test_rows_tell_structure_and_settings(run):
    for name, row in run.rows.items():
        stage = name.partition(",")[0]
        assert row.blocks == {STACK: {"original": 4, "iteration 1": 3, "iteration 2": 2}[stage]}
        assert row.measured.samples == 24 and row.measured.seconds > 0
        assert (row.training_seconds is None) == (name.endswith("zeros"))
        if row.folder is not None:
            model = tf.AutoModelForSequenceClassification.from_pretrained(run.folder / row.folder)
            assert model.config.num_hidden_layers == row.blocks[STACK] and row.parameters == parameters(model)
            assert model.config.id2label == dict(enumerate(NAMES))
    first, second = run.rows["iteration 1"], run.rows["iteration 2"]
    assert first.verdict == second.verdict == "accepted" and first.k >= 1 and 0 < first.threshold <= 1
    assert len(run.rows["original"].validation) == 2 and len(first.validation) == 1
    block = parameters(ZOO["bert"].model().get_submodule(STACK)[0])
    assert first.parameters == run.rows["original"].parameters - block == second.parameters + block


def test_accuracies_are_those_of_the_saved_models(run):
    """By a plain forward pass over the test file, text by text."""
    tokenizer = tf.AutoTokenizer.from_pretrained(run.data["model"])
    with open(run.data["test_file"]) as stream:
        texts = list(csv.DictReader(stream))
    for row in run.rows.values():
        if row.folder is None:
            continue
        model = tf.AutoModelForSequenceClassification.from_pretrained(run.folder / row.folder).eval()
        right, losses = 0, []
        for entry in texts:
            label = torch.tensor([NAMES.index(entry["label"])])
            with torch.no_grad():
                output = model(
                    **tokenizer(entry["text"], truncation=True, max_length=16, return_tensors="pt"), labels=label
                )
            right += int(output.logits.argmax() == label)
            losses.append(float(output.loss))
        assert row.measured.metrics["accuracy"] == pytest.approx(right / 24)
        assert row.measured.metrics["loss"] == pytest.approx(sum(losses) / 24, abs=1e-4)
        low, high = row.measured.intervals["accuracy"]
        assert low <= right / 24 <= high


def test_zeros_are_in_the_saved_model(run):
    for name in ("original", "iteration 1", "iteration 2"):
        row = run.rows[f"{name}, 25 % zeros, retrained"]
        model = tf.AutoModelForSequenceClassification.from_pretrained(run.folder / row.folder)
        assert zeros(model, STACK) == pytest.approx(row.sparsity) == pytest.approx(0.25, abs=0.01)
        assert run.rows[f"{name}, 25 % zeros"].sparsity == pytest.approx(0.25, abs=0.01)
        assert run.rows[f"{name}, 2:4 zeros"].sparsity == pytest.approx(0.5)


def test_what_was_frozen_stays_frozen_while_zeros_are_retrained(data, tmp_path):
    pruning = {
        "num_blocks": 3,
        "retrain_epochs": 1,
        "freeze": "partial",
        "sparsity": [0.25],
        "sparsity_retrain": [0.25],
    }
    rows = {row.name: row for row in main(words(**data, output_dir=str(tmp_path), **pruning))}
    before, after = (rows[name] for name in ("iteration 1", "iteration 1, 25 % zeros, retrained"))
    assert 0 < before.frozen == after.frozen < 3 and rows["original, 25 % zeros, retrained"].frozen == 0
    old, new = (tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / row.folder) for row in (before, after))
    frozen = PrunedConfig.from_pretrained(tmp_path / before.folder).frozen[STACK]
    for index, (block, trained) in enumerate(zip(old.get_submodule(STACK), new.get_submodule(STACK), strict=True)):
        pairs = list(zip(block.parameters(), trained.parameters(), strict=True))
        kept = [bool(((left == right) | (right == 0)).all()) for left, right in pairs]
        assert all(kept) if index in frozen else not any(kept)


def test_calibration_and_training_see_training_rows_only(run):
    train = tiny_tokenizer().convert_tokens_to_ids(MARKS["train"])
    # of three samples one is changed, to try what a dimension means
    calibration = [seen for seen in run.seen if not seen.labelled and len(seen.inputs) != 3]
    training = [seen for seen in run.seen if seen.training]
    assert calibration and training
    assert all((seen.inputs[:, 0] == train).all() for seen in [*calibration, *training])
    others = {int(mark) for seen in run.seen if seen.labelled and not seen.training for mark in seen.inputs[:, 0]}
    assert others >= set(tiny_tokenizer().convert_tokens_to_ids([MARKS["validation"], MARKS["test"]]))


def test_the_same_seed_gives_the_same_table(data, tmp_path):
    pruning = {"finetune_epochs": 1, "num_blocks": 3, "retrain_epochs": 1, "heal": "lstsq", "max_train_samples": 40}
    tables = [without_times(main(words(**data, output_dir=str(tmp_path / name), **pruning))) for name in "ab"]
    assert tables[0] == tables[1] and len(tables[0]) == 2


def test_a_pruning_that_costs_too_much_ends_the_table(data, tmp_path):
    """A gate that no pruning passes: the loss would have to fall."""
    file = tmp_path / "settings.yaml"
    file.write_text(
        "finetune_epochs: 1\nretrain_epochs: 1\nlearning_rate: 0.00000001\nnum_blocks: [2]\nk_max: 1\nmax_drop: "
        "0.0\niterations: 2\n"
    )
    rows = main(
        [
            "--config",
            str(file),
            *words(**{**data, "train_file": data["train_file"]}, output_dir=str(tmp_path), learning_rate=None),
        ]
    )
    assert [row.name for row in rows] == ["original"]
    assert "iteration 1: every pruning was taken back" in (tmp_path / "results.md").read_text("utf-8")


def test_without_a_test_file_the_figures_are_of_the_validation_rows_and_say_so(data, tmp_path):
    given = {**data, "test_file": None, "validation_file": None}
    rows = main(words(**given, output_dir=str(tmp_path), finetune_epochs=1, iterations=0))
    assert [row.name for row in rows] == ["original"] and rows[0].measured.samples == 10
    text = (tmp_path / "results.md").read_text("utf-8")
    assert "rows of the training split" in text and "no test split" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "txt"}, "text_column: there is no column 'txt' in the train data.*Did you mean 'text'"),
        ({"label_column": "mood"}, "label_column: there is no column 'mood'"),
        ({"train_file": "nowhere.csv"}, "no file nowhere.csv"),
        ({"train_file": None}, "There is no data"),
        ({"threshold": 98}, "did you mean 0.98"),
        ({"retrain_epochs": 0, "max_drop": 0.1}, "max_drop is about the retraining"),
        ({"sparsity": 0.3, "sparsity_retrain": 0.4}, "sparsity_retrain names shares of the grid"),
    ],
)
def test_wrong_input_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        main(words(**{**data, **changes}, output_dir=str(tmp_path)))


def test_a_label_that_training_lacks_is_refused(data, tmp_path):
    file = write(tmp_path / "odd.csv", "test", 6, [*NAMES, "bored"])
    with pytest.raises(ConfigError, match="'bored' is not among those of the training split: happy, sad"):
        main(words(**{**data, "test_file": file}, output_dir=str(tmp_path)))


def test_an_unknown_key_of_a_config_file_is_refused(data, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("treshold: 0.9\n")
    with pytest.raises(ConfigError, match=r"'treshold'\. Did you mean 'threshold'"):
        main(["--config", str(file), *words(**data, output_dir=str(tmp_path))])


def test_a_model_that_was_pruned_before_is_not_called_the_original(run, tmp_path):
    given = {
        **run.data,
        "model": str(run.folder / "iteration-1"),
        "finetune_epochs": 0,
        "retrain_epochs": 0,
        "num_blocks": 2,
    }
    rows = main(words(**given, output_dir=str(tmp_path / "out")))
    assert [row.blocks[STACK] for row in rows] == [3, 2]
    card = (tmp_path / "out" / "iteration-1" / "README.md").read_text("utf-8")
    assert "Before: the model that this began with, 3 of 4 blocks" in card and "with 2 of its 4 blocks" in card
    top = card.partition("## Use it")[0]
    assert (
        "| not measured | not measured |" in top
        and "No original was measured beside it." in top
        and "| metric | before |" in card
    )
    for path in (tmp_path / "out").rglob("*.json"):
        assert str(tmp_path) not in path.read_text("utf-8") and str(run.folder) not in path.read_text("utf-8"), path


def test_nothing_to_publish_is_said(data, tmp_path, caplog):
    given = {
        **data,
        "finetune_epochs": 0,
        "retrain_epochs": 0,
        "threshold": 1.0,
        "repo_id": "me/x",
        "output_dir": str(tmp_path),
    }
    main(words(**given))
    assert "Nothing was published: no model was made." in (tmp_path / "results.md").read_text("utf-8")
    assert "Nothing was published" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo_id": "me/x", "finetune_epochs": 0, "iterations": 0}, "none is made"),
        ({"push_to_hub": True}, "Give repo_id"),
        ({"num_train_epochs": 5}, "finetune_epochs and retrain_epochs"),
        (
            {"metric": "acuracy", "max_drop": 0.1, "num_blocks": [3], "finetune_epochs": 0, "iterations": 1},
            "not among the metrics .* accuracy, loss",
        ),
    ],
)
def test_what_would_be_ignored_or_do_harm_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        main(words(output_dir=tmp_path, **{**data, **changes}))


def test_a_fine_tuned_model_keeps_the_order_of_its_classes(data, tmp_path):
    """The same model, its classes named in the other order: every answer is the other one."""
    model = ZOO["bert"].model()
    found = []
    for number, names in enumerate((NAMES, NAMES[::-1])):
        model.config.id2label, model.config.label2id = (
            dict(enumerate(names)),
            {name: index for index, name in enumerate(names)},
        )
        model.save_pretrained(tmp_path / f"m{number}")
        tiny_tokenizer().save_pretrained(tmp_path / f"m{number}")
        given = {
            **data,
            "model": str(tmp_path / f"m{number}"),
            "finetune_epochs": 0,
            "iterations": 0,
            "output_dir": tmp_path / f"o{number}",
        }
        found.append(main(words(**given))[0].measured.metrics["accuracy"])
    assert found[0] == pytest.approx(1 - found[1])


def test_a_folder_with_the_results_of_another_experiment_is_left_alone(run):
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    with pytest.raises(ConfigError, match=r"holds experiment\.json of an earlier experiment\. To go on with it"):
        main(words(**{**run.data, "num_blocks": 3}, output_dir=str(run.folder)))
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_a_row_without_a_text_is_refused(data, tmp_path):
    (tmp_path / "gap.csv").write_text("text,label\nw1 w2,happy\n,sad\n")
    with pytest.raises(ConfigError, match="text_column: 1 row has no text in the column 'text' of the test data"):
        main(words(**{**data, "test_file": str(tmp_path / "gap.csv")}, output_dir=str(tmp_path / "out")))


def test_a_model_without_a_head_is_not_taken_as_fine_tuned(data, tmp_path):
    """Its head would be drawn at random, each time it is loaded."""
    ZOO["bert"].model().bert.save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    given = {
        **data,
        "model": str(tmp_path / "bare"),
        "finetune_epochs": 0,
        "iterations": 0,
        "output_dir": tmp_path / "out",
    }
    with pytest.raises(ConfigError, match=r"has no weights for classifier\.bias: it is not fine-tuned"):
        main(words(**given))


def test_what_computes_the_metrics_is_chosen_and_told(data, tmp_path, evaluate_cache):
    """evaluate where it has its script; its place is nobody's business."""
    chosen = {"finetune_epochs": 0, "iterations": 0, "evaluate_scripts": str(script(tmp_path / "scripts", "accuracy"))}
    for name, settings in {"given": chosen, "without": {**chosen, "evaluate_scripts": "cache"}}.items():
        (row,) = main(words(**{**data, **settings}, output_dir=tmp_path / name))
        text = (tmp_path / name / "results.md").read_text()
        told = json.loads((tmp_path / name / "results.json").read_text())["metrics"]["accuracy"]
        assert f"Computed by: accuracy: {told}." in text and str(tmp_path) not in text
        if name == "given":
            assert row.measured.metrics["accuracy"] == 24.25 and "its script from a folder, sha256" in told
        else:
            assert row.measured.metrics["accuracy"] <= 1 and told.startswith("the share of right answers (")


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"search": "greedy", "heal": "lstsq", "num_blocks": [3, 2], "iterations": 2}, [4, 3, 2]),
        ({"speedup": 1.05, "iterations": 1}, None),
        ({"search": "greedy", "num_blocks": [2], "iterations": 1, "retrain_epochs": 0}, [4, 2]),
    ],
    ids=["search", "speedup", "without retraining"],
)
def test_blocks_can_be_searched_for(data, tmp_path, settings, left):
    given = {**data, "finetune_epochs": 1, "retrain_epochs": 1, **settings}
    rows = main(words(**given, output_dir=tmp_path / "out"))
    counts = [row.blocks[STACK] for row in rows]
    assert counts == left if left else counts[0] == 4 > counts[1]
    card = (tmp_path / "out" / rows[-1].folder / "README.md").read_text()
    assert "(found by greedy search" in card


def test_adapters_are_taught_and_merged(data, tmp_path):
    """LoRA on what stays, the head as the fine-tuning left it or trained with the adapters."""
    settings = {"num_blocks": 3, "retrain_epochs": 1, "lora_rank": 2, "distill_alpha": 0.5, "heal": "lstsq"}
    rows = main(words(**data, **settings, output_dir=str(tmp_path)))
    assert [row.name for row in rows] == ["original", "iteration 1, removed", "iteration 1"]
    before, after = (
        tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict()
        for name in ("iteration-1-removed", "iteration-1")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.endswith(".weight") and before[name].ndim == 2 for name in moved)
    assert not any("embeddings" in name for name in moved) and not list((tmp_path / "iteration-1").glob("adapter*"))
