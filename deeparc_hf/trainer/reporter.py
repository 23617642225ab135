"""What a training with prunings in it tells: on the terminal, in the Trainer's logs, in the model's record, in the
run's report.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..architectures import Subject
from ..checkpoint.record import PrunedConfig
from ..checkpoint.weights_mark import mark_of_model
from ..errors import ConfigError, DeepArcWarning, PlanError
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..reports.phases import FINISHED, RETRAINING
from ..reports.run_report import RUN_REPORT, quality_text, structure_facts, write_run_report
from .ending import advice, end_facts, end_lines
from .run_facts import RunFacts, lasting
from .schedule import Progress
from .session import companions_on
from .trackers import Trackers

__all__ = ["PLAN_FILE", "Journal", "lists"]

PLAN_FILE = "pruning_plan.json"


class Journal:
    """Notes of one run; files are written and lines printed in the main process only.

    Args:
        config: the settings.
        args: the Trainer's arguments.
        model: the model.
        progress: where the notes are kept, so that checkpoints keep them too.
        metric: the gate's metric.
        subject: gives the model as it is now, described.
        loader: the training's data loader.
    """

    def __init__(
        self,
        config: MPruneConfig,
        args: TrainingArguments,
        model: nn.Module,
        progress: Progress,
        metric: str,
        subject: Callable[[], Subject],
        loader: Any = None,
    ) -> None:
        self._subject = subject
        self._config = config
        self._args = args
        self._model = model
        self._progress = progress
        self._metric = metric
        self.facts = RunFacts(args, loader)
        self._trackers = Trackers()
        self._end: dict[str, Any] | None = None  # the figures of the run's end

    def open(self, state: TrainerState, plan: PruningPlan | None = None, record: PrunedConfig | None = None) -> None:
        """Begin the notes on the model as it is now: before the first pruning, or after one."""
        p = self._progress
        entry: dict[str, Any] = {"name": "before pruning"}
        if plan is not None and record is not None:
            entry = {
                "name": f"pruning {p.accepted + 1}",
                "iteration": p.accepted + 1,
                "k": plan.config.k,
                "thresholds": {name: stack.threshold for name, stack in plan.stacks.items()},
                "removed": lists(record.iterations[-1]["removed"]),
                "plan_removed": lists(plan.removed),
            }
        facts = {"step": state.global_step, "epoch": state.epoch or 0.0, "frozen": lists(p.frozen)}
        p.attempts.append(
            {**entry, **structure_facts(self._subject()), **facts, "training_seconds": 0.0, "evaluations": []}
        )

    def reopen(self) -> None:
        """Begin the notes on the pruning at hand anew, because its training begins anew."""
        self._progress.attempts[-1].update(step=0, epoch=0.0, training_seconds=0.0, evaluations=[])

    def add_training_time(self, seconds: float) -> None:
        self._progress.attempts[-1]["training_seconds"] += seconds

    def note(self, state: TrainerState, metrics: Mapping[str, Any], loader: Any = None) -> None:
        """Note the figures of an evaluation, in the model's record too."""
        p = self._progress
        found = self.facts.evaluation(self._model, metrics, loader)
        found["sparse"] = companions_on(self._model).sparsified_at >= 0
        evaluations = p.attempts[-1]["evaluations"]
        entry = {"step": state.global_step, "epoch": state.epoch or 0.0, **found}
        evaluations.append(entry)
        if p.phase == RETRAINING and p.record is not None:
            self._record_metrics(found)
            self.note_stages()
        self.report()

    def note_best(self, state: TrainerState) -> None:
        """Have the record tell the figures of the best checkpoint, whose weights the Trainer has loaded at the end."""
        p = self._progress
        best = [e for e in p.attempts[-1]["evaluations"] if e["step"] == state.best_global_step]
        if self._args.load_best_model_at_end and best and p.record is not None and p.record["iterations"]:
            for entry in best:
                self._record_metrics(entry)
            self.note_stages()

    def conclude_with(self, metrics: Mapping[str, Any], loader: Any) -> None:
        """Note an evaluation after the training's end: it is of the model that is left."""
        p = self._progress
        found = self.facts.conclude(self._model, metrics, loader)
        if p.accepted and p.record is not None and any(key.startswith("eval_") for key in metrics):
            self._record_metrics(found)
            self.note_stages()
        self.report()

    def _record_metrics(self, found: Mapping[str, Any]) -> None:
        """Have the record tell an evaluation; several of the same weights, on several data sets, add up."""
        entry = self._progress.record["iterations"][-1]  # type: ignore[index]
        same = found["weights"] is not None and entry.get("weights") == found["weights"]
        earlier = entry.get("metrics", {}) if same else {}
        kept = {key: value for key, value in earlier.items() if key not in found["metrics"]}
        entry.update(metrics={**kept, **lasting(found["metrics"])}, weights=found["weights"])
        entry["data"] = {**self.facts.data, "evaluation": found["data"]} if not kept else self.facts.data

    def note_stages(self) -> None:
        """Have the model's record know what each step of the pruning at hand did."""
        p = self._progress
        if p.record is not None and p.attempts[-1].get("stages"):
            p.record["iterations"][-1]["stages"] = copy.deepcopy(p.attempts[-1]["stages"])
        host = self._subject().host
        if p.record is not None:
            p.record["sparsity"] = (host.record() or p.record).get("sparsity")  # weights may have been zeroed since
            host.set_record(p.record)

    def check_metric(self) -> None:
        """Check, after an evaluation of the model as it is now, that the gate's metric was among its metrics.

        Other evaluations have another prefix (`metric_key_prefix`).

        Raises:
            ConfigError: if not.
        """
        p = self._progress
        if not self._config.gated or p.phase == FINISHED or p.measured_at is not None:
            return
        if any(key.startswith("eval_") for entry in p.attempts[-1]["evaluations"] for key in entry["metrics"]):
            raise self.no_metric()

    def log(self, state: TrainerState, control: TrainerControl, **figures: float | None) -> None:
        """Send the figures of the pruning at hand to the logs, and write the report."""
        p = self._progress
        facts = structure_facts(self._subject())
        figures = {
            "iteration": p.attempts[-1]["iteration"],
            "k": p.attempts[-1]["k"],
            "blocks": sum(facts["blocks"].values()),
            "parameters": facts["parameters"],
            "frozen_blocks": sum(map(len, p.frozen.values())),
            **{f"loss_{stage}": found["loss"] for stage, found in p.attempts[-1].get("stages", {}).items()},
            **figures,
        }
        shown = {f"pruning_{name}": value for name, value in figures.items() if value is not None}
        self._trackers.log(self._args, state, control, self._model, shown)
        self.report()

    def close(self) -> None:
        """Write the report a last time, and close what is open."""
        self.report()
        self._trackers.close()

    def report(self) -> None:
        """Write the run's report."""
        if self._args.process_index == 0:
            folder = Path(self._args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            zeroed = companions_on(self._model).sparsified_at
            metric = self._metric if self._config.gated or self._config.metric else None
            weights = mark_of_model(self._model) if self._progress.phase == FINISHED else None
            facts = {**self.facts.to_dict(), "weights": weights, "end": self._end}
            write_run_report(
                folder, self._config, self._progress.to_dict(), metric, zeroed if zeroed >= 0 else None, facts
            )

    def write_plan(self, plan: PruningPlan | None) -> None:
        """Write the plan that is carried out; None: it was taken back, and none is left."""
        if self._args.process_index != 0:
            return
        file = Path(self._args.output_dir, PLAN_FILE)
        if plan is None:
            file.unlink(missing_ok=True)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            plan.to_json(file)

    def read_plan(self) -> PruningPlan | None:
        """The plan of the pruning at hand, for a resumed run; None if the file is not there or tells of another."""
        try:
            plan = PruningPlan.from_json(Path(self._args.output_dir, PLAN_FILE))
        except (OSError, PlanError):
            return None
        return plan if lists(plan.removed) == self._progress.attempts[-1].get("plan_removed") else None

    def outline(self, length: str, *doubts: str | None) -> None:
        """Tell what is going to happen, and what is doubtful, so that a mistake is seen at once."""
        c = self._config
        parts = [f"{_count(c.start_epoch, 'epoch')} before the first pruning"] if c.start_epoch else []
        retraining = f"{_count(c.retrain_epochs, 'epoch')} of retraining{' each' if c.iterations > 1 else ''}"
        parts += [f"{_count(c.iterations, 'pruning')} with {retraining}"]
        gate = f"; {self._metric} may get worse by {c.max_drop:g}" if c.gated else ""
        more = ""
        if c.gated and self._metric.removeprefix("eval_") != "loss" and not self._args.eval_on_start:
            more = (
                f" The first evaluation shows whether {self._metric} is measured; eval_on_start=True makes one "
                f"before the first step."
            )
        self.say(f"Pruning schedule: {', then '.join(parts)} ({length}){gate}.{more}")
        for doubt in doubts:
            if doubt is not None:
                self.warn(doubt)

    def tell_stages(self) -> None:
        """Tell what the pruning at hand has done so far."""
        self.note_stages()
        found = self._progress.attempts[-1]["stages"]
        if found:
            names = {"before": "before", "removed": "right after the removal", "healed": "after healing"}
            figures = ", ".join(f"{quality_text(value)} {names[stage]}" for stage, value in found.items())
            data = next(iter(found.values()))
            self.say(f"Loss on {data['samples']} samples ({data['data']}): {figures}.")

    def warn_of_allowance(self) -> None:
        """Warn where the gate cannot reject anything."""
        baseline, allowed = float(self._progress.baseline or 0.0), float(self._config.max_drop or 0.0)
        if 0 <= baseline <= allowed:
            hint = f" Did you mean {allowed / 100:g}?" if baseline <= 1 < allowed else ""
            self.warn(
                f"max_drop {allowed:g} is not below the baseline of {baseline:.4g}, so no pruning can be "
                f"rejected.{hint}"
            )

    def conclude(self, state: TrainerState) -> None:
        """Tell how the run ended: what was lost and won, where the model lies, and what to do next."""
        p = self._progress
        ended_at = (
            f"step {state.global_step}" if state.epoch is None else f"epoch {state.epoch:g} of {state.num_train_epochs}"
        )
        self._end = end_facts(p, self._subject(), self._config, self._args, state, self._metric)
        first, last = p.attempts[0], structure_facts(self._subject())
        blocks = f"{sum(first['blocks'].values())} -> {sum(last['blocks'].values())} blocks"
        parameters = f"{first['parameters']:,} -> {last['parameters']:,} parameters"
        frozen = sum(map(len, p.frozen.values()))
        stay = (
            f" Still frozen in this process: {_count(frozen, 'block')} (a reload from the disk lifts that)."
            if frozen
            else ""
        )
        accepted = f"{p.accepted} of {self._config.iterations} accepted"
        self.say(
            f"Pruning is finished at {ended_at} ({p.reason}): {accepted}, {blocks}, {parameters}.{stay} "
            f"Report: {Path(self._args.output_dir, RUN_REPORT)}.md"
        )
        self.say("\n".join(f"  {line}" for line in end_lines(self._end)))
        if p.accepted and not state.is_hyper_param_search:
            self.say("\n".join(advice(self._end, self._args)))

    def say(self, text: str) -> None:
        """Print, without breaking a progress bar."""
        if self._args.process_index == 0:
            tqdm.write(text)

    def warn(self, text: str) -> None:
        if self._args.process_index == 0:
            warnings.warn(text, DeepArcWarning, stacklevel=4)

    def no_metric(self) -> ConfigError:
        """The error where evaluations do not give the gate's metric."""
        keys = {key for evaluation in self._progress.attempts[-1]["evaluations"] for key in evaluation["metrics"]}
        seen = sorted(key.removeprefix("eval_") for key in lasting(dict.fromkeys(keys, 0.0)))
        near = difflib.get_close_matches(self._metric.removeprefix("eval_"), seen, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Give metric=... one of these names."
        if seen == ["loss"]:
            hint = "Give the Trainer compute_metrics, or set metric='loss'."
        found = ", ".join(seen) or "there was none"
        return ConfigError(
            f"max_drop bounds {self._metric!r}, which was not among the metrics of the evaluation: {found}. {hint}"
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def lists(blocks: Mapping[str, Any]) -> dict[str, list[int]]:
    """Blocks by stack, as JSON has them."""
    return {name: list(indices) for name, indices in blocks.items()}
