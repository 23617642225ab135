"""An idle callback changes nothing: what calibration reads comes from objects with states of their own, and they keep
them.

Each set-up is trained twice, without a callback and with one that compares blocks and removes nothing. Batches and
weights must be equal.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import OrderedDict, UserDict

import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils.data import DataLoader, IterableDataset
from transformers import BatchEncoding, Trainer, default_data_collator

from deeparc_hf import WandaCallback
from deeparc_hf.errors import CalibrationError
from deeparc_hf.observe.training_calibration import TrainingCalibration
from deeparc_hf.observe.untouched import apart, untouched
from deeparc_hf.pruning.config import MPruneConfig
from tests.stateful import (
    COLLATORS,
    DATA,
    DRAWS,
    LOADERS,
    ONCE,
    ROWS,
    SHIFTS,
    SIZE,
    Listed,
    Mapped,
    all_kinds,
    reset,
    rows,
    table,
    taking_apart,
)
from tests.trainers import arguments, pruning
from tests.zoo import VOCAB, as_trained


class Noting(Trainer):
    """Notes what it trains on."""

    loader = None

    def get_train_dataloader(self):
        if self.loader is None:
            return super().get_train_dataloader()
        whole = isinstance(self.loader, Listed) or (
            self.loader.batch_size is None and self.loader.batch_sampler is None
        )
        return self.loader if whole else self.accelerator.prepare(self.loader)

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def model():
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB
        )
    )


def language_model():
    torch.manual_seed(0)
    return tf.BertForMaskedLM(
        tf.BertConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB + 1
        )
    )


def trained(folder, callbacks, data=None, collator=None, loader=None, make=model, **settings):
    reset()
    trainer = Noting(
        as_trained(make()),
        arguments(folder, **{"num_train_epochs": 2, "learning_rate": 1e-3, "remove_unused_columns": False, **settings}),
        train_dataset=table() if data is None else data(folder),
        data_collator=collator() if collator else default_data_collator,
        callbacks=callbacks,
    )
    trainer.seen, trainer.loader = [], loader() if loader else None
    trainer.train()
    return trainer


def is_untouched(folder, callback=None, **setting):
    """Trains without a callback and with one, which removes nothing where it is not given."""
    stream = setting.get("max_steps")
    idle = callback or pruning(threshold=1.0, start_epoch=0 if stream else 1, calibration_samples=32)
    plain, beside = trained(folder, [], **setting), trained(folder, [idle], **setting)
    assert len(plain.seen) == (stream or 2 * ROWS // SIZE) and plain.seen == beside.seen
    if callback is None:
        assert idle.plan.samples == 32 and not idle.plan.removed
        left, right = plain.model.state_dict(), beside.model.state_dict()
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def batches(data, collator):
    """Three batches, read in order."""
    return [collator([data[i] for i in range(n * SIZE, (n + 1) * SIZE)])["input_ids"].tolist() for n in range(3)]


@pytest.mark.parametrize("name", [*DRAWS, *SHIFTS])
def test_what_was_read_is_read_again(name):
    """Each kind of state by itself: after a calibration the same comes as without it,
    and the same in each pass of it.
    """

    def made():
        reset()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return (DRAWS[name](), default_data_collator) if name in DRAWS else (table(), SHIFTS[name]())

    expected = batches(*made())
    data, collator = made()
    loader = DataLoader(data, SIZE, shuffle=True, collate_fn=collator)
    calibration = TrainingCalibration(None, loader, SIZE, MPruneConfig(threshold=1.0, calibration_samples=24))
    found = []
    with calibration.reading():
        for _ in range(2):
            found.append([batch["input_ids"].tolist() for batch in itertools.islice(calibration.batches(), 2)])
    assert batches(data, collator) == expected
    same = name == "random states of the process"  # those belong to whoever reads
    assert same or found[0] == found[1]


@pytest.mark.parametrize("name", DATA)
def test_data_sets_with_a_state(tmp_path, name):
    is_stream = isinstance(DATA[name](tmp_path), IterableDataset)
    is_untouched(tmp_path, data=DATA[name], **({"max_steps": 8} if is_stream else {}))


@pytest.mark.parametrize("name", COLLATORS)
def test_collators_with_a_state(tmp_path, name):
    is_untouched(tmp_path, collator=COLLATORS[name], make=language_model if name.startswith("language") else model)


@pytest.mark.parametrize("name", LOADERS)
def test_samplers_and_loaders_with_a_state(tmp_path, name):
    is_untouched(tmp_path, loader=LOADERS[name])


def test_rows_that_a_collator_takes_apart_stay_whole(tmp_path):
    """A list of rows is handed out as it is, and each row is read once in one epoch: the labels are still there."""
    kept = rows()
    for callbacks in ([], [pruning(threshold=1.0, calibration_samples=32)]):
        trainer = trained(
            tmp_path,
            callbacks,
            data=lambda f: [dict(item) for item in kept],
            collator=lambda: taking_apart,
            num_train_epochs=1,
        )
        assert all(not item.keys() & {"labels"} for item in trainer.train_dataset) and len(trainer.seen) == ROWS // SIZE


@pytest.mark.parametrize(
    "setting", [{"data": DATA["all kinds"]}, {"loader": Listed}, {"data": DATA["stream of a list"], "max_steps": 8}]
)
def test_beside_wanda_a_training_sees_the_same(tmp_path, setting):
    start = 0 if "max_steps" in setting else 1
    is_untouched(
        tmp_path, WandaCallback(sparsity=0.3, start_epoch=start, calibration_samples=32), collator=all_kinds, **setting
    )


def test_grouped_by_length(tmp_path):
    is_untouched(tmp_path, train_sampling_strategy="group_by_length", remove_unused_columns=True)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers(tmp_path, persistent):
    """A worker is made of the objects as they are when an epoch begins, or the training."""
    is_untouched(
        tmp_path,
        data=lambda f: DRAWS["numpy generator"](),
        collator=SHIFTS["attribute"],
        dataloader_num_workers=2,
        dataloader_persistent_workers=persistent,
    )


# ---- what can be read once ----


@pytest.mark.parametrize("callback", [pruning, WandaCallback])
@pytest.mark.parametrize("name", ONCE)
def test_a_stream_that_can_be_read_once_is_refused_before_any_step(tmp_path, name, callback):
    settings = {"threshold": 1.0} if callback is pruning else {"sparsity": 0.5}
    with pytest.raises(
        CalibrationError, match=r"read once only.*\n?.*Callback\(calibration=\[\{\"input_ids\": ids, \"attention_mask\""
    ):
        trained(tmp_path, [callback(**settings)], data=ONCE[name], max_steps=2)


def test_beside_such_a_stream_calibration_data_serves(tmp_path):
    batches = [default_data_collator(rows(16))] * 2
    plain = trained(tmp_path, [], data=ONCE["generator"], max_steps=4)
    idle = trained(tmp_path, [pruning(threshold=1.0, calibration=batches)], data=ONCE["generator"], max_steps=4)
    assert plain.seen == idle.seen and plain.seen[0] == [item["input_ids"] for item in rows(SIZE)]


def test_a_large_tensor_that_reading_changes_is_an_error():
    class Large:
        def __init__(self):
            self.table = torch.zeros(1 << 20)

    data = Large()
    with untouched([("the data", data)]) as check:
        check()
        data.table += 1
        with pytest.raises(CalibrationError, match=r"Large\.table in place, a tensor of 4 MB"):
            check()


def test_what_is_shared_stays_shared_and_the_model_is_left_alone():
    rng, net = random.Random(0), torch.nn.Linear(2, 2)
    holder = Mapped(None, first=rng, second=[rng], net=net, iterators=[iter([1, 2, 3])])
    source = holder.iterators[0]
    state = rng.getstate()
    with untouched([("the data", holder)], net):
        rng.random()
        net.note = "kept"
        holder.second.append(1)
        del holder.first
        assert next(holder.iterators[0]) == 1
        holder.new = 1
    assert holder.first is rng and holder.second == [rng] and rng.getstate() == state and not hasattr(holder, "new")
    assert net.note == "kept" and holder.iterators[0] is source and next(source) == 1


@dataclasses.dataclass
class Row:
    ids: list


@pytest.mark.parametrize(
    "row",
    [
        {"ids": [5, 6]},
        BatchEncoding({"ids": [5, 6]}),
        OrderedDict(ids=[5, 6]),
        UserDict(ids=[5, 6]),
        Row([5, 6]),
        ([5, 6],),
    ],
    ids=lambda row: type(row).__name__,
)
def test_a_collator_that_edits_rows_edits_copies(row):
    copied = apart(row)
    ids = copied.ids if isinstance(copied, Row) else copied[0] if isinstance(copied, tuple) else copied["ids"]
    ids.append(7)
    kept = row.ids if isinstance(row, Row) else row[0] if isinstance(row, tuple) else row["ids"]
    assert type(copied) is type(row) and kept == [5, 6] and ids == [5, 6, 7]
