"""Publishing on the Hub: a checkpoint with its card and its reports, in one commit."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from .card.facts import PLAN_FILE, SPARSITY_FILE, CardFacts
from .card.model_card import CARD_FILE, PICTURE_FILE, make_card, may_replace
from .errors import ConfigError
from .hub_errors import hub_help
from .loading import save_pruned
from .run_report import RUN_REPORT

__all__ = ["push_to_hub"]

_TRIES = 5  # where others commit at the same time
_CONFLICT = 412
_WEIGHTS = re.compile(r"model[\w.\-]*\.safetensors(\.index\.json)?")
# weights of the model that the repository held before: loaders may prefer them to the new ones; and the Trainer's pickle of its arguments
_STALE = re.compile(rf"{_WEIGHTS.pattern}|pytorch_model[\w.\-]*\.bin(\.index\.json)?|tf_model\.h5|flax_model\.msgpack|training_args\.bin")
_REPORTS = (*(f"{RUN_REPORT}.{end}" for end in ("json", "md")), "sparsity_report.json", "sparsity_report.md", "report.json", "report.md")
_FINDINGS = {*_REPORTS, PLAN_FILE, PICTURE_FILE, "heatmap.png"}
# what belongs to a checkpoint: no pickles (they run code), nothing hidden, and not what says where a model was trained
_PUBLIC = re.compile(
    r"(?![._])(?!trainer_state\.json$)(?!all_results\.json$).+\.(json|safetensors|md|txt|model|jinja|png|tiktoken|spm|bpe)"
)


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
    **card_settings: Any,
) -> CommitInfo | None:
    """Publish a model on the Hub: weights, config with its record, tokenizer or image processor, reports and card, in one commit.

    The repository is made if there is none. Weights and reports of an earlier push that this one does not replace are deleted in the same
    commit: a loader might prefer them. If others commit at the same time, nothing of theirs is lost. If the upload fails or is
    killed, the repository stays at its last commit, and a further call does it again.

    Args:
        trainer_or_model: a Trainer (its hub_* arguments are the defaults here), a model, or the folder of a checkpoint. Of a folder the
            files at the top are taken that belong to a checkpoint: JSON, safetensors, texts, tokenizer models, templates, pictures;
            nothing hidden or that begins with "_", no pickles. A README.md that somebody wrote or edited is taken as it is.
        repo_id: ORG/NAME, or NAME in your own namespace; default: the Trainer's hub_model_id, or the folder's name.
        processing_class: the tokenizer or image processor that goes with a model.
        private: whether a repository that is made is private; default: as the organisation has it.
        revision: the branch to commit to, which is made if there is none; default: main.
        create_pr: open a pull request instead; no right to write is needed.
        commit_message: the title of the commit.
        token: as in `huggingface_hub`: None for that of `hf auth login` or HF_TOKEN.
        card: a card to publish instead of a new one.
        reports: for a model: the folder of its run, whose reports go along.
        card_settings: as in `create_model_card`: license, language, dataset_tags, command, ...

    Returns:
        What the Hub says of the commit; None in processes other than the first.

    Raises:
        ConfigError: if there is nothing to publish. huggingface_hub's own errors, with a line of help, if the Hub refuses.
    """
    args = None if isinstance(trainer_or_model, (str, os.PathLike, nn.Module)) else getattr(trainer_or_model, "args", None)
    if args is not None:
        repo_id = repo_id or args.hub_model_id or Path(args.output_dir).resolve().name
        private = args.hub_private_repo if private is None else private
        revision, token = revision or args.hub_revision, args.hub_token if token is None else token
    elif repo_id is None:
        if isinstance(trainer_or_model, nn.Module):
            raise ConfigError("Say where the model goes: push_to_hub(model, 'ORG/NAME').")
        repo_id = Path(trainer_or_model).resolve().name
    with ExitStack() as stack:
        stage = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deeparc_hf-")))
        files = _files(trainer_or_model, stage, processing_class)
        if args is not None and args.process_index != 0:
            return None
        stack.enter_context(hub_help(repo_id))
        api = HfApi(token=token)
        repo_id = repo_id if create_pr else api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files |= _card_files(trainer_or_model, stage, files, card, repo_id, processing_class, reports, card_settings)
        return _commit(api, repo_id, files, revision, create_pr, commit_message or f"Upload {_what(trainer_or_model)} with deeparc_hf")
    return None


def _what(source: Any) -> str:
    model = source if isinstance(source, nn.Module) else getattr(source, "model", None)
    return "model" if model is None else type(model).__name__


def _files(source: Any, stage: Path, processing_class: Any) -> dict[str, Path]:
    """The files of a checkpoint, by their names in the repository; those of a live model are written into the stage."""
    if isinstance(source, (str, os.PathLike)):
        return _of_folder(Path(source))
    if isinstance(source, nn.Module):
        save_pruned(source, stage)
        if processing_class is not None:
            processing_class.save_pretrained(stage)
    elif hasattr(source, "save_model"):
        source.save_model(str(stage), _internal_call=True)  # all processes; with this it does not push by itself
        if processing_class is not None:
            processing_class.save_pretrained(stage)
    else:
        raise ConfigError(f"What is published is a Trainer, a model or a checkpoint's folder, found a {type(source).__name__}.")
    return _visible(stage)


def _visible(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_file() and _PUBLIC.fullmatch(path.name)}


def _of_folder(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give a checkpoint's folder, a model or a Trainer.")
    if (folder / "modules.json").is_file():
        raise ConfigError(f"{folder} is a SentenceTransformer, whose parts lie in several folders. Publish it by its own push_to_hub.")
    files = _visible(folder)
    if "config.json" not in files or not any(_WEIGHTS.fullmatch(name) for name in files):
        raise ConfigError(
            f"{folder} is no whole checkpoint: it needs config.json and model.safetensors (or its shards). Save the model there by "
            "save_pretrained, trainer.save_model or deeparc_hf.save_pruned."
        )
    return files


def _card_files(
    source: Any,
    stage: Path,
    files: Mapping[str, Path],
    card: ModelCard | None,
    repo_id: str,
    processing_class: Any,
    reports: Any,
    settings: Mapping[str, Any],
) -> dict[str, Path]:
    """The card, its picture, and the reports that the card is made from."""
    kept = files.get(CARD_FILE) if isinstance(source, (str, os.PathLike)) else None
    if card is None and kept is not None and not may_replace(kept):
        return {}
    target = stage / CARD_FILE
    if card is not None:
        target.write_text(str(card), "utf-8")
        return {CARD_FILE: target}
    _, facts = make_card(source, target, repo_id=repo_id, processing_class=processing_class, reports=reports, **settings)
    folder = reports if reports is not None else getattr(getattr(source, "args", None), "output_dir", None)
    found = {name: stage / name for name in (CARD_FILE, PICTURE_FILE) if (stage / name).is_file()}
    if folder is not None:
        for name in _told(facts):
            if Path(folder, name).is_file():
                found[name] = Path(shutil.copy(Path(folder, name), stage / name))
    return found


def _told(facts: CardFacts) -> list[str]:
    """The reports that are of this model."""
    names = list(_REPORTS[:2]) if facts.from_run else []
    if facts.zeros is not None:
        names += [SPARSITY_FILE, SPARSITY_FILE.replace(".json", ".md")]
    return [*names, *([PLAN_FILE] if facts.plan is not None else [])]


def _commit(api: HfApi, repo_id: str, files: Mapping[str, Path], revision: str | None, create_pr: bool, message: str) -> CommitInfo:
    """One commit on the newest one: if another came first, again on that."""
    for attempt in range(_TRIES):
        head = api.repo_info(repo_id, revision=revision).sha
        there = api.list_repo_files(repo_id, revision=head)
        try:
            return api.create_commit(
                repo_id,
                _operations(files, there),
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=head,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != _CONFLICT or attempt == _TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _operations(files: Mapping[str, Path], there: Sequence[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    gone = [name for name in there if name not in files and (_STALE.fullmatch(name) or name in _FINDINGS)]
    adds = [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    return [*adds, *(CommitOperationDelete(name) for name in gone)]
