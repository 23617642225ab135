"""Progress bars on a terminal or in a notebook: what is being done, how far it is, and how much there is of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["bar", "doing", "duration", "samples_in", "shows_bars"]


def bar(what: str, show: bool, total: int | None = None, unit: str = "sample", **more: Any) -> tqdm:
    """A bar that is gone when it is done, on a terminal or in a notebook; total None: it is not known."""
    return tqdm(total=total, desc=what, unit=unit, disable=None if show else True, leave=False, **more)


@contextmanager
def doing(what: str, show: bool) -> Iterator[None]:
    """A line that says what is being done, where no steps of it can be counted."""
    with bar(what, show, bar_format="{desc} ..."):
        yield


def duration(seconds: float) -> str:
    """A time as bars show it: minutes and seconds, with hours where there are any."""
    return str(tqdm.format_interval(seconds))


def samples_in(batches: Any) -> int | None:
    """The number of samples in batches of any form; None where only going through them would tell."""
    if hasattr(batches, "num_samples"):
        return batches.num_samples
    if isinstance(batches, (list, tuple)):
        return sum(map(_rows, batches))
    if not isinstance(batches, DataLoader):
        return None
    sampler, size = batches.batch_sampler, getattr(batches.batch_sampler, "batch_size", None)
    try:
        if sampler is None:
            # items as they come: samples if something makes batches of them, batches otherwise
            return None if batches.batch_size is None else len(batches.dataset)
        inner = getattr(sampler, "sampler", None)
        rows = len(batches.dataset if inner is None else inner)
        return rows if size is None else min(rows, len(sampler) * size)
    except (TypeError, NotImplementedError):  # a stream, a sampler without an end
        return None


def shows_bars(args: TrainingArguments) -> bool:
    """Whether a training shows progress bars in this process."""
    return not args.disable_tqdm and args.process_index == 0


def _rows(batch: Any) -> int:
    """The length of the first tensor that has one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((rows for rows in map(_rows, values) if rows), 0)
