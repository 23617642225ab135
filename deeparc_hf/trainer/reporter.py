"""What a training with prunings tells: on the terminal, in the Trainer's logs, in the model's record, in its report."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ..architectures.adapters import is_adapted
from ..errors import ConfigError, PlanError
from ..healing.sites import Healing
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan, first_threshold
from ..reports.attempts import Attempt, Evaluation
from ..reports.run_report import RUN_REPORT, quality_text, structure_of, write_run_report
from .ending import advice, end_lines, outcome_of
from .machine import Progress, Verdict
from .schedule import needed_epochs
from .session import Session

__all__ = ["PLAN_FILE", "Reporter", "lists"]

PLAN_FILE = "pruning_plan.json"


class Reporter:
    """Notes of one run, which its progress keeps; the main process alone writes files and prints lines."""

    def __init__(self, config: MPruneConfig, session: Session, progress: Progress, metric: str) -> None:
        self._config = config
        self._session = session
        self._progress = progress
        self._metric = metric
        self._end: dict[str, Any] | None = None  # the figures of the run's end

    # ---- notes ----

    @property
    def _attempt(self) -> Attempt:
        return self._progress.attempts[-1]

    def open(self, plan: PruningPlan | None = None) -> None:
        """Begin the notes on the model as it is now: before the first pruning, or after one."""
        p, session = self._progress, self._session
        structure = structure_of(session.model, session.subject)
        frozen = lists(p.frozen)
        attempt = Attempt("before pruning", **structure, step=session.step, epoch=session.epoch, frozen=frozen)
        if plan is not None:
            attempt.iteration, attempt.k = p.accepted + 1, plan.config.k
            attempt.name = f"pruning {attempt.iteration}"
            attempt.thresholds = {name: stack.threshold for name, stack in plan.stacks.items()}
            attempt.compared = plan.comparison
            if plan.choice is not None:
                attempt.search, attempt.speedup, attempt.thresholds = str(plan.choice), plan.choice.speedup, {}
            attempt.removed = lists(p.record["iterations"][-1]["removed"])
            attempt.plan_removed = lists(plan.removed)
        p.attempts.append(attempt)

    def reopen(self) -> None:
        """Begin the notes on the pruning at hand anew, because its training begins anew."""
        attempt = self._attempt
        attempt.step, attempt.epoch, attempt.training_seconds, attempt.evaluations = 0, 0.0, 0.0, ()

    def note(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Note the figures of an evaluation, in the model's record too."""
        p, session = self._progress, self._session
        known = {"step": session.step, "epoch": session.epoch, "sparse": session.zeroed_at is not None}
        evaluation = session.evaluations.evaluation(metrics, loader, session.mark(), **known)
        self._attempt.evaluations += (evaluation,)
        if p.in_retraining:
            self._record(evaluation)
        self.write()

    def note_best(self) -> None:
        """Have the record tell the figures of the best checkpoint, whose weights the Trainer has loaded at the end."""
        best = self._session.state.best_global_step
        self._record(*(evaluation for evaluation in self._attempt.evaluations if evaluation.step == best))

    def conclude_with(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Note an evaluation after the training's end: it is of the model that is left."""
        evaluation = self._session.evaluations.conclude(metrics, loader, self._session.mark())
        if self._progress.accepted and evaluation.is_of_evaluation_data:
            self._record(evaluation)
        self.write()

    def _record(self, *evaluations: Evaluation) -> None:
        """Have the record tell evaluations; several of the same weights, on several data sets, add up."""
        record, data = self._progress.record, self._session.evaluations.data
        if not evaluations or record is None or not record["iterations"]:
            return
        entry = record["iterations"][-1]
        for evaluation in evaluations:
            same = evaluation.mark is not None and entry.get("weights") == evaluation.mark
            earlier = entry.get("metrics", {}) if same else {}
            kept = {key: value for key, value in earlier.items() if key not in evaluation.metrics}
            entry.update(metrics={**kept, **evaluation.lasting}, weights=evaluation.mark)
            entry["data"] = data if kept else {**data, "evaluation": evaluation.data}
        self.note_stages()

    def note_stages(self) -> None:
        """Have the model's record know what each step of the pruning at hand did."""
        record, host = self._progress.record, self._session.subject.host
        if record is None:
            return
        # a pruning that was taken back is none of the record's, whose last entry is the accepted one before it
        if self._attempt.stages and not self._attempt.is_taken_back:
            record["iterations"][-1]["stages"] = copy.deepcopy(self._attempt.stages)
        record["sparsity"] = (host.record() or record).get("sparsity")  # weights may have been zeroed since
        host.set_record(record)

    def judged(self, verdict: Verdict) -> None:
        p, attempt = self._progress, self._attempt
        attempt.metric, attempt.value, attempt.baseline = self._metric, p.value, p.baseline
        attempt.drop, attempt.reason = None if p.value is None else verdict.drop, verdict.reason

    # ---- files ----

    def write(self) -> None:
        session, p = self._session, self._progress
        if not session.is_main:
            return
        session.folder.mkdir(parents=True, exist_ok=True)
        metric = self._metric if self._config.gated or self._config.metric else None
        weights = session.mark() if p.is_over else None
        more = {**session.evaluations.to_dict(), "weights": weights, "end": self._end}
        write_run_report(session.folder, self._config, p.for_report(), metric, session.zeroed_at, more)

    def write_plan(self, plan: PruningPlan | None) -> None:
        """Write the plan that is carried out; None: it was taken back, and none is left."""
        file = self._session.folder / PLAN_FILE
        if self._session.is_main and plan is None:
            file.unlink(missing_ok=True)
        elif self._session.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            plan.to_json(file)

    def read_plan(self) -> PruningPlan | None:
        """The plan of the pruning at hand, for a resumed run; None if the file is not there or tells of another."""
        try:
            plan = PruningPlan.from_json(self._session.folder / PLAN_FILE)
        except (OSError, PlanError):
            return None
        # the first row is of no pruning: no plan is its own
        is_own = self._attempt.k is not None and lists(plan.removed) == self._attempt.plan_removed
        return plan if is_own else None

    def _log(self, **figures: float | None) -> None:
        """Send the figures of the pruning at hand to the logs, and write the report."""
        structure = structure_of(self._session.model, self._session.subject)
        figures = {
            "iteration": self._attempt.iteration,
            "k": self._attempt.k,
            "blocks": sum(structure["blocks"].values()),
            "parameters": structure["parameters"],
            "frozen_blocks": sum(map(len, self._progress.frozen.values())),
            **{f"loss_{stage}": quality["loss"] for stage, quality in self._attempt.stages.items()},
            **figures,
        }
        self._session.log({f"pruning_{name}": value for name, value in figures.items() if value is not None})
        self.write()

    # ---- what the user is told ----

    def outline(self, *doubts: str | None) -> None:
        """Tell what is going to happen, and what is doubtful, so that a mistake is seen at once."""
        c, session = self._config, self._session
        if session.steps_per_epoch is None:
            length = f"the training has {session.max_steps} steps"
        else:
            epochs = session.max_steps / session.steps_per_epoch
            length = f"{needed_epochs(c)} of the training's {epochs:g} epochs"
        parts = [f"{_count(c.start_epoch, 'epoch')} before the first pruning"] if c.start_epoch else []
        retraining = f"{_count(c.retrain_epochs, 'epoch')} of retraining{' each' if c.iterations > 1 else ''}"
        parts += [f"{_count(c.iterations, 'pruning')} with {retraining}"]
        gate = f"; {self._metric} may get worse by {c.max_drop:g}" if c.gated else ""
        more = ""
        if c.gated and self._metric.removeprefix("eval_") != "loss" and not session.args.eval_on_start:
            more = (
                f" The first evaluation shows whether {self._metric} is measured; eval_on_start=True makes one "
                "before the first step."
            )
        session.say(f"Pruning schedule: {', then '.join(parts)} ({length}){gate}.{more}")
        for doubt in filter(None, doubts):
            session.warn(doubt)

    def warn_of_changes(self, changed: Mapping[str, str]) -> None:
        """Warn of settings that are others than those that a resumed run began with."""
        over = self._progress.is_over
        rule = "this run is finished, so they count no more" if over else "they count from here on; what was done stays"
        shown = ", ".join(f"{name} {change}" for name, change in changed.items())
        self._session.warn(f"The run is resumed with other settings than it began with ({shown}): {rule}.")

    def pruned(self, plan: PruningPlan, healings: Sequence[Healing], stages: dict[str, Any]) -> None:
        """Begin the notes on a pruning, and tell what it has done."""
        p, session = self._progress, self._session
        self.open(plan)
        self._attempt.healing, self._attempt.stages = [healing.to_dict() for healing in healings], stages
        again = ", another try" if sum(a.iteration == p.accepted + 1 for a in p.attempts) > 1 else ""
        against = ""
        if self._config.gated and p.baseline is not None:
            against = f" The baseline of {self._metric} is {p.baseline:.4g}."
        session.say(
            f"Pruning {p.accepted + 1}{again} (k={p.k}), at step {session.step}.{against} Blocks as they are "
            f"numbered now:\n{plan}"
        )
        for healing in healings:
            session.say(f"Healing: {healing}")
        self.note_stages()
        if stages:
            names = {"before": "before", "removed": "right after the removal", "healed": "after healing"}
            figures = ", ".join(f"{quality_text(quality)} {names[stage]}" for stage, quality in stages.items())
            first = next(iter(stages.values()))
            session.say(f"Loss on {first['samples']} samples ({first['data']}): {figures}.")
        self.write_plan(plan)
        self._log()

    def nothing_removed(self, plan: PruningPlan) -> None:
        """Tell that the training goes on as it would without pruning."""
        first = first_threshold(plan)
        pinned = "its pinned and protected blocks allow no removal"
        why = pinned if first is None else f"the first block would go at threshold {first:.4f}"
        self._session.say(f"{plan}\nNothing is removed ({why}); the training goes on as it would without pruning.")
        self.write_plan(plan)

    def carried_out(self, accepted: bool) -> None:
        """Tell and note that a pruning was accepted or taken back."""
        attempt = self._attempt
        attempt.decision = "accepted" if accepted else "rolled back"
        attempt.reason = attempt.reason or "not judged (no max_drop)"
        back = "" if accepted else f" The weights from step {attempt.step} are back."
        self._session.say(f"Pruning {attempt.iteration} (k={attempt.k}) is {attempt.decision}: {attempt.reason}.{back}")
        self._log(accepted=float(accepted), drop=attempt.drop)

    def warn_of_allowance(self) -> None:
        """Warn where the gate cannot reject anything."""
        baseline, allowed = float(self._progress.baseline or 0.0), float(self._config.max_drop or 0.0)
        if 0 <= baseline <= allowed:
            hint = f" Did you mean {allowed / 100:g}?" if baseline <= 1 < allowed else ""
            self._session.warn(
                f"max_drop {allowed:g} is not below the baseline of {baseline:.4g}, so no pruning can be "
                f"rejected.{hint}"
            )

    def conclude(self) -> None:
        """Tell how the run ended: what was lost and won, where the model lies, and what to do next."""
        p, session, state = self._progress, self._session, self._session.state
        ended_at = f"step {session.step}"
        if state.epoch is not None:
            ended_at = f"epoch {session.epoch:g} of {session.epochs:g}"
        self._end = outcome_of(p, session, self._config, self._metric)
        blocks, parameters = self._end["blocks"], self._end["parameters"]
        frozen = _count(sum(map(len, p.frozen.values())), "block")
        told = f" Still frozen in this process: {frozen} (a reload from the disk lifts that)."
        stay = told if any(p.frozen.values()) else ""
        session.say(
            f"Pruning is finished at {ended_at} ({p.reason}): {p.accepted} of {self._config.iterations} accepted, "
            f"{blocks['before']} -> {blocks['after']} blocks, {parameters['before']:,} -> {parameters['after']:,} "
            f"parameters.{stay} Report: {session.folder / RUN_REPORT}.md"
        )
        session.say("\n".join(f"  {line}" for line in end_lines(self._end)))
        if p.accepted and not state.is_hyper_param_search:
            session.say(
                "\n".join(advice(self._end, session.folder, session.saved_in, adapted=is_adapted(session.model)))
            )

    # ---- the gate's metric ----

    def check_metric(self) -> None:
        """Refuse to go on where the model as it is now was evaluated without the gate's metric."""
        p = self._progress
        waits = self._config.gated and not p.is_over and p.measured_at is None
        if waits and any(evaluation.is_of_evaluation_data for evaluation in self._attempt.evaluations):
            raise self.no_metric()

    def no_metric(self) -> ConfigError:
        """The error where evaluations do not give the gate's metric."""
        keys = {key for evaluation in self._attempt.evaluations for key in evaluation.metrics}
        seen = sorted(key.removeprefix("eval_") for key in keys)
        near = difflib.get_close_matches(self._metric.removeprefix("eval_"), seen, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Give metric=... one of these names."
        if seen == ["loss"]:
            hint = "Give the Trainer compute_metrics, or set metric='loss'."
        return ConfigError(
            f"max_drop bounds {self._metric!r}, which was not among the metrics of the evaluation: "
            f"{', '.join(seen) or 'there was none'}. {hint}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def lists(blocks: Mapping[str, Any]) -> dict[str, list[int]]:
    """Blocks by stack, as JSON has them."""
    return {name: list(indices) for name, indices in blocks.items()}
