"""What serves as calibration data: all that the stock Trainer takes as training data, and batches."""

from __future__ import annotations

import datasets
import pytest
import torch
import transformers as tf
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler
from transformers import Trainer, TrainerState, default_data_collator

from deeparc_hf import WandaCallback
from deeparc_hf.errors import CalibrationError
from deeparc_hf.observe.training_calibration import TrainingCalibration, calibration_of
from deeparc_hf.pruning.config import MPruneConfig
from tests.trainer.test_neighbours_trainers import texts, tokenizer
from tests.trainers import arguments, pruning, text_data
from tests.zoo import ZOO

SIZE = 8
TENSORS = text_data().with_format("torch")


class Rows(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


class Duck:
    """The Trainer asks for no base class."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return text_data()[index]


def with_text():
    """As `map(tokenize)` leaves it: texts of unequal length beside their tokens."""
    words = tokenizer()
    raw = datasets.Dataset.from_dict(
        {"text": [f"{text} {text}" if i % 2 else text for i, text in enumerate(texts(1))], "label": [0, 1] * 32}
    )
    return raw.map(lambda rows: words(rows["text"]), batched=True)


@pytest.mark.parametrize("kind", ["table", "stream", "torch", "list"])
@pytest.mark.parametrize("training", ["table", "torch"])
def test_unused_columns_are_left_out_as_the_trainer_leaves_them_out(tmp_path, kind, training):
    data = with_text()
    made = {"table": data, "stream": data.to_iterable_dataset(), "torch": Rows(data), "list": list(data)}
    model, found = ZOO["bert"].model(), {}
    collator = tf.DataCollatorWithPadding(tokenizer())

    class Kept(tf.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            config = MPruneConfig(num_blocks=2, calibration_samples=16)
            found["batches"] = list(calibration_of(made[kind], config, args, state, kwargs).batches())
            found["training"] = next(iter(kwargs["train_dataloader"])).keys()

    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=1),
        train_dataset=made[training],
        data_collator=collator,
        callbacks=[Kept()],
    )
    trainer.train()
    assert "text" not in found["training"] and all(batch.keys() == found["training"] for batch in found["batches"])
    assert sum(len(batch["labels"]) for batch in found["batches"]) >= 16


def test_a_tokenized_data_set_with_its_texts_serves_both_callbacks(tmp_path):
    data = with_text()
    callbacks = [pruning(num_blocks=3, calibration=data), WandaCallback(sparsity=0.5, calibration=data)]
    trainer = Trainer(
        ZOO["bert"].model(),
        arguments(tmp_path, num_train_epochs=1),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()
    assert callbacks[0].plan.samples == 64 and callbacks[1].report.measured > 0.49


def test_columns_of_which_the_model_takes_none_are_named(tmp_path):
    state = TrainerState()
    loader = DataLoader(text_data(), SIZE, collate_fn=default_data_collator)
    event = {"model": ZOO["bert"].model(), "train_dataloader": loader}
    raw = datasets.Dataset.from_dict({"text": texts(1), "source": texts(2)})
    calibration = calibration_of(raw, MPruneConfig(num_blocks=2), arguments(tmp_path), state, event)
    with pytest.raises(CalibrationError, match=r"No column of the calibration data .* found 'text', 'source'"):
        next(calibration.batches())


def batches_of(given, loader=None, **settings):
    config = MPruneConfig(**{"num_blocks": 2, "calibration_samples": 16, **settings})
    return list(TrainingCalibration(given, loader, SIZE, config).batches())


IMAGES = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(16)]
GIVEN = {
    "rows of lists": [text_data()[i] for i in range(16)],
    "rows of tensors": [TENSORS[i] for i in range(16)],
    "rows without labels": [{"input_ids": TENSORS[i]["input_ids"]} for i in range(16)],
    "images": IMAGES,
    "segmentation": [{**row, "labels": torch.zeros(8, 8, dtype=torch.long)} for row in IMAGES],
    "sound": [{"input_values": torch.randn(40), "labels": 1} for _ in range(16)],
    "an object": Duck(),
}
BATCHES = {
    "texts": [TENSORS[i : i + SIZE] for i in (0, 8)],
    "without labels": [{"input_ids": TENSORS[i : i + SIZE]["input_ids"]} for i in (0, 8)],
    "images of one channel": [{"pixel_values": torch.randn(8, 8, 8), "labels": torch.zeros(8)}] * 2,
    "packed images": [{"pixel_values": torch.randn(32, 12), "image_grid_thw": torch.ones(2, 3)}] * 2,
    "plain values": [{"pixel_values": torch.randn(8, 3, 8, 8), "interpolate_pos_encoding": True}] * 2,
    "pairs": [(torch.randn(8, 3, 8, 8), torch.zeros(8))] * 2,
    "tensors": [torch.randn(8, 3, 8, 8)] * 2,
    "a loader": DataLoader(TENSORS, SIZE, sampler=range(16)),
}


@pytest.mark.parametrize("name", GIVEN)
def test_samples_are_collated(name):
    found = batches_of(GIVEN[name])
    assert len(found) == 2 and all(len(value) == SIZE for batch in found for value in batch.values())


@pytest.mark.parametrize("name", BATCHES)
def test_batches_are_taken_as_they_are(name):
    assert [type(batch) for batch in batches_of(BATCHES[name])] == [type(batch) for batch in BATCHES[name]]
    if isinstance(BATCHES[name], list):
        assert all(a is b for a, b in zip(batches_of(BATCHES[name]), BATCHES[name], strict=True))


@pytest.mark.parametrize("given", [{"input_ids": torch.ones(8, 4)}, datasets.DatasetDict(train=text_data())])
def test_one_batch_or_several_data_sets_are_refused(given):
    with pytest.raises(CalibrationError, match="Give one data set, or a list of batches"):
        batches_of(given)


def test_an_iterator_serves_once_and_its_first_batch_is_not_lost():
    class Through:
        def __init__(self):
            self.batches = (batch for batch in BATCHES["texts"])

        def __iter__(self):
            return self.batches

    for given in (iter(BATCHES["texts"]), Through()):
        calibration = TrainingCalibration(given, None, SIZE, MPruneConfig(num_blocks=2))
        assert calibration.first() is BATCHES["texts"][0]
        assert len(list(calibration.batches())) == 2
    for make in (lambda: iter(BATCHES["texts"]), Through):
        with pytest.raises(CalibrationError, match="gone through once"):
            TrainingCalibration(make(), None, SIZE, MPruneConfig(num_blocks=[3, 2], iterations=2), again=True).first()


class Whole(Rows):
    def __getitem__(self, chosen):
        return {key: torch.tensor(value) for key, value in self.data[list(chosen)].items()}


def neighbours():
    class Neighbours(BatchSampler):
        def __iter__(self):
            for first in (32, 0, 16):
                yield list(range(first, first + SIZE))

    return Neighbours(SequentialSampler(range(64)), SIZE, drop_last=False)


LOADERS = {
    "batch sampler": lambda: DataLoader(TENSORS, batch_sampler=neighbours()),
    "no batch size": lambda: DataLoader(Whole(text_data()), batch_size=None, sampler=neighbours()),
    "list": lambda: [TENSORS[first : first + SIZE] for first in (32, 0, 16)],
}


@pytest.mark.parametrize("name", LOADERS)
def test_batches_that_a_loader_makes_by_its_own_rule_are_taken_whole(name):
    calibration = TrainingCalibration(None, LOADERS[name](), SIZE, MPruneConfig(num_blocks=2))
    found = [batch["input_ids"].tolist() for batch in calibration.batches()]
    assert found == [TENSORS[first : first + SIZE]["input_ids"].tolist() for first in (32, 0, 16)]
    assert not calibration.chooses  # no others can be had for a measure
    with pytest.raises(CalibrationError, match="read once"):
        TrainingCalibration(None, iter(LOADERS["list"]()), SIZE, MPruneConfig(num_blocks=2)).first()


@pytest.mark.parametrize("name", ["batch sampler", "no batch size", "list"])
def test_a_training_on_such_a_loader_is_pruned(tmp_path, name):
    class Own(Trainer):
        def get_train_dataloader(self):
            return LOADERS[name]()

    model, callback = ZOO["bert"].model(), pruning(num_blocks=3, calibration_samples=24)
    with pytest.warns(match="only 24 samples"):
        Own(model, arguments(tmp_path, num_train_epochs=1), train_dataset=text_data(), callbacks=[callback]).train()
    assert len(model.bert.encoder.layer) == 3 and callback.plan.samples == 24
