"""Publishing on the Hub: a checkpoint with its card and its reports, in one commit."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..checkpoint.loading import save_pruned
from ..core.caller import warn_caller
from ..core.distributed import process_index
from ..core.hub_help import hub_help
from ..errors import ConfigError
from .card import CARD_FILE, PICTURE_FILE, QUALITY_FILE, Source, make_card
from .encoders import may_add
from .files import REPORTS, checkpoint_files, outdated
from .gather import require_whole
from .merging import bare_metadata, kept_message, may_replace, merged
from .vocabulary import Given

__all__ = ["push_to_hub"]

_TRIES = 5  # where others commit at the same time
_CONFLICT = 412
_HOW = "push_to_hub(..., overwrite=True) (--overwrite)"


def push_to_hub(
    trainer_or_model: Any,
    repo_id: str | None = None,
    *,
    processing_class: Any = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
    card: ModelCard | None = None,
    reports: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    model_name: str | None = None,
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
) -> CommitInfo | None:
    """Publish a model on the Hub: weights, config with its record, tokenizer or image processor, reports and card, in
    one commit.

    The repository is made if there is none (not for a pull request). Weights, reports and tokenizer files of an earlier
    push that this one does not replace are deleted in the same commit: a loader might prefer them. If others commit at
    the same time, nothing of theirs is lost. If the upload fails or is killed, the repository stays at its last commit,
    and a further call does it again.

    A README.md that somebody wrote or edited stays, with a warning: in the folder (it goes along as it is), and on the
    Hub. One that holds metadata alone (a licence that was set on the Hub's page) is no such card: its metadata is taken
    over into the new one. What the new card says is given as to `create_model_card`: model_name, language, license,
    license_name, license_link, tags, finetuned_from, tasks, dataset_tags, dataset, dataset_args and command.

    Args:
        trainer_or_model: a Trainer (its hub_* arguments are the defaults here), a model, or the folder of a checkpoint.
            Of a folder the files are taken that belong to a checkpoint, by their names; no pickles, nothing else that
            lies there.
        repo_id: ORG/NAME, or NAME in your own namespace; default: the Trainer's hub_model_id, or the folder's name.
        processing_class: the tokenizer or image processor that goes with a model.
        private: whether a repository that is made is private; default: as the organisation has it.
        revision: the branch to commit to, which is made if there is none; default: main.
        create_pr: open a pull request instead; no right to write is needed.
        commit_message: the title of the commit.
        token: as in `huggingface_hub`: None for that of `hf auth login` or HF_TOKEN.
        card: a card to publish instead of a new one, whatever is there. Pictures and reports go along as with a new
            one.
        reports: for a model: the folder of its run, whose reports go along.
        overwrite: replace a README.md that somebody wrote or edited, too.

    Returns:
        What the Hub says of the commit; None in processes other than the first.

    Raises:
        ConfigError: if there is nothing to publish, or the Hub would refuse the card.
        RecordError: if the record or a report is malformed.
        huggingface_hub.errors.HfHubHTTPError: with a line of help, if the Hub refuses; other errors of
            huggingface_hub if the upload breaks off.
    """
    given = Given.among(locals())
    source = Source.of(trainer_or_model)
    if (args := source.args) is not None:
        repo_id = repo_id or args.hub_model_id or Path(args.output_dir).resolve().name
        private = args.hub_private_repo if private is None else private
        revision, token = revision or args.hub_revision, args.hub_token if token is None else token
    elif source.folder is not None:
        repo_id = repo_id or source.folder.resolve().name
    if repo_id is None:
        raise ConfigError("Say where the model goes: push_to_hub(model, 'ORG/NAME').")
    with tempfile.TemporaryDirectory(prefix="deeparc_hf-") as scratch:
        stage = Path(scratch)
        saved = _saved(source, stage, processing_class)
        if process_index() != 0 or not source.writes:
            return None
        # what is wrong with the checkpoint or its card is said before anything is made on the Hub
        settings = {"given": given, "processing_class": processing_class, "revision": revision}
        make = partial(
            _with_card, checkpoint_files(saved), source, stage, card, reports=reports, overwrite=overwrite, **settings
        )
        with hub_help(repo_id):
            api = HfApi(token=token)
            if create_pr and "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            files = make(repo_id=repo_id)
            whole = repo_id if create_pr else api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if whole != repo_id and card is None:  # the code in the card names the repository
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # they were given above
                    files = make(repo_id=whole)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(whole, branch=revision, exist_ok=True)
            what = "model" if source.model is None else type(source.model).__name__
            message = commit_message or f"Upload {what} with deeparc_hf"
            keep = None if overwrite or card is not None else given.keys
            return _commit(api, whole, files, revision, create_pr, message, keep)


def _saved(source: Source, stage: Path, processing_class: Any) -> Path:
    """The folder with the checkpoint's files; a live model is saved into the stage."""
    if source.folder is not None:
        return source.folder
    require_whole(source.model)
    trainer = source.trainer
    if trainer is not None:
        # in all processes; with the private argument, where a subclass has it, it does not push by itself
        takes = inspect.signature(trainer.save_model).parameters
        private = "_internal_call" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
        trainer.save_model(str(stage), **({"_internal_call": True} if private else {}))
    # the Trainer does not save the config of a bare timm model
    if trainer is None or (source.args.should_save and not (stage / "config.json").is_file()):
        save_pruned(source.model, stage)
    if processing_class is not None:
        processing_class.save_pretrained(stage)
    return stage


def _with_card(
    files: Mapping[str, Path],
    source: Source,
    stage: Path,
    card: ModelCard | None,
    *,
    reports: str | os.PathLike[str] | None,
    overwrite: bool,
    **settings: Any,
) -> dict[str, Path]:
    """The files with the card (made with the settings of `make_card`), its pictures, and the reports of this model."""
    folder = source.folder or (source.output if reports is None else Path(reports))
    files = {name: path for name, path in files.items() if not REPORTS.fullmatch(name)}
    target = stage / CARD_FILE
    theirs = target.read_text("utf-8") if source.folder is None and target.is_file() else None
    target.unlink(missing_ok=True)
    written = None if folder is None else folder / CARD_FILE
    if written is not None and written.is_file() and bare_metadata(written):
        shutil.copy(written, target)  # its metadata is taken over
    content = make_card(source, target, reports=reports, overwrite=overwrite, theirs=theirs, **settings)[1]
    if card is not None:
        target.write_text(str(card), "utf-8")
    elif (
        written is not None
        and not overwrite
        and not may_replace(written)
        and not (content.encoder and may_add(written))
    ):
        warn_caller(kept_message(written, _HOW))
        shutil.copy(written, target)
    made = {name: stage / name for name in (CARD_FILE, PICTURE_FILE, QUALITY_FILE)}
    read = {} if folder is None else {name: folder / name for name in content.reports}
    return {**files, **{name: path for name, path in {**read, **made}.items() if path.is_file()}}


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path],
    revision: str | None,
    create_pr: bool,
    message: str,
    given: Collection[str] | None,
) -> CommitInfo:
    """One commit on the newest one: if another came first, again on that.

    Args:
        given: the metadata that was given for the card; None if the card replaces whatever is there.
    """
    for attempt in range(_TRIES):
        head = api.repo_info(repo_id, revision=revision).sha
        there = api.list_repo_files(repo_id, revision=head)
        mine: dict[str, Path | bytes] = dict(files)
        if given is not None and CARD_FILE in there:
            mine = _beside_theirs(api, repo_id, head, mine, given)
        adds = [CommitOperationAdd(name, path) for name, path in sorted(mine.items())]
        goes = [CommitOperationDelete(name) for name in outdated(there, files)]
        try:
            place: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "parent_commit": head}
            with hub_help(repo_id, uploads=True):
                done: CommitInfo = api.create_commit(repo_id, [*adds, *goes], commit_message=message, **place)
                return done
        except HfHubHTTPError as error:
            if error.response.status_code != _CONFLICT or attempt == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _beside_theirs(
    api: HfApi, repo_id: str, head: str | None, files: Mapping[str, Path | bytes], given: Collection[str]
) -> dict[str, Path | bytes]:
    """The files without our card where somebody wrote one on the Hub, and with the metadata that was set there."""
    ours = Path(str(files[CARD_FILE]))
    with tempfile.TemporaryDirectory() as scratch:
        theirs = Path(api.hf_hub_download(repo_id, CARD_FILE, revision=head, local_dir=scratch))
        if not may_replace(ours):
            return dict(files)  # the one at hand was written by somebody, too
        if may_replace(theirs):
            card = merged(ModelCard(ours.read_text("utf-8")), bare_metadata(theirs), given)
            return {**files, CARD_FILE: str(card).encode()}
    warn_caller(kept_message(f"{CARD_FILE} of {repo_id} on the Hub", _HOW))
    return {name: path for name, path in files.items() if name != CARD_FILE}
