"""What a card tells, gathered from a checkpoint's config and record and from the reports beside it, or from a live
model or Trainer.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import describe
from ..architectures.hosts import RECORD_KEY
from ..checkpoint.record import PrunedConfig, current_record
from ..checkpoint.weights_mark import SIZES, dtype_of_files, mark_of_files, mark_of_model
from ..core.plain_text import plain
from ..errors import PlanError
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..reports.attempts import (
    MOST_EVALUATIONS,
    Attempt,
    Evaluation,
    facts_in,
    number,
    read_json,
    texts_in,
    whole,
    wrong_in,
)
from ..reports.run_report import RUN_REPORT
from ..sparsity.report import SparsityReport
from .blocks import numbers_of_plan

__all__ = [
    "EVALUATIONS_FILE",
    "PLAN_FILE",
    "SPARSITY_FILE",
    "CardFacts",
    "facts_of_folder",
    "facts_of_model",
    "with_reports",
]

PLAN_FILE = "pruning_plan.json"
SPARSITY_FILE = "sparsity_report.json"
REPORT_FILE = "report.json"
EVALUATIONS_FILE = "evaluations.json"
_SAME_SHARE = 0.005  # blocks that went after the zeroing change the share a little
_WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)
_PROCESSORS = {
    "tokenizer": ("tokenizer_config.json", "tokenizer.json"),
    "image processor": ("preprocessor_config.json", "image_processor_config.json"),
}


@dataclass(frozen=True)
class CardFacts:
    """Plain data; what is not known is None or empty, and is left out of the card.

    Attributes:
        library: "transformers" or "timm".
        architecture: name of the model's class, or timm's name of its architecture.
        labels: names of the classes of a classifier.
        headless: whether a timm model has no classifier.
        record: what was done to the model; an empty one where nothing was.
        processor: "tokenizer" or "image processor", where one lies beside the model.
        parameters: number of parameters, before the first pruning and now.
        attempts: rows of the run: the model before, and each pruning that was tried. From the record where there is no
            report.
        from_run, from_report, evaluated: whether a run's report, that of a pruning without a Trainer, or an
            experiment's evaluations are of this model.
        dtype: of the weights, as torch names it.
        summary: metric, baseline, accepted, iterations, max_drop, reason and state of the run.
        config: settings of the last pruning.
        sparsity: what was zeroed, from the sparsity report; None where there is none. zeroed_in_training: whether a
            callback did it.
        final: evaluations of the model as it is, the last ones.
        data: what is known of the data, by use ("training", "evaluation").
        training, hardware, versions: settings of the training; what it ran on and with.
        plan: the last plan that was carried out.
        speed: time of one evaluation over that of the model before (ratio, low, high, blocks, turns), where it was
            measured.
        mark: of the weights (`fingerprint`); None where they are not there, so that it is not known which evaluation is
            of them.
    """

    library: str
    architecture: str | None
    record: PrunedConfig
    labels: tuple[str, ...] = ()
    headless: bool = False
    processor: str | None = None
    parameters: tuple[int | None, int | None] = (None, None)
    attempts: tuple[Attempt, ...] = ()
    from_run: bool = False
    from_report: bool = False
    dtype: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    sparsity: SparsityReport | None = None
    zeroed_in_training: bool = False
    final: tuple[Evaluation, ...] = ()
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)
    hardware: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: PruningPlan | None = None
    speed: Mapping[str, float] = field(default_factory=dict)
    evaluated: bool = False
    mark: str | None = None

    @property
    def removed(self) -> int:
        """Number of blocks that are gone."""
        return sum(map(len, self.record.removed.values()))

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks before the first pruning and now."""
        return sum(s.length for s in self.record.stacks.values()), sum(len(s.kept) for s in self.record.stacks.values())

    @property
    def continued(self) -> bool:
        """Whether there were prunings in trainings before the last one, of which the record knows the last metrics
        alone.
        """
        return len(self.attempts) > 1 and self.attempts[0].k is not None

    @property
    def reports(self) -> tuple[str, ...]:
        """Names of the files that tell of this model."""
        names = [f"{RUN_REPORT}.json", f"{RUN_REPORT}.md"] if self.from_run else []
        names += [SPARSITY_FILE, SPARSITY_FILE.replace(".json", ".md")] if self.sparsity is not None else []
        names += [PLAN_FILE] if self.plan is not None else []
        names += [EVALUATIONS_FILE] if self.evaluated else []
        return (*names, *([REPORT_FILE, REPORT_FILE.replace(".json", ".md")] if self.from_report else []))

    @property
    def zeros(self) -> tuple[int, int, int] | None:
        """Zeros, weights and number of the sparse matrices, by the record; None where nothing was zeroed."""
        matrices = (self.record.sparsity or {}).get("matrices") or {}
        if not matrices:
            return None
        zeros, size = (sum(entry[key] for entry in matrices.values()) for key in ("zeros", "size"))
        return zeros, size, len(matrices)


