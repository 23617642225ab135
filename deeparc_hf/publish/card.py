"""Making the card: facts, metadata and sections into one page, by a packaged template."""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from ..core.files import write_whole
from ..core.markdown import folded, md, plain
from ..errors import ConfigError, DeepArcWarning, MissingDependencyError
from ..pruning.heatmap import save_heatmap
from . import blocks, sections, tables
from .facts import CardFacts, facts_of_folder, facts_of_model, with_reports
from .lookup import licences
from .merging import bare_metadata, kept_message, made_by_us, marked, may_replace, merged
from .metadata import Given, hub_id, metadata
from .overview import overview, state
from .pictures import quality_alt, quality_series, save_quality
from .usage import usage
from .vocabulary import check_language, check_license, check_tags, check_task

__all__ = [
    "CARD_FILE",
    "PICTURE_FILE",
    "QUALITY_FILE",
    "check_told",
    "create_model_card",
    "made_by_us",
    "make_card",
    "may_replace",
    "render",
    "told_keys",
]

CARD_FILE, PICTURE_FILE, QUALITY_FILE = "README.md", "similarity.png", "quality.png"
TEMPLATE = Path(__file__).with_name("templates") / "model_card.md"
_LABELS = 50


def create_model_card(
    trainer_or_model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    model_name: str | None = None,
    repo_id: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    tags: str | Sequence[str] | None = None,
    finetuned_from: str | None = None,
    tasks: str | Sequence[str] | None = None,
    dataset_tags: str | Sequence[str] | None = None,
    dataset: str | Sequence[str] | None = None,
    dataset_args: str | Sequence[str] | None = None,
    command: str | None = None,
    processing_class: Any = None,
    reports: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ModelCard:
    """Make the model card of a pruned or sparse model, and write it.

    It takes what `Trainer.create_model_card` takes, so that one line has `trainer.push_to_hub()` publish this card:
    `trainer.create_model_card = functools.partial(create_model_card, trainer)`.

    Args:
        trainer_or_model: a Trainer (its output folder's reports are read), a model, or the folder of a checkpoint
            (config.json and the reports in it are read, no weights).
        path: the file to write; default: README.md in the Trainer's output folder, or in the checkpoint's folder; a
            model's card is not written then. A picture of the similarities is written beside it, where they are known
            and matplotlib is installed.
        model_name: the model's name; default: that of the repository, or the folder's.
        repo_id: where the model will be on the Hub, for the code in the card; default: the Trainer's hub_model_id, or
            the model's name.
        language: metadata of that name, as the four below.
        license: default: that of the base model, where the Hub can be asked for it.
        license_name: of a licence that the Hub does not know.
        license_link: where it stands.
        tags: more than those that tell what was done.
        finetuned_from: Hub id of the model that was pruned, where the record does not know it.
        tasks: the pipeline tag; default: by the model's class.
        dataset_tags: Hub ids of the data, where the data set does not know it.
        dataset: names of the data for people.
        dataset_args: their configurations.
        command: the command or the steps by which the model was made.
        processing_class: the tokenizer or image processor that goes with a model.
        reports: for a model: the folder of its run, whose reports are read.
        overwrite: replace a file that somebody wrote or edited, too; otherwise it stays, with a warning.

    Returns:
        The card. It is published as it is by `card.push_to_hub(repo_id)`, or with the model by
        `deeparc_hf.push_to_hub`.

    Raises:
        RecordError: if the record or a report is malformed.
        UnsupportedModelError: if the model is of an unknown kind.
        ConfigError: if the Hub would refuse what is given (a licence that it does not know, say).
    """
    settings = dict(locals())  # what was given, as it is named above
    return make_card(settings.pop("trainer_or_model"), settings.pop("path"), **settings)[0]


def make_card(
    source: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    model_name: str | None = None,
    repo_id: str | None = None,
    processing_class: Any = None,
    reports: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    own: bool = False,
    phase: str | None = None,
    **told: Any,
) -> tuple[ModelCard, CardFacts]:
    """`create_model_card`, with the facts that the card tells.

    Args:
        revision: the branch that the code in the card loads; None for the main one.
        own: as in `with_reports`.
        phase: of the run, where it is known better than its report says.
    """
    check_told(**{key: told.get(key) for key in ("license", "language", "tags", "tasks")})
    facts, folder, default_name = _gather(source, processing_class, reports, own)
    if phase is not None and facts.summary:
        facts = dataclasses.replace(facts, summary={**facts.summary, "phase": phase})
    asked = model_name or repo_id or default_name
    given = _given(facts, None if asked is None else asked.rpartition("/")[2], **told)
    target = Path(path) if path is not None else None if folder is None else folder / CARD_FILE
    pictures = () if target is None else _draw(facts, target.parent)
    card = render(facts, given, repo_id or default_name or given.name or "org/model", pictures, revision)
    if target is not None:
        card = merged(card, bare_metadata(target), told_keys(told))
    if target is not None and _is_main(source):
        if may_replace(target) or overwrite:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, str(card))
        else:
            warnings.warn(kept_message(target, "overwrite=True (--overwrite)"), DeepArcWarning, stacklevel=3)
    return card, facts


