"""The three splits: files, folders and data sets, what is held out, what is said, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import datasets
import pytest

from deeparc_hf.errors import ConfigError
from experiment.arguments import DataArguments
from experiment.splits import Splits, load_splits


def rows_of(start, count):
    return [{"text": f"t{number}", "label": number % 2} for number in range(start, start + count)]


@pytest.fixture
def files(tmp_path):
    """Files of four kinds."""
    (tmp_path / "train.csv").write_text(
        "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows_of(0, 30))
    )
    (tmp_path / "validation.tsv").write_text(
        "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows_of(30, 6))
    )
    datasets.Dataset.from_list(rows_of(36, 7)).to_parquet(tmp_path / "test.parquet")
    datasets.Dataset.from_list(rows_of(43, 5)).to_json(tmp_path / "test.jsonl")
    (tmp_path / "lines.txt").write_text("one\ntwo\n")
    return {name.partition(".")[0]: str(tmp_path / name) for name in ("train.csv", "validation.tsv", "test.parquet")}


def load(files, **given):
    named = {f"{use}_file": file for use, file in files.items()}
    return load_splits(DataArguments(model="m", **{**named, **given}), seed=5)


def test_files(files, tmp_path):
    splits = load(files)
    assert list(splits.train["text"]) == [f"t{number}" for number in range(30)]
    assert list(splits.validation["label"]) == [number % 2 for number in range(30, 36)]
    assert len(splits.test) == 7 and splits.notes == ()
    other = load(files, test_file=str(tmp_path / "test.jsonl"), validation_file=str(tmp_path / "lines.txt"))
    assert len(other.test) == 5 and list(other.validation["text"]) == ["one", "two"]


def test_without_validation_rows_a_tenth_is_held_out_by_the_seed(files):
    del files["validation"]
    splits, again = load(files), load(files)
    train, held = set(splits.train["text"]), set(splits.validation["text"])
    assert len(train) == 27 and len(held) == 3 and not train & held
    assert list(again.validation["text"]) == list(splits.validation["text"])
    assert (
        len(splits.test) == 7 and len(splits.notes) == 1 and "judged on 3 rows of the training split" in splits.notes[0]
    )


def test_what_is_not_judged_on_is_trained_on(files):
    del files["validation"]
    splits = load(files, max_validation_samples=1)
    assert (len(splits.train), len(splits.validation)) == (29, 1)
    assert not {*splits.validation["text"]} & {*splits.train["text"]}
    del files["test"]  # the figures are of the same rows then, and want as many as before
    splits = load(files, max_validation_samples=1)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (27, 1, 3)


def test_without_test_rows_the_figures_are_of_the_validation_rows(files):
    del files["test"]
    splits = load(files)
    assert list(splits.test["text"]) == list(splits.validation["text"])
    assert len(splits.notes) == 1 and "no test split" in splits.notes[0]


def test_limits_shuffle_by_the_seed(files):
    splits = load(files, max_train_samples=4, max_validation_samples=100, max_test_samples=2)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [4, 6, 2]
    assert (
        list(splits.train["text"]) == list(load(files, max_train_samples=4).train["text"]) != ["t0", "t1", "t2", "t3"]
    )


def test_a_data_set_with_splits_by_name(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 9), ("test", 3)):
        datasets.Dataset.from_list(rows_of(0, count)).to_csv(folder / f"{name}.csv")
    splits = load({}, dataset=str(folder), validation_split="test", test_split="test")
    assert len(splits.validation) == len(splits.test) == 3 and "no test split of its own" in splits.notes[0]
    splits = load({}, dataset=str(folder), validation_split="held out")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 1, 3)
    with pytest.raises(ConfigError, match="no split 'trian' to train on; there are train, test"):
        load({}, dataset=str(folder), train_split="trian")


def test_a_folder_of_a_split(files, tmp_path):
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(rows_of(0, 12)).to_csv(tmp_path / "folder" / "rows.csv")
    assert len(load(files, train_file=str(tmp_path / "folder")).train) == 12


def test_what_cannot_be_read_is_refused(files, tmp_path):
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "bare").write_text("x")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "header.csv").write_text("text,label\n")
    (tmp_path / "one.csv").write_text("text,label\nt,0\n")
    for file, message in {
        "none.csv": "There is no file",
        "notes.docx": r"cannot read \.docx",
        "bare": "cannot read a file without an ending",
        "broken.json": "cannot be read, or has no rows",
        "header.csv": "has no rows",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(files, test_file=str(tmp_path / file))
    with pytest.raises(ConfigError, match="nothing can be held out"):
        load({"train": str(tmp_path / "one.csv")})
    with pytest.raises(ConfigError, match="There is no data: give dataset"):
        load({})


def test_where_each_split_came_from(files):
    del files["validation"]
    splits = load(files, max_test_samples=4)
    with open(files["train"], "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    assert splits.sources["train"] == {
        "file": "train.csv",
        "sha256": digest,
        "part": "all but 3 rows, by seed 5",
        "rows": 27,
    }
    assert splits.sources["validation"] == {
        "file": "train.csv",
        "sha256": digest,
        "part": "3 rows, held out by seed 5",
        "rows": 3,
    }
    assert splits.sources["test"]["file"] == "test.parquet" and splits.sources["test"]["rows"] == 4
    assert splits.each(lambda part: part).sources == splits.sources
    del files["test"]
    assert load(files).sources["test"] == {**splits.sources["validation"], "same as": "validation"}


def test_data_that_was_trained_on_is_no_measure(files, tmp_path):
    copy = tmp_path / "copy.csv"
    copy.write_bytes(Path(files["train"]).read_bytes())  # another name for the same rows
    with pytest.raises(ConfigError, match=r"The test data is the training data: .* Give other data"):
        load(files, test_file=str(copy))
    with pytest.raises(ConfigError, match="The validation data is the training data"):
        load(files, validation_file=files["train"])
    splits = load(files, validation_file=files["test"])  # judged on what is measured on: that is said
    assert splits.sources["test"]["same as"] == "validation" and "optimistic" in splits.notes[0]
    (tmp_path / "data").mkdir()
    for name, rows in (("train", rows_of(0, 9)), ("test", rows_of(9, 3))):
        datasets.Dataset.from_list(rows).to_json(tmp_path / "data" / f"{name}.jsonl")
    given = {"model": "m", "dataset": str(tmp_path / "data")}
    with pytest.raises(ConfigError, match="The test data is the training data"):
        load_splits(DataArguments(**given, test_split="train"), 0)
    splits = load_splits(DataArguments(**given, validation_split="test"), 0)
    assert "same as" in splits.sources["test"] and len(splits.train) == 9


def test_data_that_cannot_be_loaded_is_named(tmp_path):
    datasets.Dataset.from_list(rows_of(0, 3)).to_json(tmp_path / "train.jsonl")
    given = DataArguments(model="m", dataset=str(tmp_path), dataset_config="nope")
    with pytest.raises(ConfigError, match=r"The data \(dataset='.*', dataset_config='nope'\) cannot be loaded: .*nope"):
        load_splits(given, 0)


def test_a_text_in_every_row():
    parts = [datasets.Dataset.from_dict({"text": texts}) for texts in (["a", ""], ["a", None, None], ["a"])]
    Splits(parts[0], parts[0], parts[2]).need_texts(text_column="text", text_pair_column=None)
    with pytest.raises(
        ConfigError,
        match=r"text_column: 2 rows have no text in the column 'text' of the test data\. Leave such rows out\.",
    ):
        Splits(parts[0], parts[0], parts[1]).need_texts(text_column="text")
    chosen = parts[1].select([0])  # rows that are not chosen do not count
    Splits(chosen, chosen, chosen).need_texts(text_column="text")
    numbers = datasets.Dataset.from_dict({"text": [1, 2]})
    with pytest.raises(ConfigError, match="'text' of the validation data holds int64, no texts"):
        Splits(parts[0], numbers, parts[0]).need_texts(text_column="text")
    with pytest.raises(ConfigError, match="Did you mean 'text'"):
        Splits(parts[0], parts[0], parts[0]).need_texts(text_column="texts")


def test_columns_that_are_needed():
    whole, other = datasets.Dataset.from_list(rows_of(0, 2)), datasets.Dataset.from_list([{"text": "t"}])
    Splits(whole, whole, whole).need(text_column="text", text_pair_column=None, label_column="label")
    with pytest.raises(
        ConfigError, match=r"label_column: there is no column 'label' in the test data; there are 'text'\."
    ):
        Splits(whole, whole, other).need(label_column="label")
    with pytest.raises(ConfigError, match="Did you mean 'text'"):
        Splits(whole, whole, other).need(text_column="texts")


def test_work_on_each_split_keeps_the_notes():
    part = datasets.Dataset.from_list(rows_of(0, 3))
    splits = Splits(part, part, part, ("a note",)).map(
        lambda rows: {"n": [len(text) for text in rows["text"]]}, keep=["text"]
    )
    assert splits.notes == ("a note",) and all(
        part["n"][0] == 2 for part in (splits.train, splits.validation, splits.test)
    )
    assert splits.test.column_names == ["text", "n"]
    other = part.add_column("more", [1, 2, 3])  # a column that one split alone has goes too
    assert Splits(part, part, other).map(lambda rows: {"n": rows["label"]}).test.column_names == ["n"]


def test_a_file_stands_for_one_split_of_a_data_set(files, tmp_path):
    (tmp_path / "data").mkdir()
    for name, rows in (("train", rows_of(0, 9)), ("test", rows_of(9, 3))):
        datasets.Dataset.from_list(rows).to_json(tmp_path / "data" / f"{name}.jsonl")
    given = {"model": "m", "dataset": str(tmp_path / "data")}
    assert len(load_splits(DataArguments(**given), 0).test) == 3
    splits = load_splits(DataArguments(**given, test_file=files["test"]), 0)
    assert len(splits.test) == 7 and len(splits.train) == 8  # a tenth is held out
    with pytest.raises(ConfigError, match="There is no file"):
        load_splits(DataArguments(**given, test_file=str(tmp_path / "nothing.csv")), 0)
    with pytest.raises(ConfigError, match="There is no split 'tset' to measure on; there are train, test"):
        load_splits(DataArguments(**given, test_split="tset"), 0)
