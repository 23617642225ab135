"""Gathering what a card tells: from a checkpoint's config, its record and its reports, or from a live model."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..architectures import describe
from ..architectures.adapters import is_adapted
from ..architectures.hosts import RECORD_KEY
from ..checkpoint.record import PrunedConfig, current_record
from ..checkpoint.weights_mark import SIZES, dtype_of_files, mark_of_files, mark_of_model
from ..core.checks import Entry, MalformedError, read_json
from ..core.plain_text import plain
from ..core.sentence_encoders import kind_of
from ..errors import DeepArcError, RecordError, UnsupportedModelError
from ..pruned_type import MODEL_TYPE
from ..pruned_type.config import BASE_KEY, TYPE_KEY
from ..pruning.config import MPruneConfig
from ..pruning.plan import PruningPlan
from ..reports.attempts import Attempt, Evaluation, dataset_in
from ..reports.run_report import RUN_REPORT
from ..sparsity.report import SparsityReport
from .content import RUN_FILE, CardContent
from .encoders import kind_of_folder

__all__ = [
    "EVALUATIONS_FILE",
    "PLAN_FILE",
    "SPARSITY_FILE",
    "content_of_folder",
    "content_of_model",
    "require_whole",
    "with_reports",
]

PLAN_FILE = "pruning_plan.json"
SPARSITY_FILE = "sparsity_report.json"
REPORT_FILE = "report.json"
EVALUATIONS_FILE = "evaluations.json"
_SAME_SHARE = 0.005  # blocks that went after the zeroing change the share a little
_MOST_EVALUATIONS = 2**20
_MOST_ANSWERS, _LONGEST_ANSWER, _ANSWER = 4, 600, ("prompt", "before", "generated")
_SPEED = ("ratio", "low", "high", "blocks", "turns")
_USES = ("training", "evaluation")
_PROCESSORS = {
    "tokenizer": ("tokenizer_config.json", "tokenizer.json"),
    "image processor": ("preprocessor_config.json", "image_processor_config.json", "processor_config.json"),
}


def content_of_folder(folder: str | os.PathLike[str]) -> CardContent:
    """The content for a checkpoint in a folder, with its reports. Of the weights a few values are read, to know them
    again.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json. Give the folder that save_pretrained wrote.")
    config = _read(folder / "config.json", Entry.mapping)
    kinds = [kind for kind, files in _PROCESSORS.items() if any((folder / name).is_file() for name in files)]
    timm = "model_type" not in config and "architecture" in config and "pretrained_cfg" in config
    encoder = kind_of_folder(folder)
    named = config.get("architectures")
    needs_package = config.get("model_type") == MODEL_TYPE
    whole = config.get(BASE_KEY) if needs_package else config
    settings: Mapping[str, Any] = whole if isinstance(whole, Mapping) else {}
    content = _of_record(
        PrunedConfig.from_dict(config[RECORD_KEY]) if config.get(RECORD_KEY) is not None else PrunedConfig({}),
        mark_of_files(folder),
        library="timm" if timm else "sentence-transformers" if encoder else "transformers",
        encoder=encoder,
        architecture=config.get("architecture") if timm else named[0] if isinstance(named, list) and named else None,
        labels=settings.get("id2label"),
        headless=timm and config.get("num_classes") == 0,
        processor="processor" if len(kinds) > 1 else next(iter(kinds), None),
        dtype=_dtype(settings.get("dtype") or settings.get("torch_dtype")) or dtype_of_files(folder),
        needs_package=needs_package,
        model_type=config.get(TYPE_KEY if needs_package else "model_type"),
    )
    return with_reports(content, folder, beside=True)


def require_whole(model: nn.Module) -> None:
    """Refuse a model with adapters, of which a repository and its card would be half.

    Raises:
        UnsupportedModelError: if it has any.
    """
    if is_adapted(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries PEFT adapters, and what is published here, with its card, is one whole "
            "model. Merge them (model.merge_and_unload()) and publish the result; or write both by save_pruned, and "
            "upload that folder yourself."
        )


