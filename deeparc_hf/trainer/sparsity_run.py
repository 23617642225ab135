"""One training with weights zeroed in it: when, by what, and that they stay zero."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor

from ..core.environment import package_versions
from ..core.files import finite, write_whole
from ..core.markdown import made_with, table
from ..core.progress_bars import shows_bars
from ..errors import ConfigError, RecordError, SparsityError
from ..observe.training_calibration import TrainingCalibration
from ..reports.attempts import Evaluation
from ..reports.provenance import TIMES
from ..sparsity.config import WandaConfig
from ..sparsity.masks import Zeros
from ..sparsity.report import SparsityReport
from ..sparsity.sparsify import keep_recorded, recorded_matrices, sparsify
from .ending import NEXT
from .evaluations import compared_metrics, last_evaluation, value_text
from .machine import Saved
from .rehearsal import rehearse
from .session import Event, Member, Session

__all__ = ["SPARSITY_REPORT", "SparsityProgress", "SparsityRun"]

SPARSITY_REPORT = "sparsity_report"

WAITING, KEPT, SPARSE = "waiting", "kept", "sparse"

_ADVICE = "Put WandaCallback last in the list of callbacks, or set keep_zeros=False if the zeros are not to stay."


@dataclass
class SparsityProgress(Saved):
    """Where a run stands: all that a resumed run needs. JSON types only; lives in the Trainer's trainer_state.json.

    Attributes:
        phase: WAITING for its epoch, KEPT (the zeros of the checkpoint that training began with are kept), or SPARSE.
        step, epoch: when the weights were zeroed.
        sparsity: what the model's record says of zeroed weights.
        report: what was asked for and measured when they were zeroed (`SparsityReport.to_dict`).
        asked: whether a sparsification was asked for; None: not settled yet.
        evaluations: step, epoch, whether the weights were zeroed, and metrics.
        measured: step, epoch and share of zeros at the end of each epoch since.
    """

    TELLS = "what was zeroed"

    phase: str = WAITING
    step: int | None = None
    epoch: float | None = None
    sparsity: dict[str, Any] | None = None
    report: dict[str, Any] | None = None
    asked: bool | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> Self:
        lists = all(isinstance(fields[name], list) for name in ("evaluations", "measured"))
        if fields["phase"] not in (WAITING, KEPT, SPARSE) or not lists:
            raise ValueError
        if fields["report"] is not None:
            SparsityReport.from_dict(fields["report"])
        return cls(**fields)


class SparsityRun(Member):
    """The sparsification of one training; where none was `asked` for, a model that is sparse already is kept so."""

    def __init__(
        self,
        config: WandaConfig,
        asked: bool,
        calibration: TrainingCalibration | None,
        session: Session,
        progress: SparsityProgress,
    ) -> None:
        self.config = config
        self.session = session
        self.progress = progress
        self.report = None if progress.report is None else SparsityReport.from_dict(progress.report)
        self.keeps_zeros = config.keep_zeros
        self._calibration = calibration
        self._zeros = Zeros()
        if progress.asked is None:
            progress.asked = asked or session.record().sparsity is None
        self._save_later = False
        self._keeping = False

    @property
    def has_work(self) -> bool:
        """Whether weights are still to be zeroed."""
        return not self.ended and self.progress.phase == WAITING and bool(self.progress.asked)

    # ---- beginning ----

    def begin(self, began_with: Mapping[str, Any] | None = None) -> None:
        """Refuse what cannot work, and keep what is zero already; a resumed run `began_with` noted settings."""
        self._check_epochs()
        inner = getattr(self.session.optimizer, "optimizer", self.session.optimizer)
        if self.config.keep_zeros and callable(getattr(inner, "eval", None)):
            raise ConfigError(
                f"{type(inner).__name__} trains one set of weights, and evaluates and saves another that it makes of "
                "them (schedule-free optimizers do so): zeros would not be in what is saved. Use another optimizer, "
                "or call sparsify_model after the training."
            )
        if began_with is not None:
            self._warn_of_changes(began_with)
        self._keep_recorded(resumed=began_with is not None)
        if self.progress.phase == SPARSE:
            self.session.zeroed_at = self.progress.step
        if self.has_work and self._calibration is not None:
            rehearse(self.session.subject, self._calibration, "WandaCallback")

    def _warn_of_changes(self, began_with: Mapping[str, Any]) -> None:
        now = self.config.to_dict()
        keys = [key for key in now if key in began_with and began_with[key] != now[key]]
        if keys:
            shown = ", ".join(f"{key} {began_with[key]} -> {now[key]}" for key in keys)
            rule = "they count from here on" if self.progress.phase == WAITING else "what was zeroed stays as it is"
            self.session.warn(
                f"The run is resumed with other settings of sparsity than it began with ({shown}): {rule}."
            )

    def _check_epochs(self) -> None:
        start, steps_per_epoch = self.config.start_epoch, self.session.steps_per_epoch
        if steps_per_epoch is None:
            if start > 0:
                raise ConfigError(
                    "The training data has no length, so it is not known where an epoch ends: weights can be zeroed at "
                    f"the start only (start_epoch=0), found start_epoch={start}."
                )
            return
        epochs = self.session.state.max_steps / steps_per_epoch
        if self.has_work and start > epochs:
            raise ConfigError(
                f"Weights are to be zeroed after {start} epochs, but the training has {epochs:g} (of "
                f"{steps_per_epoch} steps each). Lower start_epoch, or train for longer: num_train_epochs (or "
                "max_steps) for start_epoch and for retraining."
            )

    # ---- events ----

    def hear(self, event: Event) -> None:
        if event is Event.TAKEN_BACK and self.config.keep_zeros:
            self._add_recorded()  # the zeros of blocks that came back

    def epoch_begin(self) -> None:
        if self.session.step == 0:
            self._outline()
        if self._is_due:
            self._sparsify()

    def _outline(self) -> None:
        """Tell what is going to happen; refuse to wait for verdicts until the training is over."""
        session, start = self.session, self.config.start_epoch
        if not self.has_work or session.steps_per_epoch is None:
            return
        epochs = session.state.max_steps / session.steps_per_epoch
        judged = next((member for member in session.members if member.judged_after is not None), Member())
        waits = judged.judged_after is not None and start > (judged.pruning_starts or 0)
        if waits and judged.judged_after >= epochs:
            raise ConfigError(
                "Weights are zeroed when no pruning can be taken back any more (max_drop), which is after "
                f"{judged.judged_after} epochs at the earliest, and the training has {epochs:g}. Train for longer, or "
                f"set start_epoch to {judged.pruning_starts} or less: zeroing then comes before the first pruning."
            )
        when = f"after {start} epochs"
        if waits:
            when = f"after {judged.judged_after} epochs at the earliest, when prunings are judged"
        retraining = "" if start < epochs else ", at its end: nothing is retrained"
        what = self.config.pattern or f"{100 * self.config.sparsity:g} %"
        self.session.say(f"Zeroing: {self.config.method}, {what}, {when} (of the training's {epochs:g}){retraining}.")

    def step_begin(self) -> None:
        """After everything that happens when an epoch begins: what was waited for may have happened."""
        if self._is_due:
            self._sparsify()

    def after_optimizer(self) -> None:
        self._zeros.apply()

    def step_end(self) -> None:
        """At the step after which the weights are zeroed: measure the model as it is before."""
        session, control = self.session, self.session.control
        ends_epoch = session.steps_per_epoch is not None and session.step % session.steps_per_epoch == 0
        if ends_epoch and self._is_due:
            control.should_evaluate = control.should_evaluate or session.args.eval_strategy != "no"
            # what is saved now would be a dense model, which the evaluation of the sparse one would be taken for
            self._save_later, control.should_save = control.should_save, False

    def epoch_end(self) -> None:
        control = self.session.control
        control.should_save = control.should_save or self._save_later
        self._save_later = False
        if self._is_due:
            self._sparsify()
            control.should_evaluate = control.should_evaluate or self.session.args.eval_strategy != "no"
        else:
            self.check()

    def evaluated(self, metrics: Mapping[str, Any], loader: Any) -> None:
        self.check(note=False)
        session = self.session
        known = {"step": session.step, "epoch": session.epoch, "sparse": self.progress.phase != WAITING}
        evaluation = session.evaluations.evaluation(metrics, loader, session.mark(), **known)
        blocks = sum(session.subject.lengths.values())
        self.progress.evaluations.append({**evaluation.to_dict(), "blocks": blocks})
        self._write()

    def evaluated_after_end(self, metrics: Mapping[str, Any], loader: Any) -> None:
        self.session.evaluations.conclude(metrics, loader, self.session.mark())
        self._write()

    def end(self) -> None:
        """Check a last time: the best checkpoint may have been loaded."""
        self.check()
        session, state = self.session, self.session.state
        if self.has_work:
            early = "it ended early" if session.step < state.max_steps else "a pruning was judged too late"
            why = "a pruning could still be taken back" if session.may_be_taken_back else early
            session.warn(
                f"The training ended before the weights were zeroed ({why}). Call sparsify_model, or train for more "
                "epochs."
            )
        self.ended = True
        self._write()
        session.close()
        if self.progress.phase != WAITING:
            kept = f"kept in {len(self._zeros)} matrices" if self._keeping else "not kept (keep_zeros=False)"
            session.say(f"Zeros are {kept}. Report: {session.folder / SPARSITY_REPORT}.md")
            self._tell_end(state.best_global_step if session.args.load_best_model_at_end else None)

    def _tell_end(self, best: int | None) -> None:
        """Tell what the zeros cost, and what to do next. The model is that of the best step, where it was loaded."""
        noted = [(Evaluation.from_dict(entry), entry["blocks"]) for entry in self.progress.evaluations]
        blocks = {id(evaluation): count for evaluation, count in noted}
        dense = last_evaluation(evaluation for evaluation, _ in noted if not evaluation.sparse)
        sparse = last_evaluation((evaluation for evaluation, _ in noted if evaluation.sparse), best)
        if dense is not None and sparse is not None and blocks[id(dense)] == blocks[id(sparse)]:
            for name, found in compared_metrics(dense, sparse, self.session.args.metric_for_best_model).items():
                self.session.say(
                    f"  {name}: {value_text(found['before'])} before the zeroing, {value_text(found['after'])} now"
                )
        if not any(member.removes_blocks for member in self.session.members):
            self.session.say(NEXT)

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps. Blocks may have been removed since the weights were zeroed."""
        self.progress.sparsity = copy.deepcopy(self.session.record().sparsity)
        return self.progress.to_dict()

    def check(self, note: bool = True) -> None:
        """Check that what was zeroed is zero, and note how much that is."""
        if not self._keeping:
            return
        self._zeros.check(self.session.model, _ADVICE)
        try:
            matrices = recorded_matrices(self.session.subject, self.session.record())
        except RecordError as error:
            raise SparsityError(f"Zeroed weights were lost: {error}") from error
        lost = [name for name, (matrix, _) in matrices.items() if not self._zeros.holds(matrix.weight)]
        if lost:
            raise SparsityError(
                f"The weight of {lost[0]} is another parameter than the one whose zeros were kept: something has put "
                "it there since. Change weights in place, or call sparsify_model afterwards."
            )
        size = sum(matrix.weight.numel() for matrix, _ in matrices.values())
        if size and note:
            share = sum(zeros for _, zeros in matrices.values()) / size
            now = {"step": self.session.step, "epoch": self.session.epoch, "share": share}
            earlier = [entry for entry in self.progress.measured if entry["step"] != now["step"]]
            self.progress.measured = [*earlier, now]
            self._write()

    # ---- actions ----

    def _keep_recorded(self, resumed: bool) -> None:
        """Keep the zeros that the model came with, or those of the checkpoint that is resumed. Its weights are loaded,
        but may not be in their places yet (MPruneCallback sees to that).
        """
        recorded = self.session.subject.host.record() is not None
        if resumed and (recorded or self.progress.sparsity is not None):
            # whatever the model in memory was, its weights are now those of the checkpoint
            self._note_zeros(self.progress.sparsity)
        if self.session.record().sparsity is None:
            return
        if not self.config.keep_zeros:
            self._note_zeros(None)
            return
        self._add_recorded()
        if self.progress.phase == WAITING and not self.progress.asked:
            self.progress.phase = KEPT
            self.session.say(
                f"WandaCallback keeps the zeros that the checkpoint's record lists, in {len(self._zeros)} matrices."
            )

    def _add_recorded(self) -> None:
        """Keep the zeros that the record lists, where they are not kept yet."""
        self._keeping = keep_recorded(self._zeros, self.session.subject, self.session.record()) or self._keeping

    @property
    def _is_due(self) -> bool:
        """Whether weights are to be zeroed now; where a pruning may be taken back, dense weights might come back."""
        epoch_has_come = self.session.epoch >= self.config.start_epoch - 1e-9
        return self.has_work and epoch_has_come and not self.session.may_be_taken_back

    def _sparsify(self) -> None:
        p, session, calibration = self.progress, self.session, self._calibration
        with nullcontext() if calibration is None else calibration.reading():
            bars = shows_bars(session.args)
            masks: dict[str, Tensor] = {}
            note = masks.__setitem__
            self.report = sparsify(session.subject, calibration, self.config, progress=bars, note=note)
        if self.config.keep_zeros:
            self._keeping = True
            for name, mask in masks.items():
                self._zeros.add(session.subject.root.get_submodule(name).weight, mask)
        else:
            self._note_zeros(None)
        p.phase, p.step, p.epoch, p.report = SPARSE, session.step, session.epoch, self.report.to_dict()
        p.sparsity = copy.deepcopy(session.record().sparsity)
        session.forget_best()  # a checkpoint without the zeros must not be the best
        session.tell(Event.ZEROED)
        session.log({"sparsity_asked": self.report.asked, "sparsity_measured": self.report.measured})
        session.say(f"Weights are zeroed at step {p.step} (epoch {p.epoch:g}).\n{self.report}")
        self._write()

    def _note_zeros(self, sparsity: Mapping[str, Any] | None) -> None:
        """Have the record list zeros; those that are not kept are not in it."""
        record = self.session.record()
        versions = record.versions or package_versions()
        self.session.subject.host.set_record(replace(record, sparsity=sparsity, versions=versions).to_dict())

    def _write(self) -> None:
        p, session = self.progress, self.session
        if not session.is_main or p.phase == WAITING:
            return
        config = self.config.to_dict() if p.report is None else p.report["config"]
        progress = {name: value for name, value in p.to_dict().items() if name != "sparsity"}
        data = {"config": config, **finite({**progress, **session.evaluations.to_dict()})}
        data |= {"weights": session.mark() if self.ended else None, "versions": package_versions()}
        session.folder.mkdir(parents=True, exist_ok=True)
        write_whole(session.folder / f"{SPARSITY_REPORT}.json", json.dumps(data, indent=1) + "\n")
        write_whole(session.folder / f"{SPARSITY_REPORT}.md", _markdown(data))