def facts_of_folder(folder: str | os.PathLike[str]) -> CardFacts:
    """The facts of a checkpoint in a folder, with the reports that lie in it. Of the weights a few values are read, to
    know them again.

    Raises:
        FileNotFoundError: if the folder has no config.json.
        RecordError: if a file in it is not what it should be.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config is None:
        raise FileNotFoundError(f"{folder} has no config.json. Give the folder that save_pretrained wrote.")
    record = PrunedConfig.from_dict(config[RECORD_KEY]) if config.get(RECORD_KEY) is not None else PrunedConfig({})
    processor = next(
        (kind for kind, files in _PROCESSORS.items() if any((folder / name).is_file() for name in files)), None
    )
    facts = _of_config(
        {**config, "dtype": _dtype(config) or dtype_of_files(folder)}, record, processor, mark_of_files(folder)
    )
    return with_reports(facts, folder, beside=True)


def facts_of_model(model: nn.Module, processing_class: Any = None) -> CardFacts:
    """The facts that a model itself carries."""
    subject = describe(model)
    root = subject.root
    settings = {**subject.host.identity(), "architectures": [type(root).__name__]}
    settings["dtype"] = next(
        (str(p.dtype).removeprefix("torch.") for p in root.parameters() if p.is_floating_point()), None
    )
    kind = (
        None
        if processing_class is None
        else "tokenizer"
        if hasattr(processing_class, "vocab_size")
        else "image processor"
    )
    facts = _of_config(settings, current_record(subject), kind, mark_of_model(root))
    now = sum(parameter.numel() for parameter in root.parameters())
    return dataclasses.replace(facts, parameters=(facts.parameters[0] or (None if facts.removed else now), now))


def _of_config(config: Mapping[str, Any], record: PrunedConfig, processor: str | None, mark: str | None) -> CardFacts:
    """What a config.json and the record in it tell."""
    # a saved config is sorted by name, which puts decoders before encoders
    record = dataclasses.replace(record, stacks=dict(sorted(record.stacks.items(), key=lambda item: _place(item[0]))))
    timm = "model_type" not in config and "architecture" in config and "pretrained_cfg" in config
    named = config.get("architectures")
    architecture = config.get("architecture") if timm else named[0] if isinstance(named, list) and named else None
    labels = config.get("id2label")
    names = [plain(label, 60) for label in labels.values()][:1000] if isinstance(labels, Mapping) else []
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = []  # nobody named them
    attempts, data = _of_record(record)
    return CardFacts(
        library="timm" if timm else "transformers",
        architecture=plain(architecture, 100) if isinstance(architecture, str) else None,
        record=record,
        labels=tuple(names),
        headless=timm and config.get("num_classes") == 0,
        processor=processor,
        parameters=_counted(record),
        dtype=_dtype(config),
        attempts=attempts,
        config=record.iterations[-1].get("settings") if record.iterations else None,
        final=_measured(record, attempts, mark),
        mark=mark,
        data=data,
        versions=record.versions,
    )


def _dtype(config: Mapping[str, Any]) -> str | None:
    found = config.get("dtype") or config.get("torch_dtype")
    return found if isinstance(found, str) and found in SIZES else None


def _place(stack: str) -> tuple[bool, list[Any]]:
    """Encoders come first, and stage 10 after stage 9."""
    return "decoder" in stack, [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d{1,9})", stack)
    ]


def _measured(record: PrunedConfig, attempts: Sequence[Attempt], mark: str | None) -> tuple[Evaluation, ...]:
    """What the record tells of the model as it is. Without the weights: nothing,
    where some may have been zeroed since.
    """
    if not attempts or not attempts[-1].evaluations or (mark is None and record.sparsity is not None):
        return ()
    found = attempts[-1].evaluations[-1][1]
    return (found,) if mark in (None, found.mark) else ()


def _of_record(record: PrunedConfig) -> tuple[tuple[Attempt, ...], dict[str, dict[str, Any]]]:
    """The prunings that a record tells of, with the blocks that each left."""
    blocks = {name: stack.length for name, stack in record.stacks.items()}
    attempts = []
    for index, entry in enumerate(record.iterations):
        removed = entry.get("removed") or {}
        blocks = {name: count - len(removed.get(name, ())) for name, count in blocks.items()}
        attempts.append(Attempt.of_record(index, entry, blocks))
    last = record.iterations[-1] if record.iterations else {}
    return tuple(attempts), {
        use: facts_in(facts) for use, facts in (last.get("data") or {}).items() if use in ("training", "evaluation")
    }


def _counted(record: PrunedConfig) -> tuple[int | None, int | None]:
    """Number of parameters before the first pruning and after the last one, by the record."""
    try:
        return whole(record.iterations[0]["parameters"]["before"]), whole(record.iterations[-1]["parameters"]["after"])
    except _WRONG:
        return None, None


def with_reports(facts: CardFacts, folder: Path, *, own: bool = False, beside: bool = False) -> CardFacts:
    """The facts with those of the reports in a folder, as far as they are of this model: reports of another run are
    left out.

    Args:
        own: whether the reports are known to be of the run that this model is in, whatever the weights.
        beside: whether the model is the one that lies in that folder, where its weights may have been left out.
    """
    with_run, with_evaluations = partial(_with_run, own=own), partial(_with_evaluations, beside=beside)
    for file, add in (
        (f"{RUN_REPORT}.json", with_run),
        (REPORT_FILE, _with_report),
        (SPARSITY_FILE, _with_sparsity),
        (EVALUATIONS_FILE, with_evaluations),
    ):
        data = read_json(folder / file)
        try:
            facts = facts if data is None else add(facts, data)
        except _WRONG as error:
            raise wrong_in(file, error) from error
    try:
        data = read_json(folder / PLAN_FILE)
        plan = None if data is None else PruningPlan.from_dict(data)
    except PlanError as error:
        raise wrong_in(PLAN_FILE, error) from error
    last = facts.record.iterations[-1] if facts.record.iterations else {}
    fits = (
        plan is not None
        and bool(plan.removed)
        and _left(plan) == {n: len(s.kept) for n, s in facts.record.stacks.items()}
        and last.get("thresholds")
        == {name: stack.threshold for name, stack in plan.stacks.items()}  # to the last digit
        and all(len(numbers) == len(plan.stacks[name]) for name, numbers in numbers_of_plan(plan, facts.record).items())
    )
    return dataclasses.replace(facts, plan=plan if fits else None)


def _left(plan: PruningPlan) -> dict[str, int]:
    return {name: len(stack.kept) for name, stack in plan.stacks.items()}


def _with_run(facts: CardFacts, data: Mapping[str, Any], own: bool) -> CardFacts:
    """With the report of a training (`run_report`)."""
    attempts = tuple(Attempt.read(entry) for entry in data["attempts"][:256])
    final = tuple(map(Evaluation.read, data.get("final", ())[:256]))
    standing = [attempt for attempt in attempts[1:] if attempt.decision != "rolled back"]
    last = facts.attempts[-1] if facts.attempts else None
    if standing:
        mine = last is not None and standing[-1].removed == last.removed and standing[-1].blocks == last.blocks
    else:  # nothing was pruned in that run, or all of it was taken back
        left = {name: len(stack.kept) for name, stack in facts.record.stacks.items()}
        mine = bool(attempts) and left in ({}, attempts[0].blocks)
    inside = tuple(evaluation for attempt in attempts for _, evaluation in attempt.evaluations)
    marks = {data.get("weights"), *(evaluation.mark for evaluation in (*inside, *final))}
    if not mine or not (own or facts.mark is None or facts.mark in marks):
        return facts
    config = MPruneConfig.from_dict(data["config"])
    summary = {
        "metric": plain(data["metric"], 80) if data["metric"] else None,
        "baseline": None if data["baseline"] is None else number(data["baseline"]),
        "accepted": whole(data["accepted"]),
        "iterations": config.iterations,
        "max_drop": config.max_drop,
        "reason": plain(data["reason"]) if data["reason"] else None,
        "phase": plain(data["phase"], 40),
        "zeroed_at": None if data.get("zeroed_at") is None else whole(data["zeroed_at"]),
    }
    earlier = facts.attempts[
        : len(facts.attempts) - len(standing)
    ]  # prunings of trainings before this one: the record knows them
    if earlier:
        attempts = (*earlier, *(_renumbered(attempt, len(earlier)) for attempt in attempts))
    facts = _with_facts(facts, data, inside, final)
    before, now = facts.parameters
    first = attempts[0].parameters if facts.removed and not earlier else None if facts.removed else now
    return dataclasses.replace(
        facts,
        attempts=attempts,
        from_run=True,
        summary=summary,
        config=config.to_dict(),
        parameters=(before or first, now or (standing[-1] if standing else attempts[-1]).parameters),
    )


def _renumbered(attempt: Attempt, before: int) -> Attempt:
    """A row of a run that was not the first, counted on from the prunings before it."""
    name, _, number = attempt.name.rpartition(" ")
    known = name == "pruning" and number.isdigit() and len(number) < 4
    return dataclasses.replace(
        attempt, name=f"pruning {int(number) + before}" if known else f"before pruning {before + 1}"
    )


def _with_facts(
    facts: CardFacts, data: Mapping[str, Any], inside: Sequence[Evaluation], final: Sequence[Evaluation]
) -> CardFacts:
    """With what each report tells of its training: settings, data, hardware, and the evaluations.

    Args:
        inside: evaluations in the training; they are of the model as it is where its weights are known, and are those.
        final: evaluations after its end.
    """
    if facts.mark is None:
        found: Sequence[Evaluation] = final or facts.final
    else:
        found = [evaluation for evaluation in (*facts.final, *inside, *final) if evaluation.mark == facts.mark]
    known = {
        use: facts_in(entry) for use, entry in (data.get("data") or {}).items() if use in ("training", "evaluation")
    }
    return dataclasses.replace(
        facts,
        final=_latest(found),
        data=known or facts.data,
        training=texts_in(data.get("training")) or facts.training,
        hardware=texts_in(data.get("hardware")),
        versions=texts_in(data.get("versions")) or facts.versions,
    )


def _latest(found: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """The last evaluation of each metric on each data set."""
    taken: list[Evaluation] = []
    for evaluation in reversed(found):
        if not any(
            _rows_of(t) == _rows_of(evaluation) and t.metrics.keys() >= evaluation.metrics.keys() for t in taken
        ):
            taken.append(evaluation)
    return tuple(reversed(taken))


def _rows_of(evaluation: Evaluation) -> dict[str, Any]:
    """What is known of the data; that it was used for validation is not always noted."""
    return {key: value for key, value in evaluation.data.items() if key != "use"}


def _with_report(facts: CardFacts, data: Mapping[str, Any]) -> CardFacts:
    """With the report of a pruning without a Trainer (`report.write_report`)."""
    plan = PruningPlan.from_dict(data["plan"])
    if facts.from_run or _left(plan) != {n: len(s.kept) for n, s in facts.record.stacks.items()}:
        return facts
    counts = [
        None if row["parameters"] is None else whole(row["parameters"]) for row in data["measurements"][:256]
    ] or [None]
    before, now = facts.parameters
    hardware, versions = texts_in(data["hardware"]), texts_in(data["versions"])
    counted = (before or counts[0], now or counts[-1])
    return dataclasses.replace(facts, from_report=True, parameters=counted, hardware=hardware, versions=versions)


def _with_sparsity(facts: CardFacts, data: Mapping[str, Any]) -> CardFacts:
    """With the report of a sparsification, in a training or without one."""
    if facts.zeros is None:
        return facts
    found = data if "matrices" in data else data["report"]
    report = None if found is None else SparsityReport.from_dict(found)
    if report is not None and abs(report.measured - facts.zeros[0] / max(1, facts.zeros[1])) > _SAME_SHARE:
        return facts  # more was zeroed since, or it is of another model
    facts = dataclasses.replace(facts, sparsity=report, zeroed_in_training="matrices" not in data)
    if "evaluations" not in data:
        return facts
    inside = tuple(
        Evaluation.read(entry).in_training() for entry in data["evaluations"][:MOST_EVALUATIONS] if entry["sparse"]
    )
    final = tuple(map(Evaluation.read, data["final"][:256]))
    marks = {data.get("weights"), *(evaluation.mark for evaluation in (*inside, *final))}
    if facts.mark is not None and not facts.from_run and facts.mark not in marks:
        return facts
    return _with_facts(facts, data, inside, final or (inside[-1:] if facts.mark is None else ()))


def _with_evaluations(facts: CardFacts, data: Mapping[str, Any], beside: bool) -> CardFacts:
    """With evaluations of these very weights that an experiment made. Where no weights are there, the blocks must be
    the same.
    """
    found = [Evaluation.read(entry) for entry in data["evaluations"][:256]]
    left = {name: len(stack.kept) for name, stack in facts.record.stacks.items()}
    if facts.mark is None:
        mine = [evaluation for evaluation in found if beside and left in ({}, evaluation.stacks)]
    else:
        mine = [evaluation for evaluation in found if evaluation.mark == facts.mark]
    if not mine:
        return facts
    speed = (
        {key: number(data["speed"][key]) for key in ("ratio", "low", "high", "blocks", "turns")}
        if data.get("speed")
        else {}
    )
    return dataclasses.replace(facts, final=_latest((*facts.final, *mine)), speed=speed, evaluated=True)
