"""Where data came from, as reports and cards tell it."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetInfo, SplitDict

from deeparc_hf.reports.provenance import origin_of

COMMIT = "0123456789abcdef" * 2 + "01234567"


def of_hub(rows, whole=None):
    """A split as load_dataset gives it."""
    data = Dataset.from_dict({"n": list(range(rows))}, split="train")
    source = f"hf://datasets/org/data@{COMMIT}/train.csv"
    info = DatasetInfo(download_checksums={source: {"num_bytes": 1}}, config_name="main")
    if whole is not None:
        info.splits = SplitDict.from_split_dict({"train": {"name": "train", "num_examples": whole}})
    data.info.update(info)
    return data


@pytest.mark.parametrize(("whole", "shown"), [(None, "train"), (20, "train"), (40, "train, 20 of 40 rows")])
def test_a_part_of_a_split_is_not_called_the_split(whole, shown):
    origin = origin_of(of_hub(20, whole))
    assert origin == {"id": "org/data", "revision": COMMIT, "config": "main", "split": shown, "rows": 20}


def test_held_out_rows():
    parts = of_hub(1_200, 1_200).train_test_split(0.1, seed=0)
    held_out = parts["test"].map(lambda row: row)
    assert origin_of(held_out)["split"] == "train, 120 of 1,200 rows"


def test_of_local_data_the_rows_are_known():
    assert origin_of(Dataset.from_dict({"n": [1, 2]}, split="train")) == {"rows": 2}
    assert origin_of([1, 2, 3]) == {"rows": 3} and origin_of(iter(())) == {}
