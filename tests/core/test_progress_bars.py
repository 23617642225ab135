"""Progress bars: each pass over data shows one, it counts to what there is,
and nobody sees one who did not want any.
"""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from deeparc_hf import analyze, heal_model, prune_model, remove_blocks, sparsify_model
from deeparc_hf.core import progress_bars as bars_module
from deeparc_hf.core.progress_bars import bar, samples_in, shows_bars
from deeparc_hf.observe.training_calibration import TrainingCalibration
from deeparc_hf.pruning.config import MPruneConfig
from tests.trainers import pruning, text_data, train
from tests.zoo import ZOO

ROWS = 40
LAYERS = "bert.encoder.layer"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def shown(monkeypatch):
    """The bars that a terminal showed: title, total at the start, total and count at the end."""
    made, terminal = [], Terminal()

    class Recorded(bars_module.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "file": terminal})
            if not self.disable:
                self.first = self.total
                made.append(self)

    monkeypatch.setattr(bars_module, "tqdm", Recorded)
    return lambda: [(bar.desc, bar.first, bar.total, bar.n) for bar in made]


def ends(bars, unit_bars=("Saving", "Removing", "Bringing")):
    """Title and count of the bars that count; each ended full, and none was ever beyond its end."""
    counting = [entry for entry in bars if not entry[0].startswith(unit_bars)]
    assert all(total == count for _, _, total, count in counting)
    assert all(first is None or first <= count or first == total for _, first, total, count in counting)
    return [(title, count) for title, _, _, count in counting]


class Stream(IterableDataset):
    def __iter__(self):
        yield from (
            {"input_ids": torch.tensor([5 + i, 7, 9]), "attention_mask": torch.ones(3, dtype=torch.long)}
            for i in range(ROWS)
        )


TENSORS = TensorDataset(torch.zeros(70, 4))


@pytest.mark.parametrize(
    ("batches", "samples"),
    [
        ([{"input_ids": torch.zeros(8, 3)}, {"input_ids": torch.zeros(5, 3)}], 13),
        ([(torch.zeros(8, 3), torch.zeros(8))] * 2, 16),
        ((torch.zeros(4, 3),), 4),
        ([], 0),
        (DataLoader(TENSORS, 16), 70),
        (DataLoader(TENSORS, 16, drop_last=True), 64),
        (DataLoader(TENSORS, 16, sampler=SubsetRandomSampler(range(20))), 20),
        (DataLoader(TENSORS, batch_sampler=BatchSampler(range(30), 8, drop_last=True)), 24),
        (DataLoader(TENSORS, batch_size=None), None),
        (DataLoader(Stream(), 8), None),
        (iter([torch.zeros(4, 3)]), None),
        ("nonsense", None),
        (TrainingCalibration(text_data(rows=ROWS), None, 8, MPruneConfig(calibration_samples=32)), 32),
        (TrainingCalibration(text_data(rows=ROWS), None, 8, MPruneConfig()), ROWS),
        (TrainingCalibration(text_data(rows=ROWS), None, 8, MPruneConfig(), skip=30), 10),
        (TrainingCalibration(text_data(rows=ROWS), None, 8, MPruneConfig(), skip=90), 0),
        (TrainingCalibration([torch.zeros(4, 3)], None, 8, MPruneConfig()), 4),
        (TrainingCalibration(Stream(), None, 8, MPruneConfig()), None),
    ],
)
def test_samples_are_counted_where_they_can_be(batches, samples):
    assert samples_in(batches) == samples


@pytest.mark.parametrize(
    ("settings", "titles"),
    [
        ({"heal": "lstsq"}, ["Comparing blocks", "Healing site 1 of 1", "Removing blocks and verifying the result"]),
        ({"similarity": "effect"}, ["Skipping blocks", "Removing blocks and verifying the result"]),
    ],
)
@pytest.mark.parametrize("form", ["list", "loader"])
def test_every_pass_of_a_pruning_counts_to_what_there_is(shown, settings, titles, form):
    batches = ZOO["bert"].batches(5)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    if form == "loader":
        batches = DataLoader(
            [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))], 16
        )
    prune_model(ZOO["bert"].model(), batches, num_blocks=3, **settings)
    assert [title for title, *_ in shown()] == titles
    assert ends(shown()) == [(title, rows) for title in titles[:-1]]
    assert all(first == rows for title, first, *_ in shown()[:-1])