def content_of_model(model: nn.Module, processing_class: Any = None) -> CardContent:
    """The content for a live model, without reports."""
    subject = describe(model)
    root = subject.root
    require_whole(root)
    library, identity = subject.host.library, subject.host.identity()
    encoder = kind_of(subject.host.outer)
    kind = "tokenizer" if hasattr(processing_class, "vocab_size") else "image processor"
    kind = "processor" if hasattr(processing_class, "tokenizer") else kind
    weights = next((str(p.dtype).removeprefix("torch.") for p in root.parameters() if p.is_floating_point()), None)
    content = _of_record(
        current_record(subject),
        mark_of_model(root),
        library="sentence-transformers" if encoder else library,
        encoder=encoder,
        architecture=identity["architecture"] if library == "timm" else type(root).__name__,
        labels=identity.get("id2label"),
        headless=library == "timm" and identity["num_classes"] == 0,
        processor="tokenizer" if encoder else None if processing_class is None else kind,
        dtype=_dtype(weights),
        needs_package=bool(subject.host.layout),
        model_type=None if library == "timm" else root.config.model_type,
    )
    before, now = content.parameters[0], sum(parameter.numel() for parameter in subject.host.plain.parameters())
    return dataclasses.replace(content, parameters=(before or (None if content.removed else now), now))


def _dtype(name: Any) -> str | None:
    return name if isinstance(name, str) and name in SIZES else None


def _of_record(
    record: PrunedConfig, mark: str | None, *, architecture: Any, labels: Any, model_type: Any, **known: Any
) -> CardContent:
    """What a record tells of the prunings, with what is known of the model; architecture and labels are unchecked."""
    # a saved config is sorted by name, which puts decoders before encoders
    record = dataclasses.replace(record, stacks=dict(sorted(record.stacks.items(), key=lambda item: _order(item[0]))))
    blocks = {name: stack.length for name, stack in record.stacks.items()}
    attempts: list[Attempt] = []
    for index, noted in enumerate(record.iterations):
        gone = noted.get("removed") or {}
        blocks = {name: count - len(gone.get(name, ())) for name, count in blocks.items()}
        attempts.append(Attempt.of_record(index, noted, blocks))
    names = [plain(label, 60) for label in labels.values()][:1000] if isinstance(labels, Mapping) else []
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
        names = []  # nobody named them
    # what the record tells of the model as it is; without the weights nothing, where some may be zeroed since
    final = attempts[-1].evaluations[-1:] if attempts and (mark is not None or record.sparsity is None) else ()
    content = CardContent(
        record=record,
        mark=mark,
        architecture=plain(architecture, 100) if isinstance(architecture, str) else None,
        model_type=plain(model_type, 100) if isinstance(model_type, str) else None,
        labels=tuple(names),
        attempts=tuple(attempts),
        final=tuple(evaluation for evaluation in final if mark in (None, evaluation.mark)),
        versions=record.versions,
        **known,
    )
    if not record.iterations:
        return content
    noted = content.last_pruning
    first, last = (record.iterations[0].get("parameters") or {}, noted.get("parameters") or {})
    counted = (first["before"], last["after"]) if "before" in first and "after" in last else (None, None)
    data = Entry(noted).optional("data", _data_in, {})
    return dataclasses.replace(content, parameters=counted, config=noted.get("settings"), data=data)


