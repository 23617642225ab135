"""An idle callback changes nothing: what calibration reads comes from objects with states of their own, and they keep them.

Each set-up is trained twice, without a callback and with one that compares blocks and removes nothing. Batches and weights must be equal.
"""

from __future__ import annotations

import collections
import functools
import itertools
import multiprocessing
import random
import threading

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from transformers import DataCollatorForLanguageModeling, Trainer, default_data_collator

from deeparc_hf import WandaCallback
from deeparc_hf.callbacks.calibration import Calibration
from deeparc_hf.callbacks.untouched import untouched
from deeparc_hf.config import MPruneConfig
from deeparc_hf.errors import CalibrationError

from .test_neighbours_trainers import tokenizer
from .trainers import arguments, pruning
from .zoo import VOCAB

ROWS, SIZE = 40, 8
TABLE = torch.randint(5, VOCAB, (ROWS, 6), generator=torch.Generator().manual_seed(5))


def row(index, change=0):
    ids = ((TABLE[index] + int(change)) % VOCAB).tolist()
    return {"input_ids": ids, "attention_mask": [1] * 6, "labels": ids[0] % 2}


def rows(count=ROWS):
    return [row(i % ROWS) for i in range(count)]


# ---- data sets ----


class Mapped(Dataset):
    """Every read of a row draws: `draw` gives a number."""

    def __init__(self, draw, **state):
        self.draw = draw
        vars(self).update(state)

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return row(index, self.draw(self))


class Counting(Mapped):
    reads = 0

    def __init__(self):
        pass

    def draw(self, _):
        Counting.reads += 1
        return Counting.reads


class Slotted:
    __slots__ = ("numbers", "reads")

    def __init__(self):
        self.numbers = iter(range(10**6))

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        self.reads = getattr(self, "reads", 0) + 1
        return row(index, next(self.numbers) * self.reads)


