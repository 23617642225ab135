"""Observation: one forward pass over calibration batches, with hooks on the blocks, feeding similarity metrics.

Memory does not grow with the number of samples: a batch's rows go into the metrics' sums and are gone. The model is left
as it was: hooks removed, train/eval mode and the random states of torch, numpy and python restored, requires_grad untouched.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .architectures import Host, Stack
from .bars import sample_bar
from .batches import batch_size, columns, cut, forward_kwargs, padding_mask, without_labels
from .errors import CalibrationError, CalibrationWarning
from .observed import Observed, collect
from .similarity import SimilarityMetric

__all__ = [
    "StackObserver",
    "calibration_inputs",
    "did_not_run",
    "evaluating",
    "forward",
    "hidden_states",
    "observe",
    "with_hidden_states",
]


class StackObserver:
    """Collects the rows of one stack's blocks in a forward pass and hands them to a metric.

    Args:
        stack: the stack.
        metric: a fresh metric, which receives the rows.
        rows: "tokens", "mean" or "first".
    """

    def __init__(self, stack: Stack, metric: SimilarityMetric, rows: str) -> None:
        self.stack = stack
        self.metric = metric
        self.rows = rows
        self.count = 0
        self.mask: Tensor | None = None
        self.unmasked = False  # whether padding was compared, because the mask has another length than the outputs
        self._batch: dict[int, Tensor] = {}
        self._first: dict[int, Tensor] = {}
        self._constant = set(range(len(stack)))
        # positions chosen for the batch at hand, where rows are tokens: the same for all its blocks
        self._shape: tuple[int, ...] = ()
        self._chosen = torch.empty(0, dtype=torch.long)
        self._per_sample: list[int] = []

    def hook(self, index: int) -> Any:
        """A forward hook for the block of that index."""

        def take(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_states(output)
            if not isinstance(hidden, Tensor):
                raise CalibrationError(
                    f"Block {index} of {self.stack.name} puts out a {type(hidden).__name__} where hidden states were expected, so it "
                    "cannot be compared. Name the blocks to remove yourself, with remove_blocks."
                )
            self._batch[index] = self._select(index, hidden.detach())

        return take

    def flush(self, seen: int) -> None:
        """Hand the batch's rows to the metric. `seen` samples came before this batch.

        Raises:
            CalibrationError: if a block's rows hold NaN or infinity, or a block did not run.
        """
        missing = [i for i in range(len(self.stack)) if i not in self._batch]
        if missing:
            raise did_not_run(self.stack, missing[0])
        rows = [self._batch[i] for i in range(len(self.stack))]
        self._batch = {}
        for index, block_rows in enumerate(rows):
            self._check(index, block_rows)
        samples = torch.arange(len(rows[0]), device=rows[0].device)
        if self.rows == "tokens":
            samples = torch.repeat_interleave(torch.arange(len(self._per_sample)), torch.tensor(self._per_sample))
        self.metric.update(rows, samples + seen)
        self.count += len(rows[0])

    def label(self, key: int | str) -> str:
        return f"Block {key} of {self.stack.name}"

    def observed(self) -> Observed:
        """What was seen so far. No `flush` may follow."""
        sums = {key: value.detach().cpu() for key, value in self.metric.finish().items()}
        constant: dict[int | str, Tensor] = {index: self._first[index].cpu() for index in sorted(self._constant) if index in self._first}
        return Observed(sums, self.count, constant, self.unmasked)

    def _check(self, index: int, rows: Tensor) -> None:
        if not bool(torch.isfinite(rows).all()):
            dtype = next(self.stack.blocks[index].parameters()).dtype
            hint = " Load it in float32 or bfloat16." if dtype == torch.float16 else " Check its weights and the inputs."
            raise CalibrationError(
                f"Block {index} of {self.stack.name} puts out NaN or infinity on the calibration data (its weights are {dtype}).{hint}"
            )
        if index in self._constant and len(rows):
            first = self._first.setdefault(index, rows[0].clone())
            if bool((rows != first).any()):
                self._constant.discard(index)

    def _select(self, index: int, hidden: Tensor) -> Tensor:
        """Rows (N, D) in float32 of a block's output (B, T, D) or (B, C, H, W)."""
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).transpose(1, 2)
        if hidden.ndim != 3:
            raise CalibrationError(
                f"Block {index} of {self.stack.name} puts out a tensor of shape {tuple(hidden.shape)}; expected (batch, positions, "
                "features) or (batch, channels, height, width)."
            )
        mask = self.mask
        if mask is not None and mask.shape != hidden.shape[:2]:
            self.unmasked = self.unmasked or not bool(mask.all())
            mask = None
        if self.rows == "mean":
            if mask is None:
                return hidden.float().mean(dim=1)
            weight = mask.to(torch.float32)
            total = torch.einsum("bt,btd->bd", weight, hidden.float())
            return (total / weight.sum(dim=1, keepdim=True).clamp(min=1))[mask.any(dim=1)]
        if self.rows == "first":
            if mask is None:
                return hidden[:, 0].float()
            first = mask.int().argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), first].float()[mask.any(dim=1)]
        return hidden.reshape(-1, hidden.shape[2])[self._positions(mask, hidden)].float()

    def _positions(self, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Flat indices of the positions to compare, evenly spaced within each sample; the same for all blocks of a batch."""
        batch, length = hidden.shape[:2]
        if self._batch and self._shape == (batch, length):
            return self._chosen
        self._shape = (batch, length)
        limit = self.metric.tokens_per_sample or length
        chosen: list[Tensor] = []
        self._per_sample = []
        for sample in range(batch):
            positions = torch.arange(length) if mask is None else mask[sample].nonzero().flatten().cpu()
            if len(positions) > limit:
                positions = positions[torch.linspace(0, len(positions) - 1, limit).round().long()]
            chosen.append(positions + sample * length)
            self._per_sample.append(len(positions))
        self._chosen = torch.cat(chosen).to(hidden.device)
        return self._chosen


def did_not_run(stack: Stack, index: int) -> CalibrationError:
    """What to raise where a block was not reached."""
    return CalibrationError(
        f"Block {index} of {stack.name} did not run in the forward pass over a calibration batch. Give batches that reach every part of "
        "the model (text and images for a model of both), and switch layer skipping (LayerDrop) off."
    )


def hidden_states(output: Any) -> Tensor:
    """The hidden states in what a block puts out: the output itself, or the first entry of a tuple or ModelOutput."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
        return output
    return output[0]


def with_hidden_states(output: Any, hidden: Tensor) -> Any:
    """What a block puts out, with other hidden states in it."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, (tuple, list)):
        return type(output)((hidden, *output[1:]))
    return type(output)(**{key: hidden if i == 0 else value for i, (key, value) in enumerate(output.items())})


def observe(
    host: Host,
    observers: Iterable[StackObserver],
    dataloader: Iterable[Any],
    max_samples: int,
    *,
    progress: bool = True,
    gather: Callable[[Callable[[], Any]], list[Any]] | None = None,
) -> tuple[int, list[Observed]]:
    """Run the model over calibration batches and feed the observers.

    Args:
        host: the model.
        observers: one a stack.
        dataloader: batches; see `batches.forward_kwargs` for their forms.
        max_samples: stop after this many samples.
        progress: show a progress bar, in samples.
        gather: runs a function in every process of a distributed run and returns all results, one a process; each then looks at its own
            batches, and what they saw is put together. None: one process.

    Returns:
        The number of samples seen, and what was seen of each stack, over all processes.

    Raises:
        CalibrationError: if there is no data, too little of it, a batch the model cannot take, or a block whose
            output is not finite or constant.
    """
    observers = list(observers)

    def look() -> tuple[int, list[Observed]]:
        seen = _look(host, observers, dataloader, max_samples, progress)
        return seen, [observer.observed() for observer in observers]

    return collect(look, observers, gather)


def _look(host: Host, observers: list[StackObserver], dataloader: Iterable[Any], max_samples: int, progress: bool) -> int:
    seen = 0
    with (
        evaluating(host.root),
        _hooked(observers),
        sample_bar("Comparing blocks", progress, dataloader, max_samples) as advance,
    ):
        for inputs in calibration_inputs(host, dataloader, max_samples):
            for observer in observers:
                observer.mask = padding_mask(host, observer.stack, inputs)
            forward(host, inputs)
            for observer in observers:
                observer.flush(seen)
                observer.unmasked = observer.unmasked and "pixel_values" not in inputs
            seen += batch_size(inputs)
            advance(batch_size(inputs))
    return seen


def calibration_inputs(host: Host, dataloader: Iterable[Any], max_samples: int) -> Iterator[dict[str, Any]]:
    """What the model takes of each batch, labels included, on its device; the last one cut so that no more than `max_samples` come."""
    seen = 0
    for batch in chain.from_iterable(columns(host, batch) for batch in dataloader):
        inputs = forward_kwargs(host, batch)
        inputs = cut(inputs, min(batch_size(inputs), max_samples - seen))
        size = batch_size(inputs)
        if size == 0:
            continue
        _warn_unmasked(host, inputs)
        seen += size
        yield inputs
        if seen >= max_samples:
            break


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module's mode and all random states are what they were."""
    modes = {module: module.training for module in model.modules()}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _hooked(observers: list[StackObserver]) -> Iterator[None]:
    handles = []
    try:
        for observer in observers:
            for index, block in enumerate(observer.stack.blocks):
                handles.append(block.register_forward_hook(observer.hook(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(host: Host, inputs: Mapping[str, Any], without_cache: bool = False) -> Any:
    """Run the model on calibration inputs, without labels where it can do without; gives its output.

    Args:
        without_cache: make no cache of keys and values, which would hold on to them, and take them again when a block is run again.

    Raises:
        CalibrationError: if it cannot.
    """
    inputs = without_labels(host, inputs)
    try:
        return host.root(**inputs, **({"use_cache": False} if without_cache and _takes_cache(host) else {}))
    except (CalibrationError, torch.OutOfMemoryError):  # the Trainer may try a smaller batch
        raise
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        shapes = ", ".join(f"{key}: {tuple(value.shape)}" for key, value in inputs.items())
        raise CalibrationError(
            f"{type(host.root).__name__} cannot run on a calibration batch ({shapes}): {type(error).__name__}: {error}. Give batches "
            "as your training loop gives them to the model."
        ) from error


def _takes_cache(host: Host) -> bool:
    return host.library == "transformers" and "use_cache" in inspect.signature(host.root.forward).parameters


def _warn_unmasked(host: Host, inputs: dict[str, Any]) -> None:
    ids = inputs.get("input_ids")
    pad = getattr(getattr(host.root, "config", None), "pad_token_id", None)
    if ids is None or pad is None or "attention_mask" in inputs or not bool((ids == pad).any()):
        return
    warnings.warn(
        f"A calibration batch has padding (token {pad}) but no attention_mask: the padding is compared like text, and the model attends to "
        "it. Put the tokenizer's attention_mask into the batches.",
        CalibrationWarning,
        stacklevel=5,
    )