def check_told(*, license: str | None = None, language: Any = None, tags: Any = None, tasks: Any = None) -> None:
    """Refuse what the Hub would refuse, before anything is made there.

    Raises:
        ConfigError: saying which word is wrong.
    """
    check_license(license)
    language, tags, tasks = (
        [value] if isinstance(value, str) else list(value or ()) for value in (language, tags, tasks)
    )
    check_language(language)
    check_tags(tags)
    check_task(tasks)


def told_keys(told: Mapping[str, Any]) -> set[str]:
    """The keys of the metadata that were given."""
    names = {"finetuned_from": "base_model", "tasks": "pipeline_tag"}
    return {names.get(key, key) for key, value in told.items() if value is not None}


def _given(
    facts: CardFacts,
    name: str | None,
    *,
    language: Any = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    tags: Any = None,
    finetuned_from: str | None = None,
    tasks: Any = None,
    dataset_tags: Any = None,
    dataset: Any = None,
    dataset_args: Any = None,
    command: str | None = None,
) -> Given:
    """What was told, checked, and the licences that the Hub tells."""
    given = Given(
        name=name,
        base_model=_one_of_hub(finetuned_from),
        license=license,
        license_name=license_name,
        license_link=license_link,
        language=_many(language),
        tags=_many(tags),
        tasks=_many(tasks),
        datasets=[one for one in map(_one_of_hub, _many(dataset_tags)) if one is not None],
        dataset_names=_many(dataset),
        dataset_configs=_many(dataset_args),
        command=command,
    )
    names = [given.base_of(facts), *(f"datasets/{one}" for one in given.datasets_of(facts))]
    return dataclasses.replace(given, licences=licences([one for one in names if one]))


