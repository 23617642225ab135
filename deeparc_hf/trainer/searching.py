"""The search for blocks in a training: how far each pruning goes, and what is tried where one is taken back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..architectures import Host
from ..core.distributed import gather
from ..core.offload import device_of
from ..observe.training_calibration import TrainingCalibration
from ..pruning.choice import Choice
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan, chosen_plan
from ..reports.attempts import Attempt

__all__ = ["batches_of_all", "first_step", "learned_by_heart", "lesser_plan", "remaining_speedup"]

_FIRST = 6  # of the blocks one in so many goes at first, where the metric alone says how far to go
# times as large as the training loss is the evaluation loss where samples are learned by heart, if it is large at all
_BY_HEART, _LARGE = 10, 0.1


def batches_of_all(host: Host, calibration: TrainingCalibration) -> list[dict[str, Any]]:
    """The calibration batches of all processes, in each of them."""
    parts = gather(lambda: [_placed(inputs, "cpu") for inputs in calibration.inputs(host)])
    device = device_of(host.root)
    return [_placed(inputs, device) for part in parts for inputs in part]


def learned_by_heart(history: Sequence[Mapping[str, Any]]) -> str | None:
    """What to warn of where the training samples tell little of others, by the last losses in the Trainer's log."""
    training = [entry["loss"] for entry in history if "loss" in entry]
    evaluation = [
        value
        for entry in history
        for name, value in entry.items()
        if name.startswith("eval_") and name.endswith("loss")  # eval_NAME_loss, where there are several data sets
    ]
    if not training or not evaluation:
        return None
    seen, unseen = training[-1], evaluation[-1]
    if unseen < _LARGE or not 0 <= seen * _BY_HEART < unseen:
        return None
    return (
        f"The loss on the training data is {seen:.3g} and on the evaluation data {unseen:.3g}: the "
        "training samples are learned by heart, and what a smaller model loses on them tells little of other data. "
        "Hold some samples back from training and evaluation, and give them: MPruneCallback(calibration=dataset)."
    )


def first_step(attempts: Sequence[Attempt]) -> int:
    """How many blocks the next pruning takes where the metric alone says how far to go: a sixth of the whole model's at
    first, then as many as the last one that stood.
    """
    stood = [attempt for attempt in attempts[1:] if not attempt.is_taken_back]
    if stood:
        return _count(stood[-1].plan_removed)
    return max(1, round(sum(attempts[0].blocks.values()) / _FIRST))


def remaining_speedup(config: MPruneConfig, attempts: Sequence[Attempt], iteration: int) -> float:
    """How many times as fast the model as it is now has to become in an iteration, counted from 0, so that after the
    last one the target is reached; each takes an equal share of the time that is to go.
    """
    assert config.speedup is not None
    share = (iteration + 1) / config.iterations
    wanted = 1.0 / (1.0 - (1.0 - 1.0 / config.speedup) * share)
    stood = [attempt for attempt in attempts[1:] if not attempt.is_taken_back]
    return wanted / math.prod(attempt.speedup or 1.0 for attempt in stood)


def lesser_plan(plan: PruningPlan, tried: Sequence[int], halves: bool) -> PruningPlan | None:
    """The next plan of the same search with fewer blocks removed than were tried; None if there is none.

    Args:
        plan: the first that was tried, with what the search found on its way.
        tried: numbers of blocks that were removed.
        halves: whether half as many go at most, and not one fewer.
    """
    choice = plan.choice
    most = min(tried) // 2 if halves else min(tried) - 1
    lesser = [each for each in (() if choice is None else choice.lesser) if each.count <= most]
    if choice is None or not lesser:
        return None
    found = max(lesser, key=lambda each: each.count)
    shorter = tuple(each for each in choice.lesser if each.count < found.count)
    new = Choice(
        choice.search, choice.objective, found.value, None, choice.samples, speedup=found.speedup, lesser=shorter
    )
    return chosen_plan(plan, found.removed, new)


def _count(removed: Mapping[str, Sequence[int]]) -> int:
    return sum(map(len, removed.values()))


def _placed(value: Any, device: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _placed(item, device) for key, item in value.items()}
    return type(value)(_placed(item, device) for item in value) if isinstance(value, (list, tuple)) else value
