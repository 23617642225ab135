"""Labels of every kind become the same whole numbers in every split."""

from __future__ import annotations

import datasets
import pytest
from transformers import BertConfig

from deeparc_hf.errors import ConfigError
from experiment.labels import classes_of, encode_labels, label_settings
from experiment.splits import Splits


def part(labels, names=None, column="label"):
    rows = datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(len(labels))], column: labels})
    return rows if names is None else rows.cast_column(column, datasets.ClassLabel(names=names))


def encoded(train, *others, column="label"):
    others = others or (train, train)
    splits, names = encode_labels(Splits(train, *others), column)
    found = [list(each["labels"]) for each in (splits.train, splits.validation, splits.test)]
    assert all(each.column_names == ["text", "labels"] for each in (splits.train, splits.validation, splits.test))
    return found, names


def test_names_are_numbered_in_the_order_of_the_alphabet():
    assert encoded(part(["sad", "happy", "sad"]), part(["happy"]), part(["sad"])) == (
        [[1, 0, 1], [0], [1]],
        ["happy", "sad"],
    )


def test_numbers_stay_and_gaps_count():
    assert encoded(part([0, 2, 2]), part([1]), part([2])) == ([[0, 2, 2], [1], [2]], ["0", "1", "2"])


def test_other_numbers_and_truths_are_numbered():
    assert encoded(part([-1, 1, -1])) == ([[0, 1, 0]] * 3, ["-1", "1"])
    assert encoded(part([0.0, 4.5])) == ([[0, 1]] * 3, ["0.0", "4.5"])
    assert encoded(part([True, False]))[0] == [[1, 0]] * 3
    assert encoded(part([7, 100_000]))[1] == ["7", "100000"]


def test_class_labels_keep_their_names_and_nothing_is_written_anew():
    train = part([1, 0, 1], ["no", "yes"])
    splits, names = encode_labels(Splits(train, train, train), "label")
    assert names == ["no", "yes"] and list(splits.train["labels"]) == [1, 0, 1]
    assert splits.train.cache_files == train.cache_files and splits.train._fingerprint != train._fingerprint


def test_class_labels_of_another_split_are_matched_by_name():
    train, lacking = part([0, 1, 2], ["a", "b", "c"]), part([0, 1, 0], ["b", "c"])
    assert encoded(train, lacking, lacking)[0] == [[0, 1, 2], [1, 2, 1], [1, 2, 1]]


@pytest.mark.parametrize(
    ("data", "model", "found"),
    [
        (["crane", "maillot", "crane2"], ["crane", "maillot", "crane"], ["crane", "maillot", "crane2"]),
        (["0", "1", "2"], ["crane", "maillot", "crane"], ["0", "1", "2"]),  # numbers go with any names
    ],
)
def test_two_classes_of_one_name_stay_two(data, model, found):
    """ImageNet has two classes "crane", a bird and a machine; its checkpoints call both so, its data set one crane2."""
    train = part([0, 2, 1, 2], data)
    splits, names = encode_labels(Splits(train, train, train), "label", order=model)
    assert list(splits.test["labels"]) == [0, 2, 1, 2] and names == found
    assert len(BertConfig(**label_settings(names)).label2id) == 3


def test_a_model_whose_names_are_not_the_data_s_is_refused_also_where_two_are_alike():
    train = part([0, 2, 1, 2], ["a", "b", "c"])
    with pytest.raises(ConfigError, match=r"The model's classes are crane, maillot, crane \(2\), the data's a, b, c"):
        encode_labels(Splits(train, train, train), "label", order=["crane", "maillot", "crane"])
    train = part([0, 2, 1, 2], ["crane2", "maillot", "crane"])  # numbered otherwise, or not: nobody can tell
    with pytest.raises(ConfigError, match="The model's classes are"):
        encode_labels(Splits(train, train, train), "label", order=["crane", "maillot", "crane"])


def test_names_and_numbers_may_meet_class_labels():
    train = part([0, 1], ["no", "yes"])
    assert encoded(train, part(["yes", "no"]), part([1, 1])) == ([[0, 1], [1, 0], [1, 1]], ["no", "yes"])


def test_a_column_that_is_called_labels_already():
    assert encoded(part(["b", "a"], column="labels"), column="labels") == ([[1, 0]] * 3, ["a", "b"])
    assert encoded(part([1, 0], column="labels"), column="labels") == ([[1, 0]] * 3, ["0", "1"])
    both = part(["b", "a"]).add_column("labels", [9, 9])
    assert encoded(both) == ([[1, 0]] * 3, ["a", "b"])


def test_chosen_rows_are_numbered_like_the_others():
    train = part(["c", "a", "b", "a"]).select([3, 2])
    assert encoded(train) == ([[0, 1]] * 3, ["a", "b"])


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (part(["a", "b"]), part(["c"]), r"The label 'c' is not among those of the training split: a, b\."),
        (part([0, 1]), part([2]), "The label 2 is not among"),
        (part([0, 1], ["no", "yes"]), part([-1], ["no", "yes"]), "The label -1 is not among"),
        (part([0, 1], ["no", "yes"]), part([5]), "The label 5 is not among"),
        (part(["a", None]), part(["a"]), "A row has no label in the column 'label'"),
        (part([str(n) for n in range(10_001)]), part(["1"]), "10,001 different values: these are no classes"),
    ],
)
def test_labels_that_cannot_be_are_refused(train, test, message):
    with pytest.raises(ConfigError, match=message):
        encode_labels(Splits(train, train, test), "label")


def test_a_missing_column_is_refused():
    with pytest.raises(ConfigError, match=r"label_column: there is no column 'lable'.*Did you mean 'label'"):
        encode_labels(Splits(part([0]), part([0]), part([0])), "lable")


def test_labels_are_numbered_as_a_fine_tuned_model_numbers_them():
    train = part(["negative", "positive"])
    splits, names = encode_labels(Splits(train, train, train), "label", ["positive", "negative"])
    assert names == ["positive", "negative"] and list(splits.test["labels"]) == [1, 0]
    numbers = part([0, 1])
    assert encode_labels(Splits(numbers, numbers, numbers), "label", ["positive", "negative"])[1] == [
        "0",
        "1",
    ]  # nothing to go by
    with pytest.raises(ConfigError, match="The model's classes are a, b, the data's negative, positive"):
        encode_labels(Splits(train, train, train), "label", ["a", "b"])


def test_classes_that_nobody_named_are_none():
    assert classes_of(BertConfig(num_labels=3)) is None and classes_of(object()) is None
    assert classes_of(BertConfig(id2label={1: "b", 0: "a"})) == ["a", "b"]
