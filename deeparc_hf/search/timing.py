"""How long a model takes, and how much of that each block: measured warm, on the device, batch and length at hand.

A block's share is its time over that of the pass that it ran in, so that what disturbs one disturbs both; a share is
the median over the passes. Two models are timed in turns, and compared turn by turn.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from ..architectures import Host
from ..architectures.hosts import quiet
from ..core.offload import device_of
from ..core.statistics import median_interval
from ..observe.batches import batch_size
from ..observe.forward import evaluating, forward
from ..observe.hooks import hooked
from ..pruning.verify import generation_error
from .playback import Block

__all__ = ["NEW_TOKENS", "BlockTimes", "Work", "compare_times", "time_blocks", "work_of"]

NEW_TOKENS = 16  # that a model which translates or summarizes is timed on
TURNS, _WARM = 7, 2


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        inputs: the batch.
        generates: whether the model generates; else it runs forward once.
    """

    inputs: Mapping[str, Any]
    generates: bool = False

    def by(self, host: Host) -> Callable[[], Any]:
        """What does it with a model: generation with a cache, where the model can."""
        if not self.generates:
            return partial(forward, host, self.inputs, without_cache=True)
        given = {key: self.inputs[key] for key in (host.main_input, "attention_mask") if key in self.inputs}
        tokens = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
        caches = generation_error(host, given) is None

        def generate() -> None:
            with quiet(hf_logging.ERROR):  # that other lengths than those of its settings are asked for is known
                host.root.generate(**given, **tokens, use_cache=caches)  # type: ignore[operator]

        return generate

    def __str__(self) -> str:
        what = f"generating {NEW_TOKENS} tokens" if self.generates else "a forward pass"
        return f"{what} for {batch_size(self.inputs)} samples"


def work_of(host: Host, inputs: Mapping[str, Any]) -> Work:
    """What users of a model wait for: an encoder-decoder that generates does that, any other model runs forward."""
    return Work(inputs, generates=host.is_encoder_decoder and host.generates)


@dataclass(frozen=True)
class BlockTimes:
    """How long a model takes, and its blocks.

    Attributes:
        seconds: of the work, the median.
        shares: by block, its share of that; 1 would be all of it.
        work: what was timed, in words.
        turns: number of timed passes.
    """

    seconds: float
    shares: Mapping[Block, float]
    work: str
    turns: int

    def speedup(self, removed: Collection[Block]) -> float:
        """How many times as fast the model should be without these blocks."""
        left = 1.0 - sum(self.shares[block] for block in removed)
        return 1.0 / max(left, 1e-6)


def time_blocks(host: Host, modules: Mapping[Block, nn.Module], work: Work, turns: int = TURNS) -> BlockTimes:
    """Time each block within the work."""
    totals: list[float] = []
    shares: dict[Block, list[float]] = {block: [] for block in modules}
    with evaluating(host.root):
        run = work.by(host)
        for turn in range(_WARM + turns):
            clocks = {block: _Clock(_device(host)) for block in modules}
            with hooked(_watched(modules, clocks)):
                seconds = _timed(host, run)
            if turn >= _WARM:
                totals.append(seconds)
                for block, clock in clocks.items():
                    shares[block].append(clock.seconds() / seconds)
    medians = {block: statistics.median(found) for block, found in shares.items()}
    return BlockTimes(statistics.median(totals), medians, str(work), turns)


def _watched(modules: Mapping[Block, nn.Module], clocks: Mapping[Block, _Clock]) -> Iterator[Any]:
    for block, module in modules.items():
        yield module.register_forward_pre_hook(partial(_start, clocks[block]))
        yield module.register_forward_hook(partial(_stop, clocks[block]))


def compare_times(whole: Host, smaller: Host, work: Work, turns: int = TURNS) -> tuple[float, tuple[float, float]]:
    """How many times as fast a smaller model is, with a 95 % interval of the median over the turns."""
    ratios = []
    with evaluating(whole.root), evaluating(smaller.root):
        runs = work.by(whole), work.by(smaller)
        for _ in range(_WARM):
            for run in runs:
                run()
        for turn in range(turns):
            seconds = [0.0, 0.0]
            for index in (0, 1) if turn % 2 == 0 else (1, 0):
                seconds[index] = _timed(whole, runs[index])
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios), median_interval(ratios)


class _Clock:
    """The time between its starts and stops; on a GPU between marks in the queue of work, so that nothing waits."""

    def __init__(self, device: torch.device) -> None:
        self._queue = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._queue:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> float:
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._queue:
            return math.fsum(start.elapsed_time(stop) for start, stop in pairs) / 1000.0
        return math.fsum(stop - start for start, stop in pairs)


def _start(clock: _Clock, module: nn.Module, args: Any) -> None:
    clock.mark()


def _stop(clock: _Clock, module: nn.Module, args: Any, output: Any) -> None:
    clock.mark()


def _device(host: Host) -> torch.device:
    return device_of(host.root)


def _timed(host: Host, work: Callable[[], Any]) -> float:
    _wait(host)
    start = time.perf_counter()
    work()
    _wait(host)
    return time.perf_counter() - start


def _wait(host: Host) -> None:
    if _device(host).type != "cpu":
        torch.accelerator.synchronize()
