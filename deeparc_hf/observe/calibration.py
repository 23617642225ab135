"""Calibration: the data that a model is looked at on, how much of it, and the processes that look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..architectures import Host
from ..core.caller import warn_caller
from ..core.distributed import gather
from ..core.progress_bars import bar, samples_in
from ..core.shards import moves_together
from ..errors import CalibrationError, CalibrationWarning
from .batches import batch_size, columns, cut, forward_kwargs, is_cuttable, padding_masks

__all__ = ["Calibration", "Idle", "chosen_rows"]

T = TypeVar("T")


class Idle(dict[str, Any]):
    """Inputs that a process runs only because others still have some, where all have to run together: nothing is noted
    of them.
    """


class Calibration:
    """Batches, in the forms that `forward_kwargs` takes, and the most samples of them that this process looks at.

    Attributes:
        can_repeat: whether the data can be gone through again.
        example: the first batch of the last pass; None before.
    """

    def __init__(self, batches: Iterable[Any], samples: int) -> None:
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            raise CalibrationError(
                f"The calibration data must be batches, in a list or a DataLoader, found {type(batches).__name__}."
            )
        self._batches = batches
        self.samples = samples
        self.can_repeat = not isinstance(batches, Iterator)
        self.example: Any = None

    @property
    def num_samples(self) -> int | None:
        """The samples that there are; None where only going through them would tell."""
        return samples_in(self._batches)

    @property
    def first_number(self) -> int:
        """The number that this process's first sample has among those of all processes."""
        return 0

    def __iter__(self) -> Iterator[Any]:
        return self._noted(iter(self._batches))

    def together(self, look: Callable[[], T]) -> list[T]:
        """What looking gives in each process: in this one, where the others have no data of their own."""
        return [look()]

    @contextmanager
    def bar(self, what: str, show: bool) -> Iterator[Callable[[int], None]]:
        """A progress bar over the samples; within, call what it gives with the number of samples of each batch."""
        known = self.num_samples
        with bar(what, show, None if known is None else min(known, self.samples)) as shown:

            def advance(samples: int) -> None:
                if shown.total is not None and shown.n + samples > shown.total:
                    shown.total = None  # a row may bring several samples: texts that stand side by side
                shown.update(samples)

            yield advance
            shown.total = shown.n
            shown.refresh()

    def inputs(self, host: Host) -> Iterator[dict[str, Any]]:
        """What the model takes of each batch, labels included, on its device; the last one cut so that no more than
        `samples` come, or left out if it cannot be cut, unless it is the first. Where processes have to run together,
        those that have no more of them get `Idle` ones until all are through.
        """
        own = self._own_inputs(host)
        return _in_step(own) if moves_together(host.root) else own

    def _own_inputs(self, host: Host) -> Iterator[dict[str, Any]]:
        seen = 0
        for batch in chain.from_iterable(columns(host, batch) for batch in self):
            inputs = forward_kwargs(host, batch)
            if batch_size(inputs) > self.samples - seen and not is_cuttable(inputs) and seen:
                break
            inputs = cut(inputs, self.samples - seen)
            size = batch_size(inputs)
            if size == 0:
                continue
            _warn_unmasked(host, inputs)
            seen += size
            yield inputs
            if seen >= self.samples:
                break

    def _noted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for number, batch in enumerate(batches):
            if number == 0:
                self.example = batch
            yield batch


def chosen_rows(rows: int, samples: int, seed: int, skip: int = 0) -> list[int]:
    """Which of the `rows` of a data set are looked at: chosen at random, the same in every process; the first `skip` of
    those chosen are left out.
    """
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return order[skip:][:samples].tolist()


def _in_step(own: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    last: dict[str, Any] | None = None
    while True:
        inputs = next(own, None)
        more = gather(partial(bool, inputs))
        if not any(more):
            return
        if (last is None and inputs is None) or (last is None and not all(more)):
            raise CalibrationError(
                f"Process {more.index(False)} of {len(more)} has no calibration samples, and where parameters are "
                "sharded all have to run together. Give more samples, or batches of fewer."
            )
        last = inputs or last
        yield inputs if inputs is not None else Idle(last or {})


def _warn_unmasked(host: Host, inputs: dict[str, Any]) -> None:
    pad = getattr(getattr(host.root, "config", None), "pad_token_id", None)
    masks = padding_masks(inputs)
    ids, decoded = inputs.get("input_ids"), inputs.get("decoder_input_ids")
    problem = None
    if _holds(ids, pad) and masks["encoder"] is None:
        found = inputs.get("attention_mask")
        if found is None:
            problem = (
                f"padding (token {pad}) but no attention_mask: the padding is compared like text, and the model "
                "attends to it. Put the tokenizer's attention_mask into the batches"
            )
        else:
            problem = (
                f"padding (token {pad}) and an attention_mask of shape {tuple(found.shape)}, which does not say where "
                f"it is: the padding is compared like text. Give the tokenizer's own, of shape {tuple(ids.shape)}"
            )
    elif (
        isinstance(decoded, Tensor) and _holds(decoded[..., 1:], pad) and masks["decoder"] is None
    ):  # many begin with that token
        problem = (
            f"padding (token {pad}) in decoder_input_ids but no decoder_attention_mask: the decoder's padding is "
            "compared like text. Put it into the batches, or give labels with -100 where there is padding"
        )
    if problem is not None:
        warn_caller(f"A calibration batch has {problem}.", CalibrationWarning)


def _holds(ids: Any, token: Any) -> bool:
    return isinstance(ids, Tensor) and isinstance(token, int) and bool((ids == token).any())
