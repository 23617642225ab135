"""What a search has found so far: the best model of each number of blocks, with what is measured of it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..architectures import Subject, describe
from ..core.caller import warn_caller
from ..core.distributed import agree
from ..core.plain_text import quoted
from ..core.shards import moves_together, numel
from ..errors import CalibrationWarning, ConfigError
from ..observe.forward import evaluating
from .frontier import Point
from .timing import BlockTimes, compare_times, time_blocks, work_of
from .workbench import Node, Workbench, by_stack

__all__ = ["Ends", "Evaluation", "Found"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ends:
    """Where a search need not go further."""

    max_value: float | None
    speedup: float | None

    def too_bad(self, node: Node) -> bool:
        return self.max_value is not None and node.score.value > self.max_value

    def enough(self, speedup: float | None) -> bool:
        return self.speedup is not None and speedup is not None and speedup >= self.speedup


class Evaluation:
    """What the user measures models by; of the whole model once, before any other work is done."""

    def __init__(self, evaluate: Callable[[nn.Module], float], root: nn.Module) -> None:
        module, kind = getattr(evaluate, "__module__", ""), type(evaluate)
        self._name = f"{module}.{getattr(evaluate, '__qualname__', kind.__qualname__)}"
        self._evaluate, self._root = evaluate, root
        if not callable(evaluate):
            raise ConfigError(f"evaluate is called with a model, so it must be a function, found {quoted(evaluate)}.")
        with evaluating(root):
            self._whole = self._number(root)

    def __call__(self, model: nn.Module) -> float:
        return self._whole if model is self._root else self._number(model)

    def __str__(self) -> str:
        return f"{self._name}, which gives {self._whole:.6g} for the whole model"

    def _number(self, model: nn.Module) -> float:
        value = self._evaluate(model)
        model.eval()  # many functions leave it training
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # of a tensor with more than one number
            entries = f" Give one of its entries: {', '.join(map(quoted, value))}." if isinstance(value, dict) else ""
            raise ConfigError(f"evaluate must give a number, found {quoted(value)}.{entries}") from None


class Found:
    """The best model of each number of blocks, and its measures; of those that are fast enough, where one is."""

    def __init__(
        self,
        subject: Subject,
        bench: Workbench,
        timed: Mapping[str, Any],
        evaluate: Callable[[nn.Module], float] | None,
        measures: Collection[str],
        ends: Ends,
        shared: bool,
    ) -> None:
        self.found: dict[int, tuple[Node, Point]] = {}
        self.times: BlockTimes | None = None
        self._subject, self._bench, self._evaluate, self._ends = subject, bench, evaluate, ends
        self._work, self._agree = work_of(subject.host, timed), _alone
        if shared:
            self._agree = partial(agree, together=moves_together(subject.root))
        self._makes, self._compares = evaluate is not None or "models" in measures, "models" in measures
        if "blocks" in measures:
            self.times = self._agree(partial(time_blocks, subject.host, bench.modules, self._work))
        self._whole = self._point(bench.root, subject.root)

    @property
    def is_enough(self) -> bool:
        """Whether a model is as fast as was asked for."""
        return any(self._ends.enough(point.speedup) for _, point in self.found.values())

    def add(self, node: Node) -> None:
        """Keep a model, if it is the best of its number of blocks, with the measures of it."""
        count = len(node.removed)
        if count not in self.found or self._rank(node) < self._rank(self.found[count][0]):
            self.found[count] = node, self._measured(node) if self._makes else self._point(node, None)

    def _rank(self, node: Node) -> tuple[bool, float]:
        return not self._ends.enough(self._speedup(node)), node.score.value

    def _speedup(self, node: Node) -> float | None:
        return None if self.times is None else self.times.speedup(node.removed)

    def points(self) -> tuple[Point, ...]:
        return (self._whole, *(self.found[count][1] for count in sorted(self.found)))

    def time(self, point: Point) -> None:
        """Time a model that was found beside the whole one, where memory suffices for a copy of it."""
        node, known = next((entry for entry in self.found.values() if entry[1] is point), (None, point))
        if node is None or known.measured is not None:
            return
        node.repairs  # noqa: B018  computed in all processes, if that is still to be done

        def compare() -> Point:
            try:
                return self._timed(known, self._bench.make(node))
            except Exception as error:  # a time is told, and decides nothing: a model that cannot be copied has none
                told = f"{type(error).__name__}: {error}".splitlines()[0]
                logger.info("The smaller model is not timed, because it cannot be copied: %s", told)
                return known

        self.found[len(node.removed)] = node, self._agree(compare)

    def _measured(self, node: Node) -> Point:
        """Make the smaller model, as a copy, and measure it."""
        smaller = self._bench.make(node)
        point = self._point(node, smaller)
        return self._timed(point, smaller) if self._compares else point

    def _timed(self, point: Point, smaller: nn.Module) -> Point:
        ratio, interval = compare_times(self._subject.host, describe(smaller).host, self._work)
        return dataclasses.replace(point, measured=ratio, measured_interval=interval)

    def _point(self, node: Node, model: nn.Module | None) -> Point:
        """`model`: the smaller one, where it was made."""
        gone = {id(p) for block in node.removed for p in self._bench.modules[block].parameters()}
        left = [numel(p) for p in self._subject.root.parameters() if id(p) not in gone]
        return Point(
            {name: tuple(indices) for name, indices in by_stack(node.removed).items()},
            len(self._bench.order) - len(node.removed),
            sum(left if model is None else map(numel, model.parameters())),
            node.score.value,
            node.score.interval,
            None if self._evaluate is None or model is None else _finite(self._evaluate(model)),
            self._speedup(node),
        )


def _alone(work: Callable[[], Any]) -> Any:
    return work()


def _finite(value: float) -> float | None:
    if math.isfinite(value):
        return value
    warn_caller(f"evaluate gave {value} for a model. Its metric is left out.", CalibrationWarning)
    return None
