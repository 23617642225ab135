"""The record of a checkpoint: hostile input, composition over prunings, folders, and how it belongs to its model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deeparc_hf import PrunedConfig, remove_blocks
from deeparc_hf.architectures import Layout
from deeparc_hf.checkpoint.record import StackRecord
from deeparc_hf.errors import DeepArcWarning, RecordError
from tests.zoo import ZOO

STACK = "bert.encoder.layer"
LONG = "x" * 10**6


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bert() -> nn.Module:
    return ZOO["bert"].model()


def good() -> dict[str, Any]:
    return {
        "format_version": 1,
        "base_model": "org/model",
        "base_revision": "abc123",
        "stacks": {STACK: {"length": 6, "kept": [0, 2, 5]}, "dec": {"length": 2, "kept": [0, 1]}},
        "iterations": [
            {"removed": {STACK: [1, 3, 4]}, "frozen": {STACK: [5]}, "settings": {"k": 1}, "metrics": {"accuracy": 0.9}}
        ],
        "sparsity": {"target": 0.5},
        "versions": {"torch": "2.14"},
    }


def with_stack(**entries: Any) -> dict[str, Any]:
    """A record whose first stack has these entries."""
    data = good()
    data["stacks"][STACK].update(entries)
    return data


# --- hostile input ----------------------------------------------------------------------------------------------------

WHOLE = [None, [], [good()], "record", 3, True, 1.5, [[[]]]]
ENTRIES = {
    "format_version": [None, 0, -1, 1.0, True, "1", [1], {}],
    "stacks": [
        None,
        [],
        "enc",
        5,
        {"enc": None},
        {"enc": []},
        {"enc": [0, 1]},
        {"enc": {}},
        {"enc": {"enc": {"enc": {}}}},
        {"": {"length": 1, "kept": [0]}},
        {LONG: {"length": 1, "kept": [0]}},
        {LONG: None},
        {3: {"length": 1, "kept": [0]}},
        {f"stack{i}": {"length": 1, "kept": [0]} for i in range(5000)},
    ],
    "iterations": [None, {}, 1, "", "abc", [1], [[]], [None], ["x"], [{}] * 10**6],
    "base_model": [3, [], {}, True, LONG],
    "base_revision": [3, [], {}, True, LONG],
    "sparsity": [1, [], "half", True],
    "versions": [None, [], "2", {"torch": 2}, {"torch": None}, {"torch": ["2"]}, {"torch": LONG}],
}
LENGTHS = [None, 0, -1, -(10**9), 6.0, True, "6", [6], {}, 10**6, 10**30]
KEPT = [
    None,
    [],
    {},
    {"0": 1},
    0,
    "025",
    LONG,
    [-1, 2, 5],
    [0, 2, 6],
    [0, 2, 10**30],
    [0, 2, 2],
    [0, 0],
    [5, 2, 0],
    [0, 5, 2],
    [True],
    [False, True],
    [0.0, 2.0],
    [0.5],
    ["0", "2"],
    [None],
    [[0]],
    [{}],
    [0, 1, 2, 3, 4, 5, 5],
    list(range(10**6)),
    [0] * 10**6,
]
HOSTILE = [
    *((None, value) for value in WHOLE),
    *((key, {**good(), key: value}) for key, values in ENTRIES.items() for value in values),
    *((f"stacks.{STACK}.length", with_stack(length=value)) for value in LENGTHS),
    *((f"stacks.{STACK}.kept", with_stack(kept=value)) for value in KEPT),
    *((f"stacks.{STACK}.length", with_stack(length=10**6, kept=kept)) for kept in ([0], list(range(10**6)))),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("where", "data"), HOSTILE, ids=[f"{i}-{where or 'whole'}" for i, (where, _) in enumerate(HOSTILE)]
)
def test_malformed_record_is_refused_with_place_finding_and_way_out(where, data):
    with pytest.raises(RecordError) as caught:
        PrunedConfig.from_dict(data)
    message = str(caught.value)
    assert (where or "pruning_config") in message or where == "stacks"  # of a bad stack its own name is given
    assert "must be" in message
    assert "found" in message
    assert "Download the checkpoint again, or delete 'pruning_config'" in message
    assert len(message) < 1000


@pytest.mark.parametrize("key", ["format_version", "stacks"])
def test_missing_entry_is_named(key):
    data = good()
    del data[key]
    with pytest.raises(RecordError, match=rf"{key} must be"):
        PrunedConfig.from_dict(data)


@pytest.mark.parametrize("version", [2, 99, 10**30, 10**5000], ids=["next", "99", "long", "longer"])
def test_newer_format_says_how_to_read_it(version):
    with pytest.raises(RecordError, match=r"newer than 1.*pip install -U deeparc_hf") as caught:
        PrunedConfig.from_dict({**good(), "format_version": version})
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("data", [with_stack(length=10**5000), with_stack(kept=[0, 10**5000])], ids=["length", "kept"])
def test_number_too_long_to_print_is_refused(data):
    with pytest.raises(RecordError):
        PrunedConfig.from_dict(data)


def test_missing_optional_entries_are_fine():
    record = PrunedConfig.from_dict({"format_version": 1, "stacks": {"enc": {"length": 2, "kept": [1]}}})
    assert record == PrunedConfig({"enc": StackRecord(2, (1,))})


@pytest.mark.parametrize(
    "extra",
    [{"colour": 1}, {LONG: 1}, {f"key{i}": i for i in range(10_000)}, {3: 1}],
    ids=["one", "long", "many", "number"],
)
def test_unknown_entries_warn_shortly_and_are_ignored(extra):
    with pytest.warns(DeepArcWarning, match=r"does not know and ignores.*pip install -U deeparc_hf") as caught:
        record = PrunedConfig.from_dict({**good(), **extra})
    assert record == PrunedConfig.from_dict(good())
    assert len(str(caught[0].message)) < 1000


@pytest.mark.parametrize(
    "entry",
    [
        {"frozen": 5},
        {"frozen": {STACK: 5}},
        {"frozen": {STACK: "abc"}},
        {"frozen": {STACK: [[0]]}},
        {"frozen": {STACK: [99, -1]}},
        {"frozen": [STACK]},
        {"removed": {STACK: None}, "thresholds": 3},
        {},
    ],
    ids=str,
)
def test_junk_within_an_iteration_is_harmless_or_refused(entry):
    try:
        record = PrunedConfig.from_dict({**good(), "iterations": [entry]})
    except RecordError:
        return
    assert all(0 <= i < 3 for indices in record.frozen.values() for i in indices)
    assert record.renamed("bert", ["encoder.layer"]).kept["encoder.layer"] == (0, 2, 5)
    assert json.dumps(record.to_dict())


@pytest.mark.timeout(60)
def test_largest_record_that_is_allowed_is_read():
    stacks = {f"stack{i}": {"length": 4096, "kept": list(range(1, 4096))} for i in range(256)}
    record = PrunedConfig.from_dict({"format_version": 1, "stacks": stacks})
    assert record.removed["stack255"] == (0,)


# --- round trip and composition ---------------------------------------------------------------------------------------


def test_round_trip():
    record = PrunedConfig.from_dict(good())
    assert record.to_dict() == good()
    assert PrunedConfig.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    assert record.kept == {STACK: (0, 2, 5), "dec": (0, 1)}
    assert record.removed == {STACK: (1, 3, 4), "dec": ()}


def test_from_dict_leaves_its_input_alone():
    data = good()
    PrunedConfig.from_dict(data).to_dict()["iterations"].clear()
    assert data == good()


def test_two_prunings_compose_to_original_indices():
    empty = PrunedConfig({}, "org/model", "abc")
    first = empty.compose(
        Layout.without({"enc": 8, "dec": 4}, {"enc": [1, 2, 5]}),
        {"removed": {"enc": [1, 2, 5]}, "frozen": {"enc": [7]}, "note": "a"},
    )
    # left of enc: 0 3 4 6 7
    assert first.kept == {"enc": (0, 3, 4, 6, 7), "dec": (0, 1, 2, 3)}
    second = first.compose(
        Layout.without({"enc": 5, "dec": 4}, {"enc": [1, 3], "dec": [2]}),
        {"removed": {"enc": [1, 3], "dec": [2]}, "frozen": {"enc": [2, 4]}},
    )
    # of these 1 and 3 are the original 3 and 6; 2 and 4 are 4 and 7
    assert second.stacks == {"enc": StackRecord(8, (0, 4, 7)), "dec": StackRecord(4, (0, 1, 3))}
    assert second.removed == {"enc": (1, 2, 3, 5, 6), "dec": (2,)}
    assert second.iterations[0] == {"removed": {"enc": [1, 2, 5]}, "frozen": {"enc": [7]}, "note": "a"}
    assert second.iterations[1] == {"removed": {"enc": [3, 6], "dec": [2]}, "frozen": {"enc": [4, 7]}}
    assert (second.base_model, second.base_revision) == ("org/model", "abc")
    assert {"python", "torch", "transformers", "deeparc_hf"} <= set(second.versions)
    assert first.kept["enc"] == (0, 3, 4, 6, 7)
    assert PrunedConfig.from_dict(json.loads(json.dumps(second.to_dict()))) == PrunedConfig.from_dict(second.to_dict())


def test_frozen_blocks_are_given_as_the_model_counts_them_now():
    record = PrunedConfig(
        {"enc": StackRecord(8, (0, 4, 7)), "dec": StackRecord(2, (0, 1))}, iterations=({"frozen": {"enc": [4, 7]}},)
    )
    assert record.frozen == {"enc": (1, 2)}
    later = record.compose(
        Layout.without({"enc": 3, "dec": 2}, {"enc": [1]}),
        {"removed": {"enc": [1]}, "frozen": {"enc": [2], "dec": [0]}},
    )
    assert later.frozen == {"enc": (1,), "dec": (0,)}
    assert later.compose(Layout.without({"enc": 2, "dec": 2}, {"dec": [1]}), {"removed": {"dec": [1]}}).frozen == {}
    assert PrunedConfig({}).frozen == {}


@pytest.mark.parametrize(
    ("old", "names", "new"),
    [
        ("bert.encoder.layer", ["encoder.layer"], "encoder.layer"),
        ("encoder.layer", ["bert.encoder.layer"], "bert.encoder.layer"),
        ("bert.encoder.layer", ["bert.encoder.layer"], "bert.encoder.layer"),
        ("other.layer", ["bert.encoder.layer"], "other.layer"),
    ],
)
def test_stacks_are_renamed_as_another_head_names_them(old, names, new):
    entry = {"removed": {old: [1]}, "frozen": {old: [0]}, "thresholds": {old: 0.9}, "settings": {old: 1}}
    record = PrunedConfig({old: StackRecord(3, (0, 2))}, "org/model", iterations=(entry,)).renamed("bert", names)
    assert record.stacks == {new: StackRecord(3, (0, 2))}
    assert record.iterations[0] == {
        "removed": {new: [1]},
        "frozen": {new: [0]},
        "thresholds": {new: 0.9},
        "settings": {old: 1},
    }
    assert record.base_model == "org/model"


# --- folders ----------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes) -> Path:
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_saved_record_is_read_back(tmp_path):
    record = PrunedConfig.from_dict(good())
    record.save_pretrained(tmp_path / "new" / "folder")
    assert PrunedConfig.from_pretrained(tmp_path / "new" / "folder") == record
    assert PrunedConfig.from_pretrained(str(tmp_path / "new" / "folder" / "config.json")) == record


def test_saving_leaves_the_rest_of_config_json_alone(tmp_path):
    write(tmp_path, json.dumps({"model_type": "bert", "name": "größe", "pruning_config": {"old": 1}}))
    PrunedConfig.from_dict(good()).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert data == {"model_type": "bert", "name": "größe", "pruning_config": good()}


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_saving_beside_a_broken_config_json_changes_nothing(text, tmp_path):
    write(tmp_path, text)
    with pytest.raises(RecordError):
        PrunedConfig.from_dict(good()).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text("utf-8") == text


def test_folder_without_config_json(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json\. Give the folder that save_pretrained wrote"):
        PrunedConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"model_type": "bert"}', '{"pruning_config": null}', "[1]", "3"])
def test_config_json_without_a_record(text, tmp_path):
    with pytest.raises(RecordError, match=r"has no pruning record.*was not pruned by deeparc_hf"):
        PrunedConfig.from_pretrained(write(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "not json",
        b"\xff\xfe{",
        "[" * 200_000,
        '{"a":' * 200_000,
        '{"pruning_config": {"format_version": ' + "1" * 5000 + "}}",
    ],
    ids=["empty", "cut off", "words", "not utf-8", "nested lists", "nested objects", "a huge number"],
)
def test_config_json_that_cannot_be_read(text, tmp_path):
    with pytest.raises(RecordError, match=r"is not JSON"):
        PrunedConfig.from_pretrained(write(tmp_path, text))


def test_config_json_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(RecordError, match=r"larger than .* bytes"):
        PrunedConfig.from_pretrained(tmp_path)


def test_malformed_record_in_a_folder(tmp_path):
    write(tmp_path, json.dumps({"pruning_config": with_stack(kept=[2, 1])}))
    with pytest.raises(RecordError, match=r"rising block indices from 0 to 5"):
        PrunedConfig.from_pretrained(tmp_path)


# --- models -----------------------------------------------------------------------------------------------------------


def test_model_carries_the_record_of_its_prunings(bert):
    remove_blocks(bert, {STACK: [1]})
    returned = remove_blocks(bert, {STACK: [1]}, freeze="partial")
    record = PrunedConfig.from_model(bert)
    assert record == PrunedConfig.from_dict(returned.to_dict())
    assert record.stacks == {STACK: StackRecord(4, (0, 3))}
    assert [entry["removed"] for entry in record.iterations] == [{STACK: [1]}, {STACK: [2]}]


def test_model_that_was_not_pruned(bert):
    with pytest.raises(RecordError, match=r"BertForSequenceClassification carries no pruning record"):
        PrunedConfig.from_model(bert)


@pytest.mark.parametrize(
    ("stacks", "message"),
    [
        (
            {STACK: {"length": 6, "kept": [0, 2, 5]}},
            r"3 of 6 blocks of bert\.encoder\.layer are left, but the model has 4.*delete 'pruning_config'",
        ),
        ({STACK: {"length": 6, "kept": [0, 1, 2, 3, 5]}}, r"5 of 6 blocks .* but the model has 4"),
        (
            {"decoder.block": {"length": 6, "kept": [0, 1, 2, 3]}},
            r"'decoder\.block', which this model lacks\. Its stacks: bert\.encoder\.layer",
        ),
        ({STACK: {"length": 6, "kept": [3, 2, 1, 0]}}, r"rising block indices"),
    ],
    ids=["fewer", "more", "another stack", "malformed"],
)
def test_record_that_does_not_fit_its_model(bert, stacks, message):
    bert.config.pruning_config = {"format_version": 1, "stacks": stacks}
    before = copy.deepcopy(bert.config.pruning_config)
    with pytest.raises(RecordError, match=message):
        PrunedConfig.from_model(bert)
    with pytest.raises(RecordError, match=message):
        remove_blocks(bert, {STACK: [1]})
    assert len(bert.bert.encoder.layer) == 4
    assert bert.config.pruning_config == before


def test_one_stack_under_two_names_is_refused(bert):
    stacks = {STACK: {"length": 9, "kept": [0]}, "encoder.layer": {"length": 6, "kept": [0, 1, 2, 3]}}
    bert.config.pruning_config = {"format_version": 1, "stacks": stacks}
    with pytest.raises(RecordError):
        PrunedConfig.from_model(bert)


@pytest.mark.parametrize("name", ["org/model", "bert-base-uncased"])
def test_hub_id_is_recorded(bert, name):
    bert.config._name_or_path = name
    record = remove_blocks(bert, {STACK: [1]})
    assert record.base_model == name


@pytest.mark.parametrize(
    "name", ["", "/srv/models/bert", "a/b/c", "./bert", "../bert", "~/bert", "out/", "C:\\models\\bert"]
)
def test_local_path_is_nobody_elses_business(bert, name):
    bert.config._name_or_path = name
    record = remove_blocks(bert, {STACK: [1]})
    assert (record.base_model, record.base_revision) == (None, None)


def test_folder_that_looks_like_a_hub_id_is_local(bert, tmp_path, monkeypatch):
    bert.save_pretrained(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    loaded = type(bert).from_pretrained("org/model")
    assert loaded.config._name_or_path == "org/model"
    assert remove_blocks(loaded, {STACK: [1]}).base_model is None
    remove_blocks(loaded, {STACK: [1]})
    assert "org/model" not in json.dumps(PrunedConfig.from_model(loaded).to_dict())