def render(
    facts: CardFacts, given: Given, repo_id: str, pictures: Collection[str] = (), revision: str | None = None
) -> ModelCard:
    """The page.

    Args:
        repo_id, revision: for the code in it.
        pictures: names of the pictures beside the card.
    """
    base = given.base_of(facts)
    title = given.name or (f"{base.rpartition('/')[2]}-pruned" if base else "Pruned model")
    labels = ", ".join(md(label, 60) for label in facts.labels[:_LABELS]) + (
        ", ..." if len(facts.labels) > _LABELS else ""
    )
    plan = facts.plan
    numbers = {} if plan is None else blocks.numbers_of_plan(plan, facts.record)
    shares, loss = tables.steps_table(facts)
    metric, series = quality_series(facts)
    more = [part for part in (tables.epochs_table(facts), tables.settings_table(facts)) if part]
    try:
        card = ModelCard.from_template(
            metadata(facts, given),
            template_path=str(TEMPLATE),
            title=md(title),
            summary=sections.summary(facts, given),
            overview=overview(facts, given),
            state=state(facts, given),
            usage=sections.fenced(usage(facts, repo_id, revision), "python"),
            labels=labels,
            removed=blocks.removed_text(facts.record),
            strip=blocks.strip(facts.record) if facts.removed else None,
            repairs="\n".join(f"- {line}" for line in blocks.repairs(facts.record)),
            quality_picture=QUALITY_FILE if QUALITY_FILE in pictures else None,
            quality_alt=md(quality_alt(metric, series), 1000),
            steps=shares or loss,
            steps_note=sections.steps_note(facts),
            steps_folded=folded("The loss", loss) if shares and loss else None,
            iterations=tables.iterations_table(facts),
            iterations_note=sections.iterations_note(facts),
            iterations_folded=folded("Epochs, settings and times", "\n\n".join([*more, sections.times_note(facts)]))
            if more
            else None,
            evaluation=tables.evaluation_table(facts, given),
            evaluation_note=sections.evaluation_note(facts),
            similarities=None if plan is None else folded("The numbers", blocks.similarity_tables(plan, numbers)),
            similarity_note=None if plan is None else sections.similarity_note(plan),
            alt=None if plan is None else blocks.alt_text(plan, numbers),
            picture=PICTURE_FILE if PICTURE_FILE in pictures else None,
            sparsity=tables.sparsity_section(facts),
            reproduce=sections.reproduce(facts, given, repo_id),
            limits=sections.limits(facts, given),
            made=sections.made(facts, given),
            citations=sections.citations(facts),
        )
    except ImportError as error:  # huggingface_hub asks for jinja2 when a card is made
        raise MissingDependencyError("A model card needs jinja2: pip install jinja2.") from error
    body = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    return marked(body)


def _gather(
    source: Any, processing_class: Any, reports: Any, own: bool = False
) -> tuple[CardFacts, Path | None, str | None]:
    """The facts, the folder that the card belongs into, and the model's name."""
    if isinstance(source, (str, os.PathLike)):
        folder = Path(source)
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}. Give a checkpoint's folder, a model or a Trainer.")
        return facts_of_folder(folder), folder, folder.resolve().name
    if isinstance(source, nn.Module):
        facts = facts_of_model(source, processing_class)
        return (facts if reports is None else with_reports(facts, Path(reports), own=own)), None, None
    args, model = getattr(source, "args", None), getattr(source, "model", None)
    if args is None or not isinstance(model, nn.Module):
        raise ConfigError(
            f"A card is made of a Trainer, a model or a checkpoint's folder, found a {type(source).__name__}."
        )
    folder = Path(args.output_dir if reports is None else reports)
    model = source.accelerator.unwrap_model(model)
    own = any(getattr(callback, "attempts", None) for callback in source.callback_handler.callbacks)
    facts = with_reports(
        facts_of_model(model, processing_class or getattr(source, "processing_class", None)), folder, own=own
    )
    return facts, Path(args.output_dir), args.hub_model_id or folder.resolve().name


def _is_main(source: Any) -> bool:
    """Whether this process is the one that writes."""
    return getattr(getattr(source, "args", None), "process_index", 0) == 0


def _draw(facts: CardFacts, folder: Path) -> tuple[str, ...]:
    """The pictures of a card, beside it; the names of those that there are."""
    metric, series = quality_series(facts)
    wanted: list[tuple[str, Callable[[Path], None]]] = []
    if facts.plan is not None:
        wanted.append(
            (PICTURE_FILE, partial(save_heatmap, facts.plan, numbers=blocks.numbers_of_plan(facts.plan, facts.record)))
        )
    if series:
        wanted.append((QUALITY_FILE, partial(save_quality, metric, series)))
    drawn = []
    for name, save in wanted:
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{name}.{os.getpid()}"
        try:
            save(draft)
            draft.replace(folder / name)
            drawn.append(name)
        except MissingDependencyError:
            continue
        finally:
            draft.unlink(missing_ok=True)
    return tuple(drawn)


def _many(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else [plain(entry) for entry in value]


def _one_of_hub(name: str | None) -> str | None:
    """A Hub id that somebody gave.

    Raises:
        ConfigError: if it cannot be one (a local path, say).
    """
    if name is not None and (hub_id(name) is None or os.path.exists(name)):
        raise ConfigError(
            f"{name!r} is not the id of a repository on the Hub (ORG/NAME). A card must not name local paths."
        )
    return name
