"""The life of a training with prunings in it, as a state machine: no model, no Trainer, no torch, and a state in JSON.

    WAITING --(boundary; gated: with a baseline)--> prune --> RETRAINING --(verdict)--> JUDGED
    JUDGED --(next epoch, or the end)--> accept or take back --> WAITING or DONE

The algorithm is MPruner's (arXiv 2408.13482): train, prune, retrain, judge; accept and prune the smaller model again
with the same stride, or take the pruning back and try the next larger stride, which removes less.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..core.checks import at_most
from ..errors import RecordError
from ..reports.attempts import BEFORE, FINISHED, Attempt
from ..reports.attempts import RETRAINING as BEING_RETRAINED

if TYPE_CHECKING:
    from ..pruning.config import MPruneConfig

__all__ = ["Machine", "Phase", "Progress", "Saved", "Verdict", "World", "judge"]

_ALL_ACCEPTED = "every pruning that was asked for is accepted"


class Phase(StrEnum):
    """What a run is doing."""

    WAITING = "waiting"  # for the step at which it prunes
    RETRAINING = "retraining"
    JUDGED = "judged"  # and about to carry the verdict out
    DONE = "done"


class Saved:
    """Base of what a callback keeps in a checkpoint's trainer_state.json: dataclasses of JSON types."""

    FORMAT_VERSION = 1
    TELLS = ""  # what it tells, in the words of an error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, a copy."""
        return {"format_version": self.FORMAT_VERSION, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """The inverse of `to_dict`; earlier versions of the format are read too.

        Raises:
            RecordError: if the data is something else, or was written by another version of this package.
        """
        try:
            fields = dict(cls.in_this_version(data))
            known = {spec.name for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
            if fields.pop("format_version") != cls.FORMAT_VERSION or fields.keys() != known:
                raise ValueError
            return cls.of_fields(fields)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RecordError(
                f"The checkpoint's trainer_state.json does not tell {cls.TELLS}, or another version of deeparc_hf "
                "wrote it. Resume with the version that wrote it, or start a new run from the checkpoint's model."
            ) from None

    @classmethod
    def in_this_version(cls, data: Any) -> Any:
        """What an earlier version of the format holds, in today's; anything else as it is."""
        return data

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Self:
        """Made of JSON types; any of the usual errors if they do not hold what they are to hold."""
        return cls(**fields)


@dataclass
class Progress(Saved):
    """Where a run stands: all that a resumed run needs to go on."""

    FORMAT_VERSION = 2
    TELLS = "where the pruning stood"

    k: int  # stride of the pruning at hand, or of the next one
    phase: Phase = Phase.WAITING
    accepted: int = 0  # prunings
    boundary: int = 0  # optimizer step at which this phase ends
    steps_per_epoch: int | None = None  # in which the boundaries are counted; None where the data has no length
    baseline: float | None = None  # the metric that later ones are compared with; None if not known yet
    measured_at: int | None = None  # optimizer step at which the gate's metric was measured last
    asked_at: int | None = None  # step at whose end an evaluation was asked for, because a checkpoint is saved there
    value: float | None = None  # the gate's metric after the retraining at hand
    verdict: bool | None = None  # on the pruning at hand, while it is JUDGED: whether it stays
    next_plan: dict[str, Any] | None = None  # a plan's dict, while it is known; None: the blocks are compared then
    goes_on: bool = True  # whether another pruning follows the one at hand
    reason: str | None = None  # why none follows
    stopped: bool = False  # whether the training was asked to stop, because nothing is left to do
    # step at which the learning rate was rewound last, and steps of its schedule and of the whole training then
    rewound: list[int] | None = None
    # records (as dicts) of the model when the run began, of the last accepted model, and as it is now
    start: dict[str, Any] | None = None
    base: dict[str, Any] | None = None
    record: dict[str, Any] | None = None
    # blocks that this run froze, by stack, in the model as it is now and in the last accepted one
    frozen: dict[str, list[int]] = field(default_factory=dict)
    base_frozen: dict[str, list[int]] = field(default_factory=dict)
    # names of the folders with the accepted weights, while they may come back, and with those of the teacher
    snapshot: str | None = None
    teacher: str | None = None
    attempts: list[Attempt] = field(default_factory=list)  # the report's: of the model before, and of each pruning

    def to_dict(self) -> dict[str, Any]:
        attempts = [attempt.to_dict() for attempt in self.attempts]
        return {**super().to_dict(), "phase": self.phase.value, "attempts": attempts}

    @classmethod
    def in_this_version(cls, data: Any) -> Any:
        """Version 1 knew no JUDGED."""
        if data["format_version"] != 1 or type(data["format_version"]) is not int:
            return data
        phase = {BEFORE: Phase.WAITING, BEING_RETRAINED: Phase.RETRAINING, FINISHED: Phase.DONE}[data["phase"]]
        fields = dict(data)
        verdict = {None: None, "accept": True, "reject": False}[fields.pop("decision")]
        if verdict is not None:
            phase = Phase.JUDGED
        del fields["pruned_at"]
        new = {"verdict": verdict, "goes_on": data["phase"] != FINISHED, "next_plan": None, "asked_at": None}
        return {**fields, **new, "phase": phase.value, "format_version": cls.FORMAT_VERSION}

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Self:
        # names of folders beside the checkpoint, and nowhere else
        names = [fields[key] for key in ("snapshot", "teacher") if fields[key] is not None]
        if type(fields["k"]) is not int or not all(re.fullmatch(r"[\w-]+", name) for name in names):
            raise ValueError
        attempts = [Attempt.from_dict(entry) for entry in fields["attempts"]]
        return cls(**{**fields, "phase": Phase(fields["phase"]), "attempts": attempts})

    @property
    def is_over(self) -> bool:
        """Whether no pruning follows; a verdict may still have to be carried out."""
        return self.phase is Phase.DONE or (self.phase is Phase.JUDGED and not self.goes_on)

    @property
    def in_retraining(self) -> bool:
        """Whether the retraining of a pruning goes on, and others may follow."""
        return self.phase is Phase.RETRAINING or (self.phase is Phase.JUDGED and self.goes_on)

    def for_report(self) -> dict[str, Any]:
        """What a report tells of the run, in its words."""
        phase = FINISHED if self.is_over else BEING_RETRAINED if self.in_retraining else BEFORE
        rest = {name: getattr(self, name) for name in ("reason", "accepted", "attempts")}
        return {"baseline": self.baseline, "phase": phase, **rest}


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a pruning: whether it stays, by how much the metric got worse, and why."""

    accepted: bool
    drop: float
    reason: str


def judge(config: MPruneConfig, name: str, baseline: float, value: float, greater_is_better: bool) -> Verdict:
    drop = baseline - value if greater_is_better else value - baseline
    allowed = float(config.max_drop or 0.0)
    if not math.isfinite(value):
        return Verdict(False, drop, f"{name} is {value:g} after the retraining, and was {baseline:.6g}")
    accepted = at_most(drop, allowed)
    change = f"{name} went from {baseline:.4g} to {value:.4g}"
    change += f", {'worse' if drop > 0 else 'better'} by {abs(drop):.4g}" if drop else ", unchanged"
    return Verdict(accepted, drop, f"{change} ({'' if accepted else 'only '}a drop of up to {allowed:g} is allowed)")


class World(Protocol):
    """What a machine acts on: the model, its optimizer, and the reports. Plans are dicts, the same in every process."""

    # the plan of an iteration, counted from 0, for the model as it is; None where nothing can be removed
    def compare(self, iteration: int, k: int) -> dict[str, Any] | None: ...
    # the plan of the next larger stride that removes something else than was tried; None if there is none
    def weaker(self) -> dict[str, Any] | None: ...
    # carry a plan out, so that it can be taken back if it is to be judged
    def prune(self, plan: dict[str, Any], step: int) -> None: ...
    # give the steps that follow a step a learning rate that begins anew
    def rewind(self, step: int, steps: int) -> None: ...
    def pruned(self) -> None: ...
    def judged(self, verdict: Verdict) -> None: ...
    # make the model as it is the one to go back to
    def accept(self) -> None: ...
    def take_back(self) -> None: ...
    def carried_out(self, accepted: bool) -> None: ...
    # the first comparison found nothing to remove: the training goes on without pruning
    def nothing_removed(self) -> None: ...
    # whether another callback still has something to do in this training
    def others_go_on(self) -> bool: ...
    # the error where evaluations do not give the gate's metric
    def no_metric(self) -> Exception: ...


@dataclass(eq=False)
class Machine:
    """The events of a training, and what follows from them; every process gets the same values and plans."""

    config: MPruneConfig
    progress: Progress  # its first fields, up to `stopped`, change here and nowhere else
    world: World
    _: KW_ONLY
    metric: str  # the gate's
    greater_is_better: bool
    max_steps: int  # optimizer steps of the training
    retraining: int  # optimizer steps of a retraining

    @property
    def is_last(self) -> bool:
        """Whether nobody judges the pruning at hand, and none follows: its retraining lasts as long as the training."""
        return not self.config.gated and self.progress.accepted + 1 >= self.config.iterations

    @property
    def may_be_taken_back(self) -> bool:
        """Whether the pruning at hand is not judged yet, or is judged and the verdict not carried out."""
        return self.config.gated and self.progress.phase in (Phase.RETRAINING, Phase.JUDGED)

    # ---- beginnings ----

    def begin(self, boundary: int) -> None:
        """A run begins, whose first pruning is at a boundary."""
        self.progress.baseline, self.progress.boundary = self.config.baseline, boundary

    def begin_again(self) -> None:
        """The retraining at hand begins again at step 0, as the Trainer's training does (auto_find_batch_size)."""
        p = self.progress
        p.phase, p.verdict, p.next_plan = Phase.RETRAINING, None, None
        p.value = p.measured_at = p.asked_at = None
        self._retrain(0)

    def resume(self, changed: bool) -> None:
        """A run goes on from a checkpoint; changed: its settings have changed since."""
        p = self.progress
        if changed:
            p.next_plan = None  # it was made with the earlier settings
            if p.phase is Phase.JUDGED and p.goes_on and not self.config.gated:
                p.phase, p.verdict = Phase.RETRAINING, None  # nobody judged it: it may be the last one now
        if p.phase is Phase.RETRAINING and self.is_last:
            p.boundary = self.max_steps  # the training may be longer now

    # ---- events ----

    def epoch_begins(self, step: int) -> None:
        """At a boundary: carry out the verdict on the pruning at hand, and prune again."""
        p = self.progress
        if p.phase is Phase.RETRAINING and step >= p.boundary and not self.is_last:
            if self.config.gated:
                raise self.world.no_metric()  # what was not judged is not accepted
            self._judge(step)  # resumed from a checkpoint that is older than the end of its epoch
        if p.phase is Phase.JUDGED and not p.stopped:
            self._carry_out(step)
        if p.phase is Phase.WAITING and step >= p.boundary:
            self._prune(step)

    def wants_evaluation(self, step: int) -> bool:
        """Whether the gate waits for an evaluation of the model as it is at this step."""
        p = self.progress
        if not self.config.gated or step < p.boundary or p.measured_at == step:
            return False
        if p.phase is Phase.WAITING:
            return self.config.baseline is None and step > 0
        return p.phase is Phase.RETRAINING

    def evaluated(self, step: int, value: float | None) -> None:
        """The Trainer has evaluated; value: the gate's metric, None if it was not among the metrics."""
        p = self.progress
        if value is None or not self.config.gated or p.phase in (Phase.JUDGED, Phase.DONE):
            return
        p.measured_at = step
        if p.phase is Phase.WAITING:
            p.baseline = value if self.config.baseline is None else self.config.baseline
            return
        p.value = value
        if step >= p.boundary:
            self._judge(step)

    def epoch_ends(self, step: int) -> None:
        """Where nobody judges, a retraining ends with its last epoch."""
        p = self.progress
        if p.phase is Phase.RETRAINING and not self.config.gated and not self.is_last and step >= p.boundary:
            self._judge(step)

    def weights_zeroed(self) -> None:
        """The plan that was made is of other weights than the model has now."""
        self.progress.next_plan = None

    def training_ends(self, step: int, best: float | None = None) -> None:
        """End on the last accepted model; best: the gate's metric of the checkpoint that was loaded, if any was."""
        p = self.progress
        if p.phase is Phase.RETRAINING:
            if self.config.gated:  # early stopping, say: what was measured of this structure counts
                p.value, p.reason = best if best is not None else p.value, "the training ended early"
            p.phase, p.verdict = Phase.JUDGED, self._is_accepted()
        p.goes_on = False
        if p.phase is Phase.JUDGED:
            self._carry_out(step, at_end=True)
        p.phase, p.reason = Phase.DONE, p.reason or "the training ended"

    # ---- transitions ----

    def _is_accepted(self) -> bool:
        p = self.progress
        if not self.config.gated:
            return True
        if p.value is None or p.baseline is None:
            verdict = Verdict(False, math.nan, f"{self.metric} was not measured after the retraining began")
        else:
            verdict = judge(self.config, self.metric, p.baseline, p.value, self.greater_is_better)
        self.world.judged(verdict)
        return verdict.accepted

    def _judge(self, step: int) -> None:
        p, gated = self.progress, self.config.gated
        p.phase, p.verdict = Phase.JUDGED, self._is_accepted()
        if gated and p.verdict and p.accepted + 1 >= self.config.iterations:
            self._finish(self._all_accepted())
        elif gated and step + self.retraining > self.max_steps:
            self._finish("there are not enough epochs left for one more retraining")
        elif p.verdict:
            p.next_plan = self.world.compare(p.accepted + 1, p.k)
            if p.next_plan is None:
                self._finish("nothing more can be removed")
        else:
            self._plan_weaker()

    def _all_accepted(self) -> str:
        fewer = any(attempt.is_taken_back for attempt in self.progress.attempts)
        return _ALL_ACCEPTED + (", with fewer blocks removed than was tried first" if fewer else "")

    def _plan_weaker(self) -> None:
        self.progress.next_plan = self.world.weaker()
        if self.progress.next_plan is None:
            searched = self.config.search is not None
            k_max = f"no stride up to k_max={self.config.k_max} removes anything else"
            self._finish("no smaller removal is left to try" if searched else k_max)

    def _finish(self, reason: str, stop: bool = True) -> None:
        p = self.progress
        p.goes_on, p.reason, p.stopped = False, reason, stop and not self.world.others_go_on()

    def _carry_out(self, step: int, at_end: bool = False) -> None:
        p, accepted = self.progress, bool(self.progress.verdict)
        if p.goes_on and self.config.gated:  # the settings may ask for less than when the verdict was made
            if accepted and p.accepted + 1 >= self.config.iterations:
                self._finish(self._all_accepted())
            elif not accepted and p.next_plan is None:
                self._plan_weaker()  # the first version of the format did not keep it
        if accepted:
            self.world.accept()
        else:
            self.world.take_back()
        p.accepted += accepted
        p.verdict, p.phase = None, Phase.WAITING if p.goes_on else Phase.DONE
        self.world.carried_out(accepted)
        if p.phase is Phase.DONE and not at_end and not p.stopped:
            self.world.rewind(step, self.max_steps - step)  # the training goes on for another callback

    def _prune(self, step: int) -> None:
        p = self.progress
        if self.config.gated and p.baseline is None:
            raise self.world.no_metric()
        plan = p.next_plan or self.world.compare(p.accepted, p.k)
        p.next_plan = None
        if plan is None:
            first = p.accepted == 0
            self._finish("nothing can be removed" if first else "nothing more can be removed", stop=not first)
            p.phase = Phase.DONE
            if first:
                self.world.nothing_removed()
            return
        self.world.prune(plan, step)
        p.phase, p.k = Phase.RETRAINING, plan["config"]["k"]
        p.value = p.measured_at = p.reason = None
        self._retrain(step)
        self.world.pruned()

    def _retrain(self, step: int) -> None:
        """The retraining that begins at a step: when it ends, and its learning rate."""
        steps = self.max_steps - step if self.is_last else self.retraining
        self.progress.boundary = step + steps
        self.world.rewind(step, steps)
