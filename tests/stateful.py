"""Data sets, collators, samplers and loaders that keep something of their own between two reads."""

from __future__ import annotations

import collections
import functools
import itertools
import multiprocessing
import random
import threading

import datasets
import numpy as np
import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler
from transformers import DataCollatorForLanguageModeling, default_data_collator

from .trainer.test_neighbours_trainers import tokenizer
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
    "iterator": lambda: Mapped(
        lambda s: next(s.count) + next(s.pairs)[1], count=itertools.count(), pairs=enumerate(iter(range(9**6)))
    ),
    "class": Counting,
    "slots": Slotted,
    "globals": lambda: Mapped(global_numbers),
    "lists of objects": lambda: ConcatDataset(
        [Mapped(lambda s: s.rng.random() * 50, rng=random.Random(i)) for i in range(2)]
    ),
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
    "random states of the process": lambda: Masking(
        lambda: torch.randint(50, (1,)) + np.random.randint(50) + random.randrange(50)
    ),
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
    "generator": lambda: DataLoader(
        table(), SIZE, shuffle=True, generator=torch.Generator(), collate_fn=default_data_collator
    ),
    "batch sampler": lambda: DataLoader(table(), batch_sampler=InBatches(), collate_fn=default_data_collator),
    "no batch size": lambda: DataLoader(
        Whole(),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(range(ROWS), generator=torch.Generator()), SIZE, False),
    ),
    "any iterable": Listed,
}


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


def reset():
    """What the set-ups keep in their module."""
    global reads
    reads, Counting.reads = 0, 0
    numbers.seed(8)
    State.numbers.seed(7)
    vars(with_an_attribute).pop("count", None)
    with_a_default.__defaults__[0].seed(4)