class Stream(IterableDataset):
    """Goes on where it was left."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        for item in self.source:
            yield item if isinstance(item, dict) else row(*(int(part) % ROWS for part in item.split()))


class Noisy(IterableDataset):
    """Gone through from the start each time, with noise that goes on."""

    def __init__(self):
        self.noise = np.random.default_rng(3)

    def __iter__(self):
        for index in range(ROWS):
            yield row(index, self.noise.integers(20))


class Queued(IterableDataset):
    """A thread fetches rows, into a queue."""

    def __init__(self):
        self.thread = threading.Thread(target=int)

    def __iter__(self):
        return iter(rows())


def drawn(shared):
    shared.value += 1
    return shared.value


def last_read(data):
    """Depends on the rows that were read before."""
    data.history.append(len(data.history))
    data.seen.setdefault(len(data.seen), data.history[-1])
    data.order.add(len(data.order))
    data.places.append(len(data.places))
    return sum(data.seen.values()) + len(data.order) + data.places[-1]


class State:
    numbers = random.Random(7)


numbers, reads = random.Random(8), 0


def global_numbers(_):
    global reads
    reads += 1
    return numbers.randrange(50) + State.numbers.randrange(50) + reads


def streamed(folder):
    def generate():
        yield from rows()

    return datasets.IterableDataset.from_generator(generate, features=table().features).shuffle(seed=1, buffer_size=16)


def table():
    return datasets.Dataset.from_list(rows())


def transformed():
    noise = torch.Generator().manual_seed(3)

    def change(batch):
        shift = torch.randint(0, 50, (1,), generator=noise).item()
        return {**batch, "input_ids": [[(i + shift) % VOCAB for i in ids] for ids in batch["input_ids"]]}

    return table().with_transform(change)


def in_a_file(folder):
    (folder / "rows.txt").write_text("".join(f"{i} {i % 7}\n" for i in range(400)))
    return Stream((folder / "rows.txt").open("rb"))


# what a data set may draw from, each by itself
DRAWS = {
    "numpy generator": lambda: Mapped(lambda s: s.rng.integers(50), rng=np.random.default_rng(0)),
    "numpy state": lambda: Mapped(lambda s: s.rng.randint(50), rng=np.random.RandomState(0)),
    "torch generator": lambda: Mapped(lambda s: torch.randint(50, (1,), generator=s.rng), rng=torch.Generator()),
    "random": lambda: Mapped(lambda s: s.tools["rng"].randrange(50), tools={"rng": random.Random(0)}),
    "containers": lambda: Mapped(last_read, history=[], seen={}, order=set(), places=collections.deque()),
    "tensor": lambda: Mapped(lambda s: s.count.add_(1), count=torch.zeros(1)),
    "array": lambda: Mapped(lambda s: s.count.__iadd__(1)[0], count=np.zeros(1)),
    "shared memory": lambda: Mapped(lambda s: drawn(s.count), count=multiprocessing.Value("i", 0)),
    "iterator": lambda: Mapped(lambda s: next(s.count) + next(s.pairs)[1], count=itertools.count(), pairs=enumerate(iter(range(9**6)))),
    "class": Counting,
    "slots": Slotted,
    "globals": lambda: Mapped(global_numbers),
    "lists of objects": lambda: ConcatDataset([Mapped(lambda s: s.rng.random() * 50, rng=random.Random(i)) for i in range(2)]),
}


class Together(Dataset):
    """Data sets of all kinds, one row of each in turn."""

    def __init__(self):
        self.parts = [make() for make in DRAWS.values()]

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return self.parts[index % len(self.parts)][index]


DATA = {
    "all kinds": lambda f: Together(),
    "transform": lambda f: transformed(),
    "stream of a list": lambda f: Stream(iter(rows(400))),
    "stream of a map": lambda f: Stream(map(dict, iter(rows(400)))),
    "stream of a file": in_a_file,
    "noisy stream": lambda f: Noisy(),
    "generator function": streamed,
    "stream of a table": lambda f: table().to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=4),
}


# ---- collators ----


class Masking:
    """Changes tokens of a batch by numbers of its own."""

    def __init__(self, draw):
        self.draw = draw

    def __call__(self, batch):
        return shifted(default_data_collator(batch), self.draw())


class Draw(torch.nn.Module):
    """A transform as torchvision has them."""

    def __init__(self):
        super().__init__()
        self.rng = torch.Generator()

    def forward(self):
        return torch.randint(50, (1,), generator=self.rng)


def shifted(batch, change):
    return {**batch, "input_ids": (batch["input_ids"] + int(change)) % VOCAB}


def in_a_closure():
    count = 0

    def collate(batch):
        nonlocal count
        count += 1
        return shifted(default_data_collator(batch), count)

    return collate


def with_an_attribute(batch):
    with_an_attribute.count = getattr(with_an_attribute, "count", 0) + 1
    return shifted(default_data_collator(batch), with_an_attribute.count)


def with_a_global(batch):
    return shifted(default_data_collator(batch), global_numbers(None))


def with_a_default(batch, rng=random.Random(4)):  # noqa: B008
    return shifted(default_data_collator(batch), rng.randrange(50))


def with_numbers(numbers, batch):
    return shifted(default_data_collator(batch), numbers.integers(50))


def taking_apart(batch):
    """Takes labels out of the rows that it is given."""
    labels = torch.tensor([item.pop("labels", 0) for item in batch])
    return {**{key: torch.tensor([item[key] for item in batch]) for key in batch[0]}, "labels": labels}


SHIFTS = {
    "attribute": lambda: Masking(functools.partial(random.Random(0).randrange, 50)),
    "method": lambda: Masking(functools.partial(np.random.default_rng(0).integers, 50)),
    "module": lambda: Masking(Draw()),
    "closure": in_a_closure,
    "function": lambda: with_an_attribute,
    "global": lambda: with_a_global,
    "default": lambda: with_a_default,
    "partial": lambda: functools.partial(with_numbers, np.random.default_rng(0)),
    "random states of the process": lambda: Masking(lambda: torch.randint(50, (1,)) + np.random.randint(50) + random.randrange(50)),
}


def all_kinds():
    """Each kind shifts the tokens once more."""
    parts = [make() for make in SHIFTS.values()]

    def collate(batch):
        for part in parts:
            ids = part(batch)["input_ids"].tolist()
            batch = [{**item, "input_ids": new} for item, new in zip(batch, ids, strict=True)]
        return default_data_collator(batch)

    return collate


COLLATORS = {
    "all kinds": all_kinds,
    "takes apart": lambda: taking_apart,
    "language modelling": lambda: DataCollatorForLanguageModeling(words(), mlm_probability=0.4, seed=3),
}


def words():
    found = tokenizer()
    found.add_special_tokens({"mask_token": "[MASK]"})
    return found


# ---- samplers and loaders ----


class Own(Sampler):
    def __init__(self):
        self.rng = random.Random(0)

    def __len__(self):
        return ROWS

    def __iter__(self):
        return iter(self.rng.sample(range(ROWS), ROWS))


class InBatches(BatchSampler):
    """A rule of its own: only neighbours go together."""

    def __init__(self):
        super().__init__(range(ROWS), SIZE, drop_last=False)
        self.rng = np.random.default_rng(0)

    def __iter__(self):
        for first in self.rng.permutation(ROWS // SIZE):
            yield list(range(first * SIZE, (first + 1) * SIZE))


class Whole(Dataset):
    """Gives whole batches."""

    def __init__(self):
        self.rng = random.Random(2)

    def __len__(self):
        return ROWS

    def __getitem__(self, chosen):
        return shifted(default_data_collator([row(i) for i in chosen]), self.rng.randrange(50))


class Listed:
    """Batches made beforehand, with noise."""

    def __init__(self):
        self.rng = random.Random(2)

    def __len__(self):
        return ROWS // SIZE

    def __iter__(self):
        for first in range(0, ROWS, SIZE):
            yield shifted(default_data_collator(rows()[first : first + SIZE]), self.rng.randrange(50))


LOADERS = {
    "sampler": lambda: DataLoader(table(), sampler=Own(), batch_size=SIZE, collate_fn=default_data_collator),
    "generator": lambda: DataLoader(table(), SIZE, shuffle=True, generator=torch.Generator(), collate_fn=default_data_collator),
    "batch sampler": lambda: DataLoader(table(), batch_sampler=InBatches(), collate_fn=default_data_collator),
    "no batch size": lambda: DataLoader(
        Whole(), batch_size=None, sampler=BatchSampler(RandomSampler(range(ROWS), generator=torch.Generator()), SIZE, False)
    ),
    "any iterable": Listed,
}


class Noting(Trainer):
    """Notes what it trains on."""

    loader = None

    def get_train_dataloader(self):
        if self.loader is None:
            return super().get_train_dataloader()
        whole = isinstance(self.loader, Listed) or (self.loader.batch_size is None and self.loader.batch_sampler is None)
        return self.loader if whole else self.accelerator.prepare(self.loader)

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs["input_ids"].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def model():
    torch.manual_seed(0)
    return tf.BertForSequenceClassification(
        tf.BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB)
    )


def language_model():
    torch.manual_seed(0)
    return tf.BertForMaskedLM(
        tf.BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=VOCAB + 1)
    )


def reset():
    """What the set-ups keep in their module."""
    global reads
    reads, Counting.reads = 0, 0
    numbers.seed(8)
    State.numbers.seed(7)
    vars(with_an_attribute).pop("count", None)
    with_a_default.__defaults__[0].seed(4)


def trained(folder, callbacks, data=None, collator=None, loader=None, make=model, **settings):
    reset()
    trainer = Noting(
        make(),
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
    """Each kind of state by itself: after a calibration the same comes as without it, and the same in each pass of it."""

    def made():
        reset()
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return (DRAWS[name](), default_data_collator) if name in DRAWS else (table(), SHIFTS[name]())

    expected = batches(*made())
    data, collator = made()
    loader = DataLoader(data, SIZE, shuffle=True, collate_fn=collator)
    calibration = Calibration(None, loader, SIZE, MPruneConfig(threshold=1.0, calibration_samples=24))
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
            tmp_path, callbacks, data=lambda f: [dict(item) for item in kept], collator=lambda: taking_apart, num_train_epochs=1
        )
        assert all(not item.keys() & {"labels"} for item in trainer.train_dataset) and len(trainer.seen) == ROWS // SIZE


@pytest.mark.parametrize("setting", [{"data": DATA["all kinds"]}, {"loader": Listed}, {"data": DATA["stream of a list"], "max_steps": 8}])
def test_beside_wanda_a_training_sees_the_same(tmp_path, setting):
    start = 0 if "max_steps" in setting else 1
    is_untouched(tmp_path, WandaCallback(sparsity=0.3, start_epoch=start, calibration_samples=32), collator=all_kinds, **setting)


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


def begun(folder):
    """A text file in the middle of its lines, whose place cannot be told."""
    (folder / "rows.txt").write_text("1 2\n" * 400)
    file = (folder / "rows.txt").open()
    next(file)
    return file


ONCE = {
    "generator": lambda f: Stream(item for item in rows(400)),
    "chain": lambda f: Stream(itertools.chain(iter(rows(400)))),
    "lines of a text": lambda f: Stream(begun(f)),
    "thread": lambda f: Queued(),
}


@pytest.mark.parametrize("callback", [pruning, WandaCallback])
@pytest.mark.parametrize("name", ONCE)
def test_a_stream_that_can_be_read_once_is_refused_before_any_step(tmp_path, name, callback):
    settings = {"threshold": 1.0} if callback is pruning else {"sparsity": 0.5}
    with pytest.raises(CalibrationError, match=r"read once only.*\n?.*Callback\(calibration=\[\{\"input_ids\": ids, \"attention_mask\""):
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
