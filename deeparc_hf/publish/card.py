"""Making the card: what is known of a model, as metadata and sections of one page, by a packaged template."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from ..architectures import find_host
from ..core.caller import warn_caller
from ..core.files import drafted, write_whole
from ..core.markdown import fenced, folded, md
from ..errors import ConfigError, MissingDependencyError
from ..pruning.heatmap import save_heatmap
from . import blocks, overview, sections, tables
from .content import CardContent
from .elsewhere import elsewhere
from .encoders import joined, may_add, their_card, their_page
from .gather import content_of_folder, content_of_model, with_reports
from .merging import bare_metadata, kept_message, marked, may_replace, merged
from .metadata import licences, metadata
from .usage import reproduce, usage
from .vocabulary import Given

__all__ = ["CARD_FILE", "PICTURE_FILE", "QUALITY_FILE", "Source", "create_model_card", "make_card", "render"]

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
    given = Given.among(locals())
    settings = {"processing_class": processing_class, "reports": reports, "overwrite": overwrite}
    return make_card(trainer_or_model, path, given=given, repo_id=repo_id, **settings)[0]


def make_card(
    trainer_or_model: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    given: Given | None = None,
    repo_id: str | None = None,
    processing_class: Any = None,
    reports: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    own: bool = False,
    phase: str | None = None,
    theirs: str | None = None,
) -> tuple[ModelCard, CardContent]:
    """`create_model_card`, with what the card tells.

    Args:
        revision: the branch that the code in the card loads; None for the main one.
        own: as in `with_reports`.
        phase: of the run, where it is known better than its report says.
        theirs: the card that sentence-transformers has saved with the model, where it lies elsewhere than the new one.
    """
    given = given or Given()
    source = Source.of(trainer_or_model)
    content, default_name = _gather(source, processing_class, reports, own)
    name = (given.model_name or repo_id or default_name or "").rpartition("/")[2] or None
    run = content.run if phase is None or not content.run else {**content.run, "phase": phase}
    content = dataclasses.replace(content, name=name, given=given, run=run)
    content = dataclasses.replace(content, licences=licences(content))
    target = Path(path) if path is not None else None if source.output is None else source.output / CARD_FILE
    pictures = () if target is None else _draw(content, target.parent)
    card = render(content, repo_id or default_name or name or "org/model", pictures, revision)
    theirs = _theirs(source, target, theirs) if content.encoder is not None and source.writes else None
    if theirs is not None:
        card = joined(card, theirs, repo_id or default_name or name or "org/model", given.keys)
    if target is not None:
        card = merged(card, bare_metadata(target), given.keys)
        if not source.writes:
            return card, content
        if may_replace(target) or overwrite or (content.encoder is not None and may_add(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, str(card))
        else:
            warn_caller(kept_message(target, "overwrite=True (--overwrite)"))
    return card, content


def _theirs(source: Source, target: Path | None, given: str | None) -> str | None:
    """The card of sentence-transformers that ours is added to; None where there is none."""
    if given is not None:
        return their_page(given)
    if source.folder is not None:
        return their_page(_read(source.folder / CARD_FILE))
    return their_card(find_host(source.model).outer)


def _read(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.is_file() else ""


def render(
    content: CardContent, repo_id: str, pictures: Collection[str] = (), revision: str | None = None
) -> ModelCard:
    """The page; the repository is named in its code, and the pictures lie beside it."""
    title = content.name or (f"{content.base.rpartition('/')[2]}-pruned" if content.base else "Pruned model")
    labels = ", ".join(md(label, 60) for label in content.labels[:_LABELS])
    try:
        card = ModelCard.from_template(
            metadata(content),
            template_path=str(TEMPLATE),
            title=md(title),
            content=content,
            pictures=pictures,
            labels=f"{labels}, ..." if len(content.labels) > _LABELS else labels,
            usage=fenced(usage(content, repo_id, revision), "python"),
            reproduce=reproduce(content, repo_id),
            elsewhere=elsewhere(content, repo_id),
            folded=folded,
            blocks=blocks,
            overview=overview,
            sections=sections,
            tables=tables,
        )
    except ImportError as error:  # huggingface_hub asks for jinja2 when a card is made
        raise MissingDependencyError("A model card needs jinja2: pip install jinja2.") from error
    return marked(re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n")


@dataclass(frozen=True)
class Source:
    """The folder of a checkpoint, or a live model (without what an accelerator wraps around it) and its Trainer."""

    folder: Path | None = None
    model: Any = None
    trainer: Any = None

    @classmethod
    def of(cls, given: Any) -> Source:
        """Tell which of the three was given."""
        if isinstance(given, cls):
            return given
        if isinstance(given, (str, os.PathLike)):
            folder = Path(given)
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"There is no folder {folder}. Give a checkpoint's folder, a model or a Trainer."
                )
            return cls(folder=folder)
        if isinstance(given, nn.Module):
            return cls(model=given)
        model = getattr(given, "model", None)
        if not hasattr(given, "args") or not isinstance(model, nn.Module):
            raise ConfigError(f"A Trainer, a model or a checkpoint's folder is needed, found a {type(given).__name__}.")
        return cls(model=given.accelerator.unwrap_model(model), trainer=given)

    @property
    def args(self) -> Any:
        """The arguments of the Trainer; None where there is none."""
        return None if self.trainer is None else self.trainer.args

    @property
    def output(self) -> Path | None:
        """The folder that its card and its reports lie in; None for a model by itself."""
        return self.folder if self.args is None else Path(self.args.output_dir)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self.args is None or self.args.process_index == 0


def _gather(source: Source, processing_class: Any, reports: Any, own: bool) -> tuple[CardContent, str | None]:
    """What the card tells, and the model's name where nobody gives one."""
    if source.folder is not None:
        return content_of_folder(source.folder), source.folder.resolve().name
    content = content_of_model(source.model, processing_class or getattr(source.trainer, "processing_class", None))
    if source.trainer is None:
        return (content if reports is None else with_reports(content, Path(reports), own=own)), None
    folder = Path(source.args.output_dir if reports is None else reports)
    own = any(getattr(callback, "attempts", None) for callback in source.trainer.callback_handler.callbacks)
    return with_reports(content, folder, own=own), source.args.hub_model_id or folder.resolve().name


def _draw(content: CardContent, folder: Path) -> tuple[str, ...]:
    """The pictures of a card, beside it; the names of those that there are."""
    wanted: dict[str, Callable[[Path], None]] = {}
    if content.plan is not None:
        wanted[PICTURE_FILE] = partial(save_heatmap, content.plan, numbers=content.numbers)
    metric, series = overview.quality_series(content)
    if series:
        wanted[QUALITY_FILE] = partial(overview.save_quality, metric, series)
    drawn = []
    for name, save in wanted.items():
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(MissingDependencyError), drafted(folder / name) as draft:
            save(draft)
            drawn.append(name)
    return tuple(drawn)