def _markdown(data: Mapping[str, Any]) -> str:
    """The report as Markdown, of what sparsity_report.json holds."""
    parts = ["# Sparsity report\n\nThe zeros that the checkpoint's record listed when the training began are kept.\n"]
    if data["report"] is not None:
        parts = [SparsityReport.from_dict(data["report"]).to_markdown()]
        parts.append(f"Zeroed in the training, at step {data['step']} (epoch {data['epoch']:g}).\n")
    if not data["config"]["keep_zeros"]:
        parts.append(
            "The zeros were not kept while training went on (keep_zeros=False): the model at the end is dense.\n"
        )
    if data["evaluations"]:
        parts.append(f"## Evaluations\n\n{_evaluations(data['evaluations'])}\n")
    if data["measured"]:
        rows = [[f"{m['epoch']:g}", str(m["step"]), f"{100 * m['share']:.4f}"] for m in data["measured"]]
        shown = table(["epoch", "step", "zeros in the recorded matrices (%)"], rows, left=())
        parts.append(f"## Measured at the end of each epoch\n\n{shown}\n")
    parts.append(f"{made_with(data['hardware'], data['versions'])}\n")
    return "\n".join(parts)


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> str:
    names = [key for key in dict.fromkeys(key for e in evaluations for key in e["metrics"]) if not key.endswith(TIMES)]
    rows = []
    for entry in evaluations:
        values = [entry["metrics"].get(name) for name in names]
        shown = ["-" if value is None else f"{value:.4f}" for value in values]
        zeroed = "zeroed" if entry["sparse"] else "not zeroed"
        rows.append([f"{entry['epoch']:g}", str(entry["step"]), str(entry["blocks"]), zeroed, *shown])
    return table(["epoch", "step", "blocks", "weights", *names], rows, left=(3,))