def _order(stack: str) -> tuple[bool, list[Any]]:
    """Encoders come first, and stage 10 after stage 9."""
    parts = re.split(r"(\d{1,9})", stack)
    return "decoder" in stack, [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _data_in(entry: Entry) -> dict[str, dict[str, Any]]:
    """What is known of the data, by use."""
    entries = entry.entries().items()
    return {use: dataset_in(data) if data.value else {} for use, data in entries if use in _USES}


def with_reports(content: CardContent, folder: Path, *, own: bool = False, beside: bool = False) -> CardContent:
    """The content with that of the reports in a folder; reports of another run are left out.

    Args:
        own: whether the reports are known to be of the run that this model is in, whatever the weights.
        beside: whether the model is the one that lies in that folder, where its weights may have been left out.
    """
    for file, add in (
        (RUN_FILE, partial(_with_run, own=own)),
        (REPORT_FILE, _with_report),
        (SPARSITY_FILE, _with_sparsity),
        (EVALUATIONS_FILE, partial(_with_evaluations, beside=beside)),
        (PLAN_FILE, _with_plan),
    ):
        content = _read(folder / file, partial(add, content)) or content
    return content


def _read(path: Path, reader: Callable[[Entry], Any]) -> Any:
    """What a reader makes of a JSON file; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        return reader(Entry(read_json(path)))
    except (MalformedError, DeepArcError) as error:
        raise RecordError(
            f"{path.name} is not what deeparc_hf writes there ({plain(error, 200)}). Delete the file, and the card is "
            "made without it."
        ) from error


def _from_files(content: CardContent, *files: str, **known: Any) -> CardContent:
    """With what is told by files of these names, which are of this model."""
    return dataclasses.replace(content, reports=(*content.reports, *files), **known)


def _with_run(content: CardContent, entry: Entry, own: bool) -> CardContent:
    """With the report of a training (`run_report`)."""
    attempts = tuple(map(Attempt.read, entry["attempts"].items()))
    entry["attempts"].must_be(bool(attempts), "a list of at least the model before")
    final = entry.optional("final", _evaluations_in, ())
    standing = [attempt for attempt in attempts[1:] if not attempt.is_taken_back]
    last = content.attempts[-1] if content.attempts else None
    mine = content.left in ({}, attempts[0].blocks)  # nothing was pruned in that run, or all of it was taken back
    if standing:
        mine = last is not None and standing[-1].removed == last.removed and standing[-1].blocks == last.blocks
    inside = tuple(evaluation for attempt in attempts for evaluation in attempt.evaluations)
    if not mine or not (own or content.mark is None or _is_marked(content, entry, inside, final)):
        return content
    config = MPruneConfig.from_dict(entry["config"].value)
    # prunings of trainings before this one: the record knows them
    earlier = content.attempts[: len(content.attempts) - len(standing)]
    if earlier:
        attempts = (*earlier, *(_renumbered(attempt, len(earlier)) for attempt in attempts))
    before, now = content.parameters
    first = attempts[0].parameters if content.removed and not earlier else None if content.removed else now
    return _from_files(
        _with_training(content, entry, inside, final),
        RUN_FILE,
        f"{RUN_REPORT}.md",
        attempts=attempts,
        run=_run_in(entry, config),
        config=config.to_dict(),
        parameters=(before or first, now or (standing[-1] if standing else attempts[-1]).parameters),
    )


def _run_in(entry: Entry, config: MPruneConfig) -> dict[str, Any]:
    return {
        "metric": entry["metric"].shown(80),
        "baseline": entry.optional("baseline", Entry.number),
        "accepted": entry["accepted"].whole(),
        "iterations": config.iterations,
        "max_drop": config.max_drop,
        "reason": entry["reason"].shown(),
        "phase": plain(entry["phase"].value, 40),
        "zeroed_at": entry.optional("zeroed_at", Entry.whole),
    }


def _renumbered(attempt: Attempt, before: int) -> Attempt:
    """A row of a run that was not the first, counted on from the prunings before it."""
    number = re.fullmatch(r"pruning ([0-9]{1,3})", attempt.name)
    name = f"before pruning {before + 1}" if number is None else f"pruning {int(number[1]) + before}"
    return dataclasses.replace(attempt, name=name)


def _evaluations_in(entry: Entry) -> tuple[Evaluation, ...]:
    return tuple(map(Evaluation.read, entry.items()))


def _is_marked(content: CardContent, entry: Entry, *evaluations: Sequence[Evaluation]) -> bool:
    """Whether a report names the weights that the card is of, as those of its end or of one of its evaluations."""
    return content.mark in [entry["weights"].value, *(each.mark for several in evaluations for each in several)]


def _with_training(
    content: CardContent, entry: Entry, inside: Sequence[Evaluation], final: Sequence[Evaluation]
) -> CardContent:
    """With what each report tells of its training, and of its evaluations those that are of the model as it is."""
    if content.mark is None:
        mine: Sequence[Evaluation] = final or content.final
    else:
        mine = [each for each in (*content.final, *inside, *final) if each.mark == content.mark]
    return dataclasses.replace(
        content,
        final=_latest(mine),
        data=entry.optional("data", _data_in) or content.data,
        training=entry.optional("training", Entry.texts) or content.training,
        hardware=entry.optional("hardware", Entry.texts, {}),
        versions=entry.optional("versions", Entry.texts) or content.versions,
    )


def _latest(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """The last evaluation of each metric on each data set."""
    latest: list[Evaluation] = []
    for each in reversed(evaluations):
        # that data was used for validation is not always noted
        same = [other for other in latest if {**other.data, "use": None} == {**each.data, "use": None}]
        if not any(other.metrics.keys() >= each.metrics.keys() for other in same):
            latest.append(each)
    return tuple(reversed(latest))


def _with_report(content: CardContent, entry: Entry) -> CardContent:
    """With the report of a pruning without a Trainer (`plan_report.write_report`)."""
    plan = PruningPlan.from_dict(entry["plan"].value)
    if content.from_run or _left(plan) != content.left:
        return content
    counts = [row.optional("parameters", Entry.whole) for row in entry["measurements"].items()] or [None]
    before, now = content.parameters
    return _from_files(
        content,
        REPORT_FILE,
        "report.md",
        parameters=(before or counts[0], now or counts[-1]),
        hardware=entry.optional("hardware", Entry.texts, {}),
        versions=entry.optional("versions", Entry.texts, {}),
    )


def _with_sparsity(content: CardContent, entry: Entry) -> CardContent:
    """With the report of a sparsification, in a training or without one."""
    if content.record.zeros is None:
        return content
    zeros, size, _ = content.record.zeros
    alone = "matrices" in entry.entries()
    entry.must_be(alone or "report" in entry.value, "the report of a sparsification")
    zeroing = entry.value if alone else entry["report"].value
    report = None if zeroing is None else SparsityReport.from_dict(zeroing)
    if report is not None and abs(report.measured - zeros / max(1, size)) > _SAME_SHARE:
        return content  # more was zeroed since, or it is of another model
    files = () if report is None else (SPARSITY_FILE, "sparsity_report.md")
    content = _from_files(content, *files, sparsity=report, zeroed_in_training=not alone)
    if "evaluations" not in entry.value:
        return content
    evaluations = [each for each in entry["evaluations"].items(_MOST_EVALUATIONS) if each["sparse"].value]
    inside = tuple(Evaluation.read(each).in_training() for each in evaluations)
    final = entry.optional("final", _evaluations_in, ())
    if content.mark is not None and not content.from_run and not _is_marked(content, entry, inside, final):
        return content
    return _with_training(content, entry, inside, final or (inside[-1:] if content.mark is None else ()))


def _with_evaluations(content: CardContent, entry: Entry, beside: bool) -> CardContent:
    """With evaluations of these very weights that an experiment made; without weights, of the same blocks."""
    evaluations = _evaluations_in(entry["evaluations"])
    if content.mark is None:
        mine = [each for each in evaluations if beside and content.left in ({}, each.stacks)]
    else:
        mine = [each for each in evaluations if each.mark == content.mark]
    if not mine:
        return content
    speed = entry.optional("speed", lambda speed: {key: speed[key].number() for key in _SPEED}, {})
    answers = entry.optional("answers", _answers_in, ())
    known = {"final": _latest((*content.final, *mine)), "speed": speed, "answers": answers}
    if not content.training:
        known["training"] = entry.optional("training", Entry.texts, {})
        known["trained_for"] = entry.optional("training_seconds", Entry.number)
    return _from_files(content, EVALUATIONS_FILE, **known)


def _answers_in(entry: Entry) -> tuple[dict[str, str], ...]:
    each = entry.items()[:_MOST_ANSWERS]
    return tuple({key: text[key].shown(_LONGEST_ANSWER) or "" for key in _ANSWER} for text in each)


def _with_plan(content: CardContent, entry: Entry) -> CardContent:
    """With the plan, if it is the one that the last pruning carried out."""
    plan = PruningPlan.from_dict(entry.value)
    fitting = _from_files(content, PLAN_FILE, plan=plan)
    thresholds = {name: stack.threshold for name, stack in plan.stacks.items()}  # the same to the last digit
    fits = plan.removed and _left(plan) == content.left and content.last_pruning.get("thresholds") == thresholds
    same = all(len(numbers) == len(plan.stacks[name]) for name, numbers in fitting.numbers.items())
    return fitting if fits and same else content


def _left(plan: PruningPlan) -> dict[str, int]:
    return {name: len(stack.kept) for name, stack in plan.stacks.items()}