def test_as_many_as_are_taken_at_most_are_counted_to(shown):
    batches = ZOO["bert"].batches(6)
    analyze(ZOO["bert"].model(), batches, num_blocks=3, calibration_samples=36)
    assert shown() == [("Comparing blocks", 36, 36, 36)]


def test_batches_of_unknown_number_have_a_bar_without_an_end(shown):
    batches = ZOO["bert"].batches(5)
    analyze(ZOO["bert"].model(), iter(batches), num_blocks=3)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    assert shown() == [("Comparing blocks", None, rows, rows)]


def test_texts_that_stand_side_by_side_are_not_counted_beyond_the_end(shown):
    columns = [
        {f"{side}_{key}": value for side in ("anchor", "positive") for key, value in b.items()}
        for b in ZOO["bert"].batches(5)
    ]
    analyze(ZOO["bert"].model(), columns, num_blocks=3)
    rows = sum(len(batch["anchor_input_ids"]) for batch in columns)
    ((_, first, total, count),) = shown()
    assert first == rows and total == count == 2 * rows


def test_healing_by_hand_and_sparsifying_show_bars(shown):
    original, pruned, batches = ZOO["bert"].model(), ZOO["bert"].model(), ZOO["bert"].batches(5)
    pruned.load_state_dict(original.state_dict())
    remove_blocks(pruned, {LAYERS: [1, 3]})
    heal_model(pruned, original, batches)
    sparsify_model(original, batches, sparsity=0.5, sequential=False)
    rows = sum(len(batch["input_ids"]) for batch in batches)
    assert ends(shown()) == [("Healing site 1 of 2", rows), ("Healing site 2 of 2", rows), ("Measuring inputs", rows)]


def test_every_pass_of_a_training_shows_what_it_does(shown, tmp_path):
    callback = pruning(num_blocks=3, start_epoch=1, heal="lstsq", max_drop=0.0, metric="loss", baseline=0.0, k_max=1)
    quiet = {"eval_strategy": "epoch", "disable_tqdm": False, "report_to": "none"}
    train(ZOO["bert"].model(), tmp_path, callback, data=text_data(rows=ROWS), **quiet)
    titles = [title for title, *_ in shown()]
    for part in (
        "Comparing blocks",
        "Saving the weights from before the pruning",
        "Healing site 1 of 1",
        "Removing blocks and verifying the result",
        "Measuring after the removal",
        "Measuring after the healing",
        "Measuring after the training",
        "Bringing back the weights from before the pruning",
    ):
        assert part in titles
    assert {count for _, count in ends(shown())} == {ROWS}


def test_a_training_without_bars_shows_none(shown, tmp_path):
    train(ZOO["bert"].model(), tmp_path, pruning(num_blocks=3, heal="lstsq"), data=text_data(rows=ROWS))
    assert shown() == []


def test_other_processes_than_the_first_show_none():
    def process(index, disable):
        return SimpleNamespace(process_index=index, disable_tqdm=disable)

    assert shows_bars(process(0, False))
    assert not shows_bars(process(1, False)) and not shows_bars(process(0, True))


def test_without_a_terminal_or_unwanted_nothing_is_written(capsys):
    prune_model(ZOO["bert"].model(), ZOO["bert"].batches(5), num_blocks=3, heal="lstsq")
    assert capsys.readouterr().err == ""
    assert bar("work", False).disable


def test_unwanted_bars_are_not_shown_on_a_terminal_either(shown):
    prune_model(ZOO["bert"].model(), ZOO["bert"].batches(5), num_blocks=3, heal="lstsq", progress=False)
    assert shown() == []
